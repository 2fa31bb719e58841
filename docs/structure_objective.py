"""What weights of the structure loss are worth where nothing is stronger: once the classifier is wrong by a
margin, the weighted structure loss alone is minimised, and the attack only holds the margin.

    python docs/structure_objective.py --save_dir output_structure            # the 34 photographs, an hour
    python docs/structure_objective.py --save_dir output_structure --limit 4

Each photograph's figures are a line of `figures.jsonl`; the same command goes on with what is missing, and
prints the table at the end. docs/results.md says what follows.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run from anywhere

import diffattack.common.environment  # isort: skip  # noqa: F401

import argparse
import json

import numpy as np
import torch
from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.classifiers.heads import SOFTMAX
from diffattack.classifiers.registry import DEFAULT_TRANSFER_MODELS, load_classifier
from diffattack.common.device import set_up
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.dataset import Item, read_dataset
from diffattack.data.images import read_image, to_pixels, to_tensor
from diffattack.data.summaries import timestep_shares
from diffattack.diffusion.batch import Batch
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.statistics import mean_over_images, share
from diffattack.evaluation.tables import table
from diffattack.losses import Losses, Pass

SURROGATE, MARGIN, ITERATIONS = "efficientnet_lite0", 5.0, 20
SCHEDULES = ("none", "uniform", "increasing", "learned", "decreasing")
OPTIONS = dict(
    iterations=ITERATIONS,
    latent_optimizer="adamw",
    budget=None,
    contrast_limit=0.0,
    high_pass=0.0,
    colour=1.0,
    attack_through=(),
    attack_loss_weight=1.0,
    cross_attn_loss_weight=0.0,
)


class StructureOnceFooled(DiffAttack):
    """Descends on the attack's loss until every surrogate is wrong by MARGIN, then on the weighted structure
    loss alone, and back where that loses the margin. Gradients are made equally long, so that AdamW sees one
    as well as the other.
    """

    moves_on = True  # after the margin is reached

    def descend(self, losses: Losses, passed: Pass, batch: Batch, measured: torch.Tensor) -> None:
        latents = batch.optimizer.latents
        attack, structure = (
            torch.autograd.grad(loss.sum(), latents, retain_graph=True)[0]
            for loss in (-losses.attack, losses.self_attention)
        )
        holds = (
            SOFTMAX.margin(losses.logits.detach(), batch.inversion.labels, batch.inversion.targets).amin(0)
            >= MARGIN
        )
        chosen = torch.where(holds.view(-1, 1, 1, 1), structure if self.moves_on else 0 * structure, attack)
        length = chosen.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
        latents.grad = chosen / length
        if self.moves_on or not holds.all():
            batch.optimizer.step(passed.change)


def figures_of(attack: DiffAttack, clean: np.ndarray, label: int, judges: dict, inversion: object) -> dict:
    """What is said of one photograph under one schedule."""
    result = attack.attack(inversion)
    picture = to_pixels(result.adversarial[0])
    with torch.no_grad():
        wrong = {name: int(judge(to_tensor(picture)).argmax()) != label for name, judge in judges.items()}
        right = {name: int(judge(to_tensor(clean)).argmax()) == label for name, judge in judges.items()}
    layers = result.record.layer_losses[..., 0].numpy()  # (iterations, N, layers)
    return {
        "fooled": {name: wrong[name] for name in judges if right[name]},
        "psnr": psnr(clean, picture),
        "structure": float(result.record.timestep_losses[-1].sum()),
        "largest": float(result.record.timestep_losses.sum(1).max()),
        "shares": timestep_shares(layers[-1:]).tolist(),
    }


def photographs(limit: int | None) -> list[Item]:
    """Those of the demo and those held out, the first of them alone where there is a limit."""
    return [
        item
        for images, labels in (("images", "labels.txt"), ("heldout", "heldout_labels.txt"))
        for item in read_dataset(ROOT / "demo" / images, ROOT / "demo" / labels, IMAGENET_CLASSES)
    ][:limit]


def measure(arguments: argparse.Namespace, path: Path) -> None:
    torch.manual_seed(0)
    set_up(torch.device("cpu"))
    pipeline = load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu"))
    judges = {name: load_classifier(name) for name in (SURROGATE, *DEFAULT_TRANSFER_MODELS)}
    attacks = {
        name: StructureOnceFooled(
            pipeline,
            judges[SURROGATE],
            weight_mode="uniform" if name in ("none", "uniform") else "fixed",
            weight_schedule="learned" if name in ("none", "uniform") else name,
            **OPTIONS,
        )
        for name in SCHEDULES
    }
    attacks["none"].moves_on = False
    items = photographs(arguments.limit)
    done = {json.loads(line)["file"] for line in path.read_text().splitlines()} if path.exists() else set()
    with open(path, "a") as file:
        for item in tqdm([item for item in items if item.path.name not in done], unit="image"):
            clean = read_image(item.path, 224)
            inversion = attacks["none"].invert(to_tensor(clean), torch.tensor(item.labels))
            told = {
                name: figures_of(attack, clean, item.labels[0], judges, inversion)
                for name, attack in attacks.items()
            }
            file.write(json.dumps({"file": item.path.name, **told}) + "\n")
            file.flush()


def report(path: Path) -> str:
    """The table of all photographs that have been measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    titles = "schedule|white-box|transfer|PSNR dB|its difference to uniform|of the largest structure loss"
    told, uniform = [[*titles.split("|"), "shares, %"]], np.array([row["uniform"]["psnr"] for row in rows])
    for name in SCHEDULES:
        each = [row[name] for row in rows]
        surrogate = [one["fooled"][SURROGATE] for one in each if SURROGATE in one["fooled"]]
        others = [done for one in each for judge, done in one["fooled"].items() if judge != SURROGATE]
        decibels = np.array([one["psnr"] for one in each])
        told.append(
            [
                name,
                str(share(sum(surrogate), len(surrogate))),
                str(share(sum(others), len(others))),
                str(mean_over_images(decibels)),
                str(mean_over_images(decibels - uniform)),
                f"{np.median([one['structure'] / one['largest'] for one in each]):.2f}",
                " ".join(f"{value:.0f}" for value in 100 * np.mean([one["shares"] for one in each], 0)),
            ]
        )
    return f"{len(rows)} photographs\n" + "\n".join(table(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--save_dir", type=Path, required=True, metavar="FOLDER", help="where figures go")
    parser.add_argument("--limit", type=int, default=None, metavar="K", help="the first K photographs alone")
    arguments = parser.parse_args()
    arguments.save_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.save_dir / "figures.jsonl"
    measure(arguments, path)
    print(report(path))


if __name__ == "__main__":
    main()
