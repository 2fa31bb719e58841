"""Measures a diffusion model as the attack uses it, on photographs that it was not trained on.

    python demo/evaluate_tiny_diffusion.py                     # the small model, on the held-out photographs
    python demo/evaluate_tiny_diffusion.py --run output_heldout   # with what a run of main.py on them did
    python demo/evaluate_tiny_diffusion.py --images_root demo/images --label_path demo/labels.txt \\
        --boxes demo/boxes.csv                                 # on those of the demo

Prints the PSNR of the autoencoder alone and of the reconstruction without attack (inversion, null-text
optimisation, decoding), which classifiers still recognise that reconstruction, the error of the predicted
noise, and how much of the attention falls into boxes that were drawn round the objects by eye; of a run also
its success, PSNR, and the sizes of its losses.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diffattack.common.environment  # isort: skip  # noqa: F401
import diffattack.common.torchvision  # isort: skip  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.device import keep_freed_memory, resolve_device
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.dataset import read_dataset
from diffattack.data.images import read_image, to_pixels, to_tensor
from diffattack.data.records import ImageRecord, read_run
from diffattack.diffusion.attention import reference_run
from diffattack.diffusion.composition import attention_mask
from diffattack.diffusion.inversion import Inversion
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.predictions import predict
from diffattack.options import ATTACK_PRESETS

SIZE = 224
TIMES = (51, 201, 401)
ALONE, RECONSTRUCTED = "autoencoder alone", "inversion, null-text optimisation, decoding"


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
        reference = reference_run(attack, attack.controller.collecting, inversion)
    tokens = inversion.class_tokens[0].cpu()
    cross = reference.class_attention[0].cpu()[..., tokens].mean(-1)  # (7, 7)
    inside = share_of_cells(mask, len(cross))
    attention = reference.self_attention[0].cpu().flatten(0, 1)  # (196, 196)
    cells = share_of_cells(mask, reference.self_attention.shape[1]).flatten()
    size = inversion.images.shape[-2:]
    mask_of_attack = attention_mask(reference.class_attention, inversion.class_tokens, size)
    return {
        "class attention, least": cross.min().item(),
        "class attention, most": cross.max().item(),
        "inside over outside": (weighted_mean(cross, inside) / weighted_mean(cross, 1 - inside)).item(),
        "self-attention inside over chance": (weighted_mean(attention @ cells, cells) / cells.mean()).item(),
        "largest possible": (1 / cells.mean()).item(),
        "entropy of self-attention": (
            torch.special.entr(attention).sum(-1).mean() / np.log(attention.shape[1])
        ).item(),
        "hard mask covers": (mask_of_attack > 0.5).float().mean().item(),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images_root", type=Path, default=ROOT / "demo/heldout")
    parser.add_argument("--label_path", type=Path, default=ROOT / "demo/heldout_labels.txt")
    parser.add_argument("--boxes", type=Path, default=ROOT / "demo/heldout_boxes.csv")
    parser.add_argument("--pretrained_diffusion_path", default=str(ROOT / "demo/tiny_diffusion"))
    parser.add_argument("--run", type=Path, help="folder of a run of main.py on the same photographs")
    parser.add_argument("--limit", type=int, help="only the first photographs")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    items = read_dataset(arguments.images_root, arguments.label_path, IMAGENET_CLASSES)[: arguments.limit]
    clean, labels = np.stack([read_image(item.path, SIZE) for item in items]), [i.labels[0] for i in items]
    masks, device = read_boxes(arguments.boxes), resolve_device(arguments.device)
    # with guidance and null-text optimisation, which say more of a model than one branch does
    options = ATTACK_PRESETS["diffattack"] | {"inversion": "exact"}
    pipeline = load_pipeline(arguments.pretrained_diffusion_path, device)
    model = DiffAttack(pipeline, torch.nn.Identity(), **options)

    pictures, figures = defaultdict(list), defaultdict(list)
    for item, picture, label in zip(tqdm(items), clean, labels):
        made, found = measure(model, picture, label, masks[item.path.name])
        for name, value in made.items():
            pictures[name].append(value)
        for name, value in found.items():
            figures[name].append(value)
    if arguments.run:
        records = read_run(arguments.run, [item.index for item in items]).records
        pictures["attack"] = [
            read_image(arguments.run / f"{r.index:04d}_adv_image.png", SIZE) for r in records
        ]
        for record in records:
            for name, value in attack_figures(record).items():
                figures[name].append(value)
    print(f"{len(items)} photographs of {arguments.images_root.name}, {torch.get_num_threads()} threads")
    print("\n".join([*describe(clean, pictures, figures), *recognised(clean, pictures, labels, device)]))


def measure(
    model: DiffAttack, picture: np.ndarray, label: int, mask: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the model makes of one photograph without any attack: pictures, and figures."""
    image = to_tensor(picture).to(model.unet.device)
    latents = model.encode(image)
    figures = {
        f"noise error at t = {t}": noise_error(model, latents, IMAGENET_CLASSES[label], t) for t in TIMES
    }
    inversion = model.invert(image, torch.tensor([label]))
    figures |= attention_figures(model, inversion, mask)
    with torch.no_grad():
        decoded = model.decode(latents)[0]
    return {ALONE: to_pixels(decoded), RECONSTRUCTED: to_pixels(model.reconstruct(inversion)[0])}, figures


def attack_figures(record: ImageRecord) -> dict[str, float]:
    """Of one image's attack, before the factors of the losses but for those in the names."""
    sums = record.layer_losses.sum((1, 2))
    iterations = {"2": 1} | ({"10": 9} if len(sums) >= 10 else {}) | {"the last": -1}
    figures = {f"100 x sum L_i at iteration {name}": 100 * sums[k] for name, k in iterations.items()}
    return figures | {
        "10000 x variance of the cross-attention at the last iteration": 1e4 * record.losses[-1, -1],
        "cross-entropy at the last iteration": record.losses[0, -1],
        "seconds an image": record.row["seconds"],
    }


def describe(clean: np.ndarray, pictures: dict[str, list], figures: dict[str, list[float]]) -> list[str]:
    lines = []
    for name, made in pictures.items():
        values = [psnr(a, b) for a, b in zip(clean, made)]
        lines.append(f"PSNR of {name}: mean {np.mean(values):.2f} dB, {min(values):.1f} to {max(values):.1f}")
    for name, values in figures.items():
        lines.append(
            f"{name}: median {np.median(values):.3g}, {min(values):.3g} to {max(values):.3g}; "
            f"mean {np.mean(values):.3g}"
        )
    above = np.mean(np.array(figures["inside over outside"]) > 1.3)
    covered = np.array(figures["hard mask covers"])
    between = np.mean((covered > 0.1) & (covered < 0.7))
    return [
        *lines,
        f"inside over outside above 1.3: {above:.0%} of the photographs",
        f"hard mask covers between 10 % and 70 %: {between:.0%} of the photographs",
    ]


def recognised(
    clean: np.ndarray, pictures: dict[str, list], labels: list[int], device: torch.device
) -> list[str]:
    """Which classifiers still recognise what was made, of the photographs that they got right."""
    lines, kept, before_all = [], 0, 0
    for name in REGISTRY:
        classifier = load_classifier(name).to(device)

        def correct(images: Sequence[np.ndarray], classifier: torch.nn.Module = classifier) -> np.ndarray:
            predictions = predict(classifier, np.stack(images), np.array(labels), device)
            return predictions["label"] == np.array(labels)

        before = correct(clean)
        still = (before & correct(pictures[RECONSTRUCTED])).sum()
        kept, before_all = kept + still, before_all + before.sum()
        line = f"{name}: recognises the reconstruction of {still} of the {before.sum()} it got right"
        if "attack" in pictures:
            line += f", and is fooled with {(before & ~correct(pictures['attack'])).sum()}"
        lines.append(line)
    return [
        *lines,
        f"all classifiers on reconstructions: {kept}/{before_all} = {kept / max(before_all, 1):.1%}",
    ]


if __name__ == "__main__":
    main()
