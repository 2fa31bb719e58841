"""What classifiers predict of pictures, and whether they are right or fooled.

A prediction is a row of a structured array of `PREDICTION`, of images `(B,)`, or, where it is kept, of images
by classifier, draw and side `(B, classifiers, 1 + draws, sides)`.

Three figures must not be confused: `accuracy_after` counts all images, as the original DiffAttack prints it
and the tables of papers have it; `success` counts those that this classifier had right before; and
`success_of_all` is what TransferAttack calls success, misclassified images among all. Shares have 95 % Wilson
intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy
import torch

from diffattack.classifiers.defences import ALPHA, SEED, Defended, split_name
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
) -> tuple[np.ndarray, np.ndarray]:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)` or `(B, L)`, and whose targets
    `(B,)`, -1 for none: predictions `(B,)`, and logits `(B, classes)`, of a softmax head `(B, 0)`.
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
    return predictions, (logits[:, :0] if head.threshold is None else logits).float().numpy()


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
    logits: np.ndarray | None = None  # (B, sides, classes), of a sigmoid head
    certificates: np.ndarray | None = None  # (B, 2), behind smoothing, of clean and adversarial images

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
        """By the rule over draws, and by name: rates, None of reconstructions where there are none; and with
        a sigmoid head mAP by kind of picture, over the classes that some image shows.
        """
        found = {rule: {name: self.rate(name, rule) for name in FIGURES} for rule in self.counts}
        found[None] |= {f"mAP_{s}": Estimate(float(np.nanmean(p))) for s, p in self.precisions.items()}
        return found

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

    @cached_property
    def precisions(self) -> dict[str, np.ndarray]:
        """Of a sigmoid head the average precision of each class by kind of picture, `(classes,)`, NaN for one
        that no image shows; else nothing.
        """
        sides = () if self.logits is None else np.moveaxis(self.logits, 1, 0)
        return {side: average_precision(logits, self.labels) for side, logits in zip(SIDES, sides)}

    def described(self, class_names: Sequence[str], base: int, draw: int = 0) -> dict[str, dict]:
        """The predictions of one image for results.json by kind of picture; labels count from `base`."""
        found = {}
        for place, (side, prediction) in enumerate(zip(SIDES, self.predictions[0, draw])):
            values = dict(zip(PREDICTION.names, prediction.item()))
            if self.targets[0] < 0:
                del values["target_confidence"]
            found[side] = values | {"label": values["label"] + base, "class": class_names[values["label"]]}
            if self.logits is not None:
                found[side]["of_classes"] = self.of_classes(place, class_names)
        return found

    def of_classes(self, side: int, class_names: Sequence[str]) -> list[list]:
        """Of one image the names and probabilities of its target, if it has one, and its true classes, the
        surest first: the first of all is what decides.
        """
        probabilities = self.head.probabilities(torch.from_numpy(self.logits[0, side])).tolist()
        own = sorted((k for k in np.ravel(self.labels[0]) if k >= 0), key=lambda k: -probabilities[k])
        target = [k for k in self.targets if k >= 0]
        return [[class_names[k], probabilities[k]] for k in (*target, *own)]

    def certified(self) -> dict[str, dict]:
        """What smoothing certifies, of the clean and the adversarial images: how many it abstains on, and the
        median radius of the others.
        """
        found = {}
        for picture, certificates in zip(("clean", "adversarial"), self.certificates.T):
            images, radii = len(certificates), certificates["radius"][~certificates["abstains"]]
            median = float(np.median(radii)) if len(radii) else None
            found[picture] = {"abstains": images - len(radii), "images": images, "median_radius": median}
        return found

    def certified_line(self) -> str:
        parts = [
            f"abstains on {found['abstains']}/{found['images']} {picture} images"
            + (
                ""
                if (radius := found["median_radius"]) is None
                else f", median radius {radius:.2f} of others"
            )
            for picture, found in self.certified().items()
        ]
        limits = f"(L2, values in [0, 1]; Clopper-Pearson at {1 - ALPHA:.1%})"
        return f"{self.name}: {', '.join(parts)} {limits}"


def one_draw(defended: Defended, number: int, images: torch.Tensor) -> torch.Tensor:
    """The logits of a classifier behind random defences by the draw of that number alone, counted from 0; it
    is the same for every image, before the attack and after it.
    """
    return defended.classifier(defended.changed(images, SEED + number))


def average_precision(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How well a classifier with a sigmoid head tells each class over all images, which needs no threshold:
    `(classes,)`, NaN for a class that no image shows; as torchmetrics' MultilabelAveragePrecision has it.

    Args:
        logits: `(B, classes)`, which may lie in a file.
        labels: `(B,)` or `(B, L)`, -1 for none.
    """
    from torchmetrics.functional.classification import binary_average_precision

    found = np.full(logits.shape[1], np.nan)
    for label in np.unique(labels[labels >= 0]):
        true = (labels.reshape(len(logits), -1) == label).any(1)
        # ranks, since the probabilities of sure answers are all one
        scores = torch.from_numpy(scipy.stats.rankdata(logits[:, label], "min") / len(logits))
        found[label] = binary_average_precision(scores, torch.from_numpy(true.astype(np.int64)))
    return found
