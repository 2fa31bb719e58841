"""How far weights of the timesteps can turn the attack: the gradients of the timesteps' losses L_i on the
latent, how alike they are, and by what angle a schedule turns the whole gradient from where uniform weights
send it, at the default factor and where the structure term is as strong as a share of the attack.

    python docs/timestep_gradients.py               # the 34 photographs, in the last iteration, 15 minutes
    python docs/timestep_gradients.py --limit 4 --preset diffattack

docs/results.md says what follows.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run from anywhere

import diffattack.common.environment  # isort: skip  # noqa: F401

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from structure_objective import SURROGATE, photographs
from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.classifiers.registry import load_classifier
from diffattack.common.device import set_up
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.batch import Batch
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.statistics import mean_over_images
from diffattack.evaluation.tables import table
from diffattack.losses import Losses, Pass
from diffattack.options import ATTACK_PRESETS
from timestep_weights import named_schedules

SHARES = (None, 0.3, 1.0)  # of the structure term's gradient in the attack's; None: by the default factor


class Watched(DiffAttack):
    """Keeps the last iteration's gradients on the latent, `(N, D)` of the timesteps' losses and `(D,)` of the
    attack's with its factor.
    """

    def descend(
        self, losses: Losses, passed: Pass, batch: Batch, measured: torch.Tensor
    ) -> torch.Tensor | None:
        if measured.any():  # in few iterations, the last among them
            latents = batch.optimizer.latents
            each = (*losses.timestep_losses, batch.factors[0] * losses.attack)
            gradients = [torch.autograd.grad(one.sum(), latents, retain_graph=True)[0] for one in each]
            *of_timesteps, self.of_attack = (gradient.flatten().double() for gradient in gradients)
            self.of_timesteps, self.factor = torch.stack(of_timesteps), float(batch.factors[1])
        return super().descend(losses, passed, batch, measured)


def turned(attack: Watched, weights: np.ndarray, share: float | None) -> torch.Tensor:
    """The gradient of the attack and the weighted structure term, `(D,)`."""
    structure = attack.factor * len(weights) * torch.from_numpy(weights) @ attack.of_timesteps
    if share is not None:
        structure = structure * share * attack.of_attack.norm() / structure.norm()
    return attack.of_attack + structure


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """In degrees."""
    return float(F.cosine_similarity(a, b, dim=0).clamp(max=1).arccos().rad2deg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--limit", type=int, default=None, metavar="K", help="the first K photographs alone")
    parser.add_argument("--preset", choices=tuple(ATTACK_PRESETS), help="as of main.py")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    set_up(torch.device("cpu"))
    pipeline = load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu"))
    surrogate = load_classifier(SURROGATE)
    attack = Watched(pipeline, surrogate, **ATTACK_PRESETS.get(arguments.preset, {}))
    schedules = named_schedules(attack.num_timesteps)
    items = photographs(arguments.limit)
    alike, strength, angles = [], [], {name: [] for name in schedules}
    for item in tqdm(items, unit="image"):
        attack(to_tensor(read_image(item.path, 224)), torch.tensor(item.labels))
        units = F.normalize(attack.of_timesteps)
        alike.append((units @ units.T).numpy())
        uniform = [turned(attack, schedules["uniform"], share) for share in SHARES]
        strength.append(float((uniform[0] - attack.of_attack).norm() / attack.of_attack.norm()))
        for name, weights in schedules.items():
            there = [turned(attack, weights, share) for share in SHARES]
            angles[name].append([angle(*pair) for pair in zip(uniform, there)])
    print(f"{len(items)} photographs, iteration {attack.options.iterations}")
    print(f"structure term, % of the attack's gradient: {mean_over_images(100 * np.array(strength))}")
    print("\ncosines of the gradients of L_i and L_j, early to late")
    print("\n".join(table([[f"{value:.2f}" for value in row] for row in np.mean(alike, 0)])))
    heads = ["default factor", *(f"share {share:g}" for share in SHARES[1:])]
    rows = [
        [name, *(str(mean_over_images(column)) for column in np.array(each).T)]
        for name, each in angles.items()
    ]
    print("\nby how many degrees the whole gradient turns from that of uniform weights")
    print("\n".join(table([["schedule", *heads], *rows])))


if __name__ == "__main__":
    main()
