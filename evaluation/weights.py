"""What a comparison of weight modes says of timesteps and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.records import Run
from data.shares import LossSums, loss_sums
from evaluation.checks import COLLAPSED_BELOW
from evaluation.comparison import Comparison

STUDY_SHARES = (
    "2-6, 5-8, 10-15, 20-28, 47-57 %"  # reported for Stable Diffusion 2, at the first self-attention layer
)


@dataclass
class ModeWeights:
    start: list[float]
    end: list[float]
    effective: float

    @property
    def collapsed(self) -> bool:
        return self.effective < COLLAPSED_BELOW


def loss_shares(layer_losses: np.ndarray | LossSums) -> dict[str, np.ndarray]:
    """How the self-attention loss is shared out, before weights, by image: losses `(B, iterations, N,
    layers)`, or their sums, to `(B, N)` or `(B, layers)`, rows of sum 1.
    """
    sums = loss_sums(layer_losses)
    return {
        "timesteps, all layers": sums.timestep_shares,
        "timesteps, first layer": sums.first_layer_shares,
        "layers": sums.layer_shares,
    }


def add_weights(comparison: Comparison, first: Run, weights: Sequence[ModeWeights]) -> None:
    """Adds what is said of timesteps and their weights, with the shares of the first mode's run."""
    names, layers, shares = comparison.names, first.layers, loss_shares(first.pooled.structure)
    comparison.sections[1:1] = [
        ("Weights", weight_rows(names, weights)),
        ("Shares of the self-attention loss by timestep, %", share_rows(shares)),
        ("Shares of the self-attention loss by layer, %", layer_rows(layers, shares)),
    ]
    comparison.remarks.extend(
        [
            *advice(names, weights),
            f"the study that this tool extends reports {STUDY_SHARES} by timestep at the first layer alone, "
            "which holds 0.1 % of the loss in its model",
        ]
    )
    comparison.results["weights"] = {
        name: {**vars(w), "collapsed": w.collapsed} for name, w in zip(names, weights)
    }
    comparison.results["layers"] = layers
    comparison.results["shares"] = {
        name: {
            "mean": value.mean(0).tolist(),
            "standard_deviation": value.std(0).tolist(),
            "by_image": value.tolist(),
        }
        for name, value in shares.items()
    }


def weight_rows(names: Sequence[str], weights: Sequence[ModeWeights]) -> list[list[str]]:
    def numbers(values):
        return " ".join(f"{value:.3f}" for value in values)

    return [["mode", "start", "end", "effective timesteps", ""]] + [
        [name, numbers(w.start), numbers(w.end), f"{w.effective:.2f}", "collapsed" if w.collapsed else ""]
        for name, w in zip(names, weights)
    ]


def share_rows(shares: dict[str, np.ndarray]) -> list[list[str]]:
    by_timestep = {name: value for name, value in shares.items() if name.startswith("timesteps")}
    count = next(iter(by_timestep.values())).shape[1]
    return [["", *(f"i = {i}" for i in range(count))]] + [
        [name, *(f"{100 * m:.0f} +- {100 * s:.0f}" for m, s in zip(value.mean(0), value.std(0)))]
        for name, value in by_timestep.items()
    ]


def layer_rows(layers: Sequence[str], shares: dict[str, np.ndarray]) -> list[list[str]]:
    return [["layer", "share"]] + [
        [layer, f"{100 * m:.2g} +- {100 * s:.2g}"]
        for layer, m, s in zip(layers, shares["layers"].mean(0), shares["layers"].std(0))
    ]


def advice(names: Sequence[str], weights: Sequence[ModeWeights]) -> list[str]:
    lines = []
    for name, w in zip(names, weights):
        if name == "learnable" and w.collapsed:
            lines.append(
                f"learnable: the weights have collapsed onto timestep {int(np.argmax(w.end))}. The loss is "
                f"linear in the weights, so its minimum over them puts "
                "all weight on the smallest L_i; use fixed."
            )
        elif name == "learnable":
            lines.append(
                "learnable: the weights move towards the timestep with the smallest L_i, because the loss "
                "is linear in them; a higher --weight_lr or more images show the collapse."
            )
        elif name == "learnable_detached":
            lines.append(
                "learnable_detached: the weight is detached in the loss, so unchanged weights are expected; "
                "it equals fixed:increasing."
            )
    return lines
