"""What classifiers predict of pictures, and whether they are right or fooled.

A prediction is a row of a structured array of `PREDICTION`, of images `(B,)`, or, where it is kept, of images
by classifier, draw and side `(B, classifiers, 1 + draws, sides)`.

Three figures must not be confused: `accuracy_after` counts all images, as the original DiffAttack prints it
and the tables of papers have it; `success` counts those that this classifier had right before; and
`success_of_all` is what TransferAttack calls success, misclassified images among all. Shares have 95 % Wilson
intervals.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from diffattack.classifiers.defences import SEED, Defended, split_name
from diffattack.classifiers.heads import SOFTMAX, Head, marked
from diffattack.data.images import to_tensor
from diffattack.evaluation.statistics import Estimate, mean_over_images, share

SIDES = ("before", "after", "reconstructed")  # of the clean, adversarial and reconstructed pictures
PREDICTION = np.dtype(
    [
        ("label", np.int64),  # of the largest logit
        ("confidence", np.float64),  # probability of that label
        # probability of the true label; of several, of all of them together, with a sigmoid head the largest
        ("true_confidence", np.float64),
        ("target_confidence", np.float64),  # probability of the target, NaN without one
    ]
)
FIGURES = (
    "accuracy_before",
    "accuracy_reconstructed",
    "accuracy_after",
    "success",
    "success_of_all",
    "success_of_attack_alone",
)
RULES = ("worst", "mean", "majority")
DRAWS_LEGEND = (
    "worst, mean and majority of K draws: the random defence drawn once an answer, K times; the row above is "
    "by several draws at once. Worst: right in every draw; fooled in any of those that were right before. "
    "Mean: the share of the draws. Majority: by the class that most draws see, of equals the one seen first"
)


@torch.no_grad()
def predict(
    classifier: torch.nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    batch: int = 16,
    head: Head = SOFTMAX,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)` or `(B, L)`, and whose targets
    `(B,)`, -1 for none: predictions `(B,)`.
    """
    logits = torch.cat([classifier(part.to(device)).cpu() for part in to_tensor(images).split(batch)])
    probabilities, predicted = head.probabilities(logits), logits.argmax(-1)
    classes = marked(torch.as_tensor(labels.reshape(len(labels), -1)), logits.shape[-1])
    predictions, every = np.zeros(len(images), PREDICTION), torch.arange(len(images))
    predictions["label"] = predicted
    predictions["confidence"] = probabilities[every, predicted]
    predictions["true_confidence"] = head.confidence(probabilities, classes)
    predictions["target_confidence"] = math.nan
    if targets is not None:
        of_target = probabilities[every, torch.as_tensor(targets).clamp(min=0)]
        predictions["target_confidence"] = np.where(targets >= 0, of_target, math.nan)
    return predictions


@dataclass(frozen=True)
class ClassifierResult:
    """What one classifier predicts of B images; each figure is of the first draw, or by a rule over the
    others, if it stands behind a random defence that was drawn several times.
    """

    name: str
    labels: np.ndarray  # (B,) or (B, L), -1 for none
    predictions: np.ndarray  # (B, 1 + draws, sides) of PREDICTION
    targets: np.ndarray  # (B,), -1 for none
    head: Head = SOFTMAX

    @property
    def title(self) -> str:
        """Its name as tables have it: of a file without folders."""
        return re.sub(r"^[^@]*[/\\](?=[^/\\]+\.\w+(:\w+)?(@|$))", "", self.name)

    @property
    def network(self) -> str:
        """Its name without defences."""
        return split_name(self.name)[0]

    @property
    def draws(self) -> int:
        """How many draws a random defence was judged by, one by one."""
        return self.predictions.shape[1] - 1

    @cached_property
    def counts(self) -> dict[str | None, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """By the rule over draws, of which None is the first draw alone, and by a figure's name: which images
        it counts, and whether it is so of each of them, or in what share of the draws; `(B,)` each.
        """
        first, draws = np.split(self.predictions, [1], axis=1)
        found = {None: self.by_image(first)}
        if self.draws:
            # the class that most draws see; how sure they are together, nobody knows
            votes, voted = draws["label"], draws[:, :1].copy()
            most = (votes[:, :, None] == votes[:, None]).sum(2).argmax(1, keepdims=True)
            voted["label"] = np.take_along_axis(votes, most, 1)
            found |= {"worst": self.by_image(draws), "mean": self.by_image(draws, is_mean=True)}
            found["majority"] = self.by_image(voted)
        return found

    def by_image(self, draws: np.ndarray, is_mean: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same of predictions `(B, draws, sides)` by one rule, worst unless it is the mean."""
        labels, goals = self.labels.reshape(len(self.labels), 1, 1, -1), self.targets[:, None, None]
        right = self.head.sees(draws["label"], labels, draws["true_confidence"])  # (B, draws, sides)
        at_goal = (goals >= 0) & self.head.sees(draws["label"], goals[..., None], draws["target_confidence"])
        misled = np.where(goals >= 0, at_goal, ~right)
        # a sigmoid head can see the target beside a true class already, so that no attack can fool it
        attackable = right & ~at_goal
        every, before, after = np.ones(right.shape[:2], bool), attackable[..., 0], misled[..., 1]
        found = {
            "accuracy_before": (every, right[..., 0]),
            "accuracy_after": (every, right[..., 1]),
            "success": (before, before & after),
            "success_of_all": (every, after),
        }
        if draws.shape[2] > 2:
            both = before & attackable[..., 2]
            found["accuracy_reconstructed"] = every, right[..., 2]
            found["success_of_attack_alone"] = both, both & after
            found["success_of_reconstruction"] = before, before & misled[..., 2]

        def over_draws(name: str, counted: np.ndarray, so: np.ndarray) -> np.ndarray:
            if is_mean:
                return so.sum(1) / np.maximum(counted.sum(1), 1)
            return so.all(1) if name.startswith("accuracy") else so.any(1)

        return {name: (pair[0].any(1), over_draws(name, *pair)) for name, pair in found.items()}

    @cached_property
    def figures(self) -> dict[str | None, dict[str, Estimate | None]]:
        """By the rule over draws, and by name: rates, None of reconstructions where there are none."""
        return {rule: {name: self.rate(name, rule) for name in FIGURES} for rule in self.counts}

    def rate(self, figure: str, rule: str | None = None) -> Estimate | None:
        if figure not in self.counts[rule]:
            return None
        counted, found = self.counts[rule][figure]
        if rule == "mean" and counted.any():
            return replace(mean_over_images(found[counted]), is_share=True)
        return share(found.sum(), counted.sum())

    @property
    def success(self) -> Estimate:
        """Attack success rate: misclassified among those classified correctly before."""
        return self.figures[None]["success"]

    def described(self, class_names: Sequence[str], base: int, draw: int = 0) -> dict[str, dict]:
        """The predictions of one image for results.json by kind of picture; labels count from `base`."""
        found = {}
        for side, prediction in zip(SIDES, self.predictions[0, draw]):
            values = dict(zip(PREDICTION.names, prediction.item()))
            if self.targets[0] < 0:
                del values["target_confidence"]
            found[side] = values | {"label": values["label"] + base, "class": class_names[values["label"]]}
        return found


def one_draw(defended: Defended, number: int, images: torch.Tensor) -> torch.Tensor:
    """The logits of a classifier behind random defences by the draw of that number alone, counted from 0; it
    is the same for every image, before the attack and after it.
    """
    return defended.classifier(defended.changed(images, SEED + number))
