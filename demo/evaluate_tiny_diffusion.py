"""Measures a diffusion model as the attack uses it, on photographs that it was not trained on.

    python demo/evaluate_tiny_diffusion.py                     # the small model, on the 22 held-out photographs
    python demo/evaluate_tiny_diffusion.py --images_root demo/images --label_path demo/labels.txt

Prints the PSNR of the autoencoder alone and of the reconstruction without attack (inversion, null-text optimisation, decoding),
which classifiers still recognise that reconstruction, the error of the predicted noise, and the seconds of one whole attack.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from classifiers import IMAGENET_CLASSES, REGISTRY, load_classifier  # noqa: E402
from diff_latent_attack import DiffAttack  # noqa: E402
from evaluate import predict, psnr  # noqa: E402
from dataset import read_dataset  # noqa: E402
from main import check_device, load_pipeline  # noqa: E402
from utils import keep_freed_memory, read_image, to_pixels, to_tensor  # noqa: E402


@torch.no_grad()
def noise_error(attack: DiffAttack, latents: torch.Tensor, caption: str, t: int) -> float:
    """Mean squared error of the predicted noise, as a share of the noise's power, for one image's latents `(1, C, h, w)`."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t)).to(latents)
    alpha, sigma = attack.signal_and_noise(t)
    noisy = alpha * latents + sigma * noise
    prediction = attack.unet(noisy, t, attack.embed([caption])[0]).sample
    if attack.scheduler.config.prediction_type == "v_prediction":
        prediction = alpha * prediction + sigma * noisy
    return (F.mse_loss(prediction, noise) / noise.square().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_root", type=Path, default=ROOT / "demo/heldout")
    parser.add_argument("--label_path", type=Path, default=ROOT / "demo/heldout_labels.txt")
    parser.add_argument("--pretrained_diffusion_path", default=str(ROOT / "demo/tiny_diffusion"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = check_device(arguments.device)
    items = read_dataset(arguments.images_root, arguments.label_path, IMAGENET_CLASSES)
    labels = [item.labels[0] for item in items]
    attack = DiffAttack(load_pipeline(arguments.pretrained_diffusion_path, device), load_classifier("efficientnet_lite0").to(device))

    clean = np.stack([read_image(item.path, 224) for item in items])
    autoencoded, reconstructed = [], []
    errors = {t: [] for t in (51, 201, 401)}
    for picture, label in zip(tqdm(clean), labels):
        image = to_tensor(picture).to(device)
        latents = attack.encode(image)
        with torch.no_grad():
            autoencoded.append(to_pixels(attack.decode(latents)[0]))
        reconstructed.append(to_pixels(attack.reconstruct(attack.invert(image, torch.tensor([label])))[0]))
        for t in errors:
            errors[t].append(noise_error(attack, latents, IMAGENET_CLASSES[label], t))
    started = time.perf_counter()
    attack(to_tensor(clean[0]).to(device), torch.tensor(labels[:1]))
    seconds = time.perf_counter() - started

    print(f"{len(items)} photographs of {arguments.images_root.name}, {torch.get_num_threads()} threads")
    for name, pictures in (("autoencoder alone", autoencoded), ("inversion, null-text optimisation, decoding", reconstructed)):
        figures = [psnr(a, b) for a, b in zip(clean, pictures)]
        print(f"PSNR of {name}: mean {np.mean(figures):.2f} dB, {min(figures):.1f} to {max(figures):.1f}")
    kept = before_all = 0
    for name in REGISTRY:
        classifier = load_classifier(name).to(device)
        before, after = (predict(classifier, pictures, np.array(labels), device) for pictures in (clean, np.stack(reconstructed)))
        right = [b.label == label for b, label in zip(before, labels)]
        still = sum(r and a.label == label for r, a, label in zip(right, after, labels))
        kept, before_all = kept + still, before_all + sum(right)
        print(f"{name} recognises the reconstruction of {still} of the {sum(right)} it got right")
    print(f"all classifiers: {kept}/{before_all} = {kept / max(before_all, 1):.1%}")
    for t, values in errors.items():
        print(f"error of the predicted noise at t = {t}, true prompt: {np.mean(values):.3f} of the noise's power")
    print(f"one whole attack: {seconds:.0f} s")


if __name__ == "__main__":
    main()
