"""Measures a diffusion model as the attack uses it, on photographs that it was not trained on.

    python demo/evaluate_tiny_diffusion.py                  # the small model, on the held-out photographs
    python demo/evaluate_tiny_diffusion.py --images_root demo/images --label_path demo/labels.txt \\
        --boxes demo/boxes.csv                              # on those of the demo
    python demo/evaluate_tiny_diffusion.py --iterations 0   # without the attack, in a fraction of the time

Prints the PSNR of the autoencoder alone and of the reconstruction without attack (inversion, null-text
optimisation, decoding), which classifiers still recognise that reconstruction, the error of the predicted
noise, how much of the attention falls into boxes that were drawn round the objects by eye, and what the
attack in mode `uniform` does: success, transfer, PSNR, the sizes of its losses, seconds, memory.
"""

import argparse
import csv
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

import environment  # isort: skip  # noqa: E402, F401
from classifiers import IMAGENET_CLASSES, REGISTRY, load_classifier  # noqa: E402
from dataset import read_dataset  # noqa: E402
from diff_latent_attack import DiffAttack  # noqa: E402
from evaluate import predict, psnr  # noqa: E402
from images import read_image, to_pixels, to_tensor  # noqa: E402
from inversion import Inversion  # noqa: E402
from models import (  # noqa: E402
    check_device,
    keep_freed_memory,  # noqa: E402
    load_pipeline,
)

SIZE = 224


def read_boxes(path: Path) -> dict[str, np.ndarray]:
    """For each file, `(SIZE, SIZE)`, 1 inside the boxes round its objects and 0 outside, from rows
    `file,left,top,right,bottom` in pixels.
    """
    masks: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((SIZE, SIZE), np.float32))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            left, top, right, bottom = (int(row[side]) for side in ("left", "top", "right", "bottom"))
            masks[row["file"]][top:bottom, left:right] = 1
    return masks


def share_of_cells(mask: np.ndarray, grid: int) -> torch.Tensor:
    """How much of each cell of a grid lies inside the boxes, `(grid, grid)` in [0, 1]."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask)[None], grid)[0]


@torch.no_grad()
def attention_figures(attack: DiffAttack, inversion: Inversion, mask: np.ndarray) -> dict[str, float]:
    """Of the run without attack, averaged over timesteps, heads and layers of one grid, as the attack's
    losses and masks use it.
    """
    with attack.controller.attached(attack.unet):
        reference = attack.reference_run(inversion)
    tokens = inversion.class_tokens[0].cpu()
    cross = reference.class_attention[0].cpu()[..., tokens].mean(-1)  # (7, 7)
    inside = share_of_cells(mask, len(cross))
    own = reference.self_attention[0].cpu().flatten(0, 1)  # (196, 196)
    cells = share_of_cells(mask, reference.self_attention.shape[1]).flatten()
    return {
        "class attention, least": cross.min().item(),
        "class attention, most": cross.max().item(),
        "inside over outside": (weighted_mean(cross, inside) / weighted_mean(cross, 1 - inside)).item(),
        "self-attention inside over chance": (weighted_mean(own @ cells, cells) / cells.mean()).item(),
        "largest possible": (1 / cells.mean()).item(),
        "entropy of self-attention": (torch.special.entr(own).sum(-1).mean() / np.log(own.shape[1])).item(),
        "hard mask covers": attack.pseudo_mask(reference.class_attention, inversion)
        .gt(0.5)
        .float()
        .mean()
        .item(),
    }


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum() / weights.sum()


@torch.no_grad()
def noise_error(attack: DiffAttack, latents: torch.Tensor, class_name: str, t: int) -> float:
    """Mean squared error of the predicted noise, as a share of the noise's power, for one image's latents
    `(1, C, h, w)`.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t)).to(latents)
    alpha, sigma = attack.signal_and_noise(t)
    noisy = alpha * latents + sigma * noise
    prediction = attack.unet(noisy, t, attack.embed([class_name])[0]).sample
    if attack.scheduler.config.prediction_type == "v_prediction":
        prediction = alpha * prediction + sigma * noisy
    return (F.mse_loss(prediction, noise) / noise.square().mean()).item()


def summary(values: list[float], form: str = ".2f") -> str:
    return f"median {np.median(values):{form}}, {min(values):{form}} to {max(values):{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images_root", type=Path, default=ROOT / "demo/heldout")
    parser.add_argument("--label_path", type=Path, default=ROOT / "demo/heldout_labels.txt")
    parser.add_argument("--boxes", type=Path, default=ROOT / "demo/heldout_boxes.csv")
    parser.add_argument("--pretrained_diffusion_path", default=str(ROOT / "demo/tiny_diffusion"))
    parser.add_argument("--iterations", type=int, default=30, help="of the attack; 0 leaves it out")
    parser.add_argument("--limit", type=int, help="only the first photographs")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = check_device(arguments.device)
    items, masks = (
        read_dataset(arguments.images_root, arguments.label_path, IMAGENET_CLASSES)[: arguments.limit],
        read_boxes(arguments.boxes),
    )
    labels = [item.labels[0] for item in items]
    attack = DiffAttack(
        load_pipeline(arguments.pretrained_diffusion_path, device),
        load_classifier("efficientnet_lite0").to(device),
        iterations=arguments.iterations,
    )

    clean = np.stack([read_image(item.path, SIZE) for item in items])
    pictures, figures, seconds = defaultdict(list), defaultdict(list), []
    for item, picture, label in zip(tqdm(items), clean, labels):
        image = to_tensor(picture).to(device)
        latents = attack.encode(image)
        with torch.no_grad():
            pictures["autoencoder alone"].append(to_pixels(attack.decode(latents)[0]))
        for t in (51, 201, 401):
            figures[f"noise error at t = {t}"].append(
                noise_error(attack, latents, IMAGENET_CLASSES[label], t)
            )
        started = time.perf_counter()
        inversion = attack.invert(image, torch.tensor([label]))
        if arguments.iterations:
            pictures["attack"].append(to_pixels(attack.attack(inversion)[0]))
            seconds.append(time.perf_counter() - started)
            record = attack.record
            figures["100 x sum L_i at the last iteration"].append(
                100 * record.timestep_losses[-1].sum().item()
            )
            figures["10000 x variance at the last iteration"].append(
                1e4 * record.cross_attention_loss[-1].item()
            )
            figures["cross-entropy at the last iteration"].append(record.attack_loss[-1].item())
        pictures["inversion, null-text optimisation, decoding"].append(
            to_pixels(attack.reconstruct(inversion)[0])
        )
        attack.hard_mask = True  # of `pseudo_mask`; the attack above was without a mask
        for name, value in attention_figures(attack, inversion, masks[item.path.name]).items():
            figures[name].append(value)
        attack.hard_mask = False

    print(f"{len(items)} photographs of {arguments.images_root.name}, {torch.get_num_threads()} threads")
    for name, made in pictures.items():
        values = [psnr(a, b) for a, b in zip(clean, made)]
        print(f"PSNR of {name}: mean {np.mean(values):.2f} dB, {min(values):.1f} to {max(values):.1f}")
    for name, values in figures.items():
        print(f"{name}: {summary(values, '.3g')}; mean {np.mean(values):.3g}")
    print(
        f"inside over outside above 1.3: {np.mean(np.array(figures['inside over outside']) > 1.3):.0%} of "
        f"the photographs"
    )
    covered = np.array(figures["hard mask covers"])
    print(
        f"hard mask covers between 10 % and 70 %: {np.mean((covered > 0.1) & (covered < 0.7)):.0%} of the "
        f"photographs"
    )
    kept = before_all = 0
    for name in REGISTRY:
        classifier = load_classifier(name).to(device)
        correct = {
            kind: np.array(
                [
                    p.label == label
                    for p, label in zip(predict(classifier, np.stack(made), np.array(labels), device), labels)
                ]
            )
            for kind, made in {"clean": list(clean), **pictures}.items()
            if kind != "autoencoder alone"
        }
        still = (correct["clean"] & correct["inversion, null-text optimisation, decoding"]).sum()
        kept, before_all = kept + still, before_all + correct["clean"].sum()
        line = (
            f"{name}: recognises the reconstruction of {still} of the {correct['clean'].sum()} it got right"
        )
        if "attack" in correct:
            fooled = (correct["clean"] & ~correct["attack"]).sum()
            line += f", and is fooled by the attack on efficientnet_lite0 with {fooled}"
        print(line)
    print(f"all classifiers on reconstructions: {kept}/{before_all} = {kept / max(before_all, 1):.1%}")
    if seconds:
        print(f"one whole attack: {np.mean(seconds):.1f} s (mean; {min(seconds):.1f} to {max(seconds):.1f})")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
