"""The same attack on pixels instead of latents: the same momentum, limit at each place, budget and draws of
random resizing, without any diffusion model. What the diffusion model is worth is measured against this.

    python docs/pixel_attack.py                             # the 34 photographs, some minutes
    python docs/pixel_attack.py --save_dir output_pixels    # and keeps the pictures, for main.py --is_test

docs/results.md says what follows.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run from anywhere

import common.environment  # isort: skip  # noqa: F401

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from classifiers.defences import defend
from classifiers.registry import DEFAULT_TRANSFER_MODELS, load_classifier
from common.environment import mend_torchvision
from data.class_names import IMAGENET_CLASSES
from data.dataset import read_dataset
from data.images import read_image, to_pixels, to_tensor, write_image
from diffusion.composition import Composition, change_limits
from diffusion.latent_optimizers import Momentum
from evaluation.budget import Budget, parse_budget
from evaluation.quality import visibility
from evaluation.stats import share
from evaluation.tables import table

SURROGATE = "efficientnet_lite0"
FOLDERS = (("heldout", "heldout_labels.txt"), ("images", "labels.txt"))
MEASURES = ("PSNR dB", "SSIM", "where smooth (levels)")


def attack_pixels(
    classifier: torch.nn.Module,
    clean: torch.Tensor,
    label: int,
    budget: Budget,
    contrast_limit: float,
    iterations: int,
) -> torch.Tensor:
    """Images `(1, 3, H, W)` in [0, 1] to adversarial ones."""
    composition = Composition(clean, clean, change_limits(clean, contrast_limit))
    optimizer = Momentum(clean, budget.radius(clean, clean), iterations, clean, clean)
    for _ in range(iterations):
        picture = composition(optimizer.latents)
        logits = classifier(budget.hold(clean, picture))
        (-torch.nn.functional.cross_entropy(logits, torch.tensor([label]))).backward()
        optimizer.step(picture.detach() - clean)
    return budget.hold(clean, composition(optimizer.latents.detach()))


def measure(arguments: argparse.Namespace, folder: str, labels: str, judges: dict) -> list[str]:
    """A row of the table."""
    through = defend(judges[SURROGATE], ["resize:0.9"], attack_draws=arguments.draws)
    fooled, figures = {name: [] for name in judges}, []
    items = read_dataset(ROOT / "demo" / folder, ROOT / "demo" / labels, IMAGENET_CLASSES)
    for item in tqdm(items, desc=folder, unit="image"):
        pixels = read_image(item.path, 224)
        through.restart()
        adversarial = attack_pixels(
            through,
            to_tensor(pixels),
            item.labels[0],
            parse_budget(arguments.budget),
            arguments.contrast_limit,
            arguments.iterations,
        )
        written = to_pixels(adversarial[0])
        if arguments.save_dir:
            (arguments.save_dir / folder).mkdir(parents=True, exist_ok=True)
            for kind, picture in (("originImage", pixels), ("adv_image", written)):
                write_image(picture, arguments.save_dir / folder / f"{item.index:04d}_{kind}.png")
        found = visibility(pixels[None], written[None])
        figures.append([found[name][0] for name in MEASURES])
        with torch.no_grad():
            for name, judge in judges.items():
                before, after = (int(judge(to_tensor(x)).argmax()) for x in (pixels, written))
                if before == item.labels[0]:
                    fooled[name].append(after != item.labels[0])
    return [
        folder,
        *(str(share(sum(each), len(each))) for each in fooled.values()),
        *(f"{value:.3g}" for value in np.nanmean(figures, 0)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", default="psnr=36.5", metavar="MEASURE=VALUE", help="of each picture")
    parser.add_argument("--contrast_limit", type=float, default=1.0, metavar="K", help="at each place")
    parser.add_argument("--iterations", type=int, default=20, metavar="K", help="steps")
    parser.add_argument("--draws", type=int, default=4, metavar="K", help="of resize:0.9 in each of them")
    parser.add_argument("--save_dir", type=Path, default=None, metavar="FOLDER", help="where pictures go")
    arguments = parser.parse_args(argv)
    mend_torchvision()
    judges = {name: load_classifier(name) for name in (SURROGATE, *DEFAULT_TRANSFER_MODELS)}
    rows = [measure(arguments, *folder, judges) for folder in FOLDERS]
    print("\n".join(table([["photographs", *judges, *MEASURES], *rows])))


if __name__ == "__main__":
    main()
