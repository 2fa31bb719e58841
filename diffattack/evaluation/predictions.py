"""What classifiers predict of pictures, and whether they are right or fooled.

A prediction is a row of a structured array of `PREDICTION`, of images `(B,)`, or, where it is kept, of images
by classifier, draw and side `(B, classifiers, 1 + draws, sides)`.

Three figures must not be confused: `accuracy_after` counts all images, as the original DiffAttack prints it
and the tables of papers have it; `success` counts those that this classifier had right before; and
`success_of_all` is what TransferAttack calls success, misclassified images among all. Shares have 95 % Wilson
intervals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
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
# the last, which is what is fooled without any attack, stands in comparisons alone
OF_RECONSTRUCTION = ("accuracy_reconstructed", "success_of_attack_alone", "success_of_reconstruction")
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
    predictions, kept = np.zeros(len(images), PREDICTION), []
    labels = labels.reshape(len(labels), -1)
    for start in range(0, len(images), batch):
        some = slice(start, start + batch)
        logits = classifier(to_tensor(images[some]).to(device)).cpu()
        probabilities, predicted = head.probabilities(logits), logits.argmax(-1)
        classes = marked(torch.as_tensor(labels[some]), logits.shape[-1])
        predictions["label"][some] = predicted
        predictions["confidence"][some] = probabilities.gather(-1, predicted[:, None])[:, 0].double()
        predictions["true_confidence"][some] = head.confidence(probabilities, classes).double()
        goals = torch.full_like(predicted, -1) if targets is None else torch.as_tensor(targets[some])
        of_target = probabilities.gather(-1, goals.clamp(min=0)[:, None])[:, 0]
        predictions["target_confidence"][some] = of_target.double().where(goals >= 0, torch.nan)
        kept.append((logits if head.threshold is not None else logits[:, :0]).float().numpy())
    return predictions, np.concatenate(kept)


def correct(predictions: np.ndarray, labels: np.ndarray, head: Head = SOFTMAX) -> np.ndarray:
    """Whether each prediction is the label, or one of them: `(B,)`."""
    return head.sees(predictions["label"], labels.reshape(len(labels), -1), predictions["true_confidence"])


def at_target(predictions: np.ndarray, targets: np.ndarray, head: Head) -> np.ndarray:
    """Whether each prediction is its target `(B,)`, -1 where there is none: `(B,)`."""
    return (targets >= 0) & head.sees(
        predictions["label"], targets[:, None], predictions["target_confidence"]
    )


def fooled(
    predictions: np.ndarray, labels: np.ndarray, targets: np.ndarray, head: Head = SOFTMAX
) -> np.ndarray:
    """Whether each prediction is the target, or, where there is none, no true label: `(B,)`."""
    at_goal = at_target(predictions, targets, head)
    return np.where(targets >= 0, at_goal, ~correct(predictions, labels, head))


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
    def is_defended(self) -> bool:
        return self.name != self.network

    @property
    def draws(self) -> int:
        """How many draws a random defence was judged by, one by one."""
        return self.predictions.shape[1] - 1

    @property
    def has_reconstructions(self) -> bool:
        return self.predictions.shape[2] > 2

    def counts(self, figure: str, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Which images a rate counts, by its name in FIGURES, and which of these it finds: `(B,)` each."""
        sides = dict(zip(SIDES, self.predictions[:, draw].T))
        everything = np.ones(len(self.labels), bool)
        if figure.startswith("accuracy_"):
            return everything, correct(sides[figure.removeprefix("accuracy_")], self.labels, self.head)
        side = "reconstructed" if figure == "success_of_reconstruction" else "after"
        misled = fooled(sides[side], self.labels, self.targets, self.head)
        if figure == "success_of_all":
            return everything, misled
        counted = self.attackable(sides["before"])
        if figure == "success_of_attack_alone":
            counted &= self.attackable(sides["reconstructed"])
        return counted, counted & misled

    def attackable(self, predictions: np.ndarray) -> np.ndarray:
        """Which are right, so that an attack can fool them: `(B,)`. A sigmoid head can see the target beside
        a true class already, which is not right either.
        """
        return correct(predictions, self.labels, self.head) & ~at_target(predictions, self.targets, self.head)

    @property
    def correct_before(self) -> np.ndarray:
        return self.counts("success")[0]

    @property
    def fooled(self) -> np.ndarray:
        """Right before, and misled by the attack: `(B,)`."""
        return self.counts("success")[1]

    def by_image(self, figure: str, rule: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of a figure of FIGURES, which images it counts by a rule of RULES over the draws, and what it is of
        each of them, a share of the draws or whether it is so; `(B,)` each.
        """
        if rule is None:
            return self.counts(figure)
        if rule == "majority":
            return self.majority.counts(figure)
        each = [self.counts(figure, draw) for draw in range(1, 1 + self.draws)]
        counted, found = map(np.stack, zip(*each))  # (draws, B)
        if rule == "mean":
            return counted.any(0), found.sum(0) / np.maximum(counted.sum(0), 1)
        return counted.any(0), found.all(0) if figure.startswith("accuracy") else found.any(0)

    @cached_property
    def majority(self) -> ClassifierResult:
        """By the class that most draws see; how sure they are together, nobody knows."""
        voted = self.predictions[:, 1:2].copy()
        for place in np.ndindex(len(voted), voted.shape[2]):
            votes = self.predictions["label"][place[0], 1:, place[1]].tolist()
            voted["label"][place[0], 0, place[1]] = Counter(votes).most_common(1)[0][0]
        return replace(self, predictions=voted)

    def rate(self, figure: str, rule: str | None = None) -> Estimate | None:
        """A share by its name in FIGURES; None of reconstructions where there are none."""
        if figure in OF_RECONSTRUCTION and not self.has_reconstructions:
            return None
        counted, values = self.by_image(figure, rule)
        if rule == "mean" and counted.any():
            return replace(mean_over_images(values[counted]), is_share=True)
        return share(values[counted].sum(), counted.sum())

    @property
    def success(self) -> Estimate:
        """Attack success rate: misclassified among those classified correctly before."""
        return self.rate("success")

    @cached_property
    def precisions(self) -> dict[str, np.ndarray]:
        """Of a sigmoid head the average precision of each class by kind of picture, `(classes,)`, NaN for one
        that no image shows; else nothing.
        """
        if self.logits is None:
            return {}
        sides = zip(SIDES, np.moveaxis(self.logits, 1, 0))
        return {side: average_precision(logits, self.labels) for side, logits in sides}

    @property
    def mean_precisions(self) -> dict[str, Estimate]:
        """mAP by kind of picture, as results.json names it: over the classes that some image shows."""
        means = {side: each[~np.isnan(each)] for side, each in self.precisions.items()}
        return {f"mAP_{s}": Estimate(float(m.mean()) if len(m) else math.nan) for s, m in means.items()}

    def figures(self, rule: str | None = None) -> dict[str, Estimate | None]:
        rates = {name: self.rate(name, rule) for name in FIGURES}
        return rates if rule else rates | self.mean_precisions

    def described(self, k: int, class_names: Sequence[str], base: int, draw: int = 0) -> dict[str, dict]:
        """The predictions of the k-th image for results.json by kind of picture; labels count from `base`."""
        found = {}
        for place, (side, prediction) in enumerate(zip(SIDES, self.predictions[k, draw])):
            values = dict(zip(PREDICTION.names, prediction.item()))
            if math.isnan(values["target_confidence"]):
                del values["target_confidence"]
            found[side] = values | {"label": values["label"] + base, "class": class_names[values["label"]]}
            if self.logits is not None:
                found[side]["of_classes"] = self.of_classes(k, place, class_names)
        return found

    def of_classes(self, k: int, side: int, class_names: Sequence[str]) -> list[list]:
        """Of the k-th image the names and probabilities of its target, if it has one, and its true classes,
        the surest first: the first of all is what decides.
        """
        probabilities = self.head.probabilities(torch.from_numpy(self.logits[k, side])).tolist()
        own = self.labels.reshape(len(self.labels), -1)[k]
        classes = sorted(own[own >= 0].tolist(), key=lambda label: -probabilities[label])
        if self.targets[k] >= 0:
            classes.insert(0, int(self.targets[k]))
        return [[class_names[label], probabilities[label]] for label in classes]

    def certified(self) -> dict[str, dict]:
        """What smoothing certifies, of the clean and the adversarial images: how many it abstains on, and the
        median radius of the others.
        """
        found = {}
        for picture, certificates in zip(("clean", "adversarial"), self.certificates.T):
            radii = certificates["radius"][~certificates["abstains"]]
            found[picture] = {
                "abstains": int(certificates["abstains"].sum()),
                "images": len(certificates),
                "median_radius": float(np.median(radii)) if len(radii) else None,
            }
        return found

    def certified_line(self) -> str:
        parts = []
        for picture, found in self.certified().items():
            radius = found["median_radius"]
            others = "" if radius is None else f" and certifies the others at a median radius of {radius:.2f}"
            parts.append(f"abstains on {found['abstains']}/{found['images']} {picture} images{others}")
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
    from scipy.stats import rankdata
    from torchmetrics.functional.classification import binary_average_precision

    found = np.full(logits.shape[1], np.nan)
    for label in np.unique(labels[labels >= 0]):
        true = (labels.reshape(len(logits), -1) == label).any(1)
        # ranks, since the probabilities of sure answers are all one
        scores = torch.from_numpy(rankdata(logits[:, label], "min") / len(logits))
        found[label] = binary_average_precision(scores, torch.from_numpy(true.astype(np.int64)))
    return found
