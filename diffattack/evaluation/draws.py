"""A classifier behind random defences, judged by each of several draws alone: the worst of them, their mean,
and their majority vote.

Its own row is by the mean of probabilities over a fixed number of draws; but whoever runs such a classifier
may draw once, and an attacker may ask again. Draw k has the same seed for every image, batch and process,
before the attack and after it, so that an image is fooled in a draw if that very draw was right before and is
misled now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from diffattack.classifiers.defences import SEED, Defended
from diffattack.evaluation.predictions import ClassifierResult, Prediction, Predictions, correct
from diffattack.evaluation.stats import Estimate, mean_over_images, share

RULES = ("worst", "mean", "majority")
LEGEND = (
    "worst, mean and majority of K draws: the random defence drawn once an answer, K times; the row above is "
    "by several draws at once. Worst: right in every draw; fooled in any of those that were right before. "
    "Mean: the share of the draws. Majority: by the class that most draws see, of equals the one seen first"
)


class OneDraw(torch.nn.Module):
    """A classifier behind random defences as the draw of that number alone shows it, counted from 0."""

    def __init__(self, defended: Defended, number: int):
        super().__init__()
        self.defended, self.number = defended, number

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.defended.classifier(self.defended.changed(images, SEED + self.number))


@dataclass(frozen=True)
class OverDraws:
    """What such a classifier says of images at each draw."""

    each: Sequence[ClassifierResult]

    def title(self, rule: str) -> str:
        return f"{rule} of {len(self.each)} draws"

    @cached_property
    def majority(self) -> ClassifierResult:
        """The class that most draws see; how sure they are together, nobody says."""
        first = self.each[0]
        sides = ("before", "after", *(("reconstructed",) if first.reconstructed is not None else ()))
        voted = {}
        for side in sides:
            votes = np.stack([getattr(result, side).labels for result in self.each], 1)  # (B, K)
            columns = np.full((len(votes), 4), np.nan)
            columns[:, 0] = [Counter(row).most_common(1)[0][0] for row in votes.tolist()]
            voted[side] = Predictions.of_columns(columns)
        return replace(first, **voted)

    def by_image(self, rule: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a figure of `ClassifierResult`, which images it counts by this rule, and what it is of each of
        them, a share of the draws or 0 or 1; `(B,)` each.
        """
        if rule == "majority":
            return counts(self.majority, figure)
        counted, found = map(np.stack, zip(*(counts(result, figure) for result in self.each)))  # (K, B)
        if rule == "mean":
            return counted.any(0), found.sum(0) / np.maximum(counted.sum(0), 1)
        worst = found.all(0) if figure.startswith("accuracy") else found.any(0)
        return counted.any(0), worst

    def rate(self, rule: str, figure: str) -> Estimate | None:
        """The figure by this rule; None where it is of reconstructions, and there are none."""
        if self.each[0].reconstructed is None and figure in (
            "accuracy_reconstructed",
            "success_of_attack_alone",
        ):
            return None
        counted, values = self.by_image(rule, figure)
        if rule == "mean" and counted.any():
            return replace(mean_over_images(values[counted]), is_share=True)
        return share(values[counted].sum(), counted.sum())

    def figures(self, rule: str) -> dict[str, Estimate | None]:
        return {figure: self.rate(rule, figure) for figure in self.each[0].figures()}


def counts(result: ClassifierResult, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """As `ClassifierResult.counts`, of the accuracies before the attack, too."""
    if figure == "accuracy_before":
        return np.ones(len(result.labels), bool), result.correct_before
    if figure == "accuracy_reconstructed":
        return np.ones(len(result.labels), bool), correct(result.reconstructed, result.labels)
    return result.counts(figure)


# ---------------------------------------------------------------- as an image's record keeps them

Kept = dict[str, dict[str, list]]  # by side, and by field of Prediction, a number a draw


def drawn(row: dict, name: str) -> int:
    """In how many draws a classifier has been asked about the image of a row."""
    return len(row.get("draws", {}).get(name, {}).get("after", {}).get("label", ()))


def add_draw(row: dict, result: ClassifierResult, k: int, base: int) -> None:
    """Adds what the next draw says, of the k-th image of the result, to a row; labels count from `base`."""
    kept: Kept = row["draws"].setdefault(result.name, {})
    sides = {"before": result.before, "reconstructed": result.reconstructed, "after": result.after}
    for side, predictions in sides.items():
        if predictions is None:
            continue
        columns = kept.setdefault(side, {declared.name: [] for declared in fields(Prediction)})
        for name, value in vars(predictions[k]).items():
            columns[name].append(value + base if name == "label" else value)


def draw_of(kept: Kept, side: str, number: int, base: int) -> Prediction:
    """What the draw of that number says."""
    said = {name: values[number] for name, values in kept[side].items()}
    return Prediction.of_description(said, base)


def first_draws(kept: Kept, count: int) -> Kept:
    """Of so many draws alone."""
    return {
        side: {name: values[:count] for name, values in columns.items()} for side, columns in kept.items()
    }
