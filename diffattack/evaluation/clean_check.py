"""Whether labels are those of the images: what a classifier says of the clean pictures, before they are
attacked for hours.

Labels that are off have one of few reasons, each of which is tried: they count from elsewhere, they are in
the order of names sorted otherwise, or in that of ImageNet's development kit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted, ns

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, ClassNames
from diffattack.data.dataset import Item, class_folders

# A classifier that mistakes an image for the class beside it does so in so many of them at most: ImageNet's
# neighbours are alike.
MISTAKES = 0.05
FEW_CLASSES = 5
CERTAIN, LIKELY = 1e-3, 0.05  # chances of an error


@dataclass(frozen=True)
class Reading:
    """Other labels that may be meant, and what to do if they are."""

    labels: Sequence[tuple[int, ...]]  # of all images
    advice: str


def readings(
    items: Sequence[Item], class_names: Sequence[str], images_root: Path, label_path: Path | None, base: int
) -> list[Reading]:
    """What else the labels of images may mean."""
    labels, classes = [item.labels for item in items], ClassNames.of(class_names)
    numbering = classes.numbering
    if numbering:  # numbers as they stand in the file
        number = {place: k for k, place in enumerate(numbering)}
        as_numbers = [tuple(number[label] for label in each) for each in labels]
        return [Reading(as_numbers, "labels in the order that classifiers have; leave --captions out")]
    found = [
        Reading(
            [tuple(label + shift for label in each) for each in labels],
            f"labels one {'higher' if shift > 0 else 'lower'}"
            + (f"; give --label_base {1 - base}" if shift == 2 * base - 1 else ""),
        )
        for shift in (1, -1)
    ]
    if classes == IMAGENET_CLASSES:
        kit = [tuple(DEVELOPMENT_KIT[label + base - 1] for label in each) for each in labels]
        found.append(
            Reading(
                kit,
                "labels in the order of ImageNet's development kit; give its meta.mat or map_clsloc.txt as "
                "--captions",
            )
        )
    table = "give a table with columns filename,label"
    for how, ordered in orders():
        if label_path is not None:
            names = ordered([str(item.path.relative_to(images_root)) for item in items])
            place = {name: k for k, name in enumerate(names)}
            sorted_labels = [labels[place[str(item.path.relative_to(images_root))]] for item in items]
            found.append(Reading(sorted_labels, f"labels in the order of names sorted {how}; {table}"))
        elif items[0].path.parent != images_root:
            folders = [path.name for path in class_folders(images_root)]
            if len(folders) == len(classes):
                place = {name: k for k, name in enumerate(ordered(folders))}
                by_folder = [(place[item.path.parent.name],) for item in items]
                advice = f"the places of folders sorted {how}; call them as the classes are called"
                found.append(Reading(by_folder, advice))
    return [reading for reading in found if list(reading.labels) != labels]


def orders() -> list[tuple[str, Callable[[list[str]], list[str]]]]:
    """Ways in which other tools sort names."""
    return [
        ("as text (img1, img10, img2)", sorted),
        ("as text whatever their case", lambda names: sorted(names, key=str.lower)),
        ("naturally whatever their case", lambda names: natsorted(names, alg=ns.IGNORECASE)),
    ]


@dataclass(frozen=True)
class CleanAccuracy:
    """Of how many clean pictures a classifier says a true class, and what there is to say about that."""

    name: str
    right: int
    images: int
    doubt: str = ""
    is_certain: bool = False  # that the labels are wrong

    @property
    def described(self) -> str:
        return f"{self.name} is right on {self.right} of {self.images} clean images"


def clean_accuracy(
    name: str,
    predictions: np.ndarray,
    chosen: Sequence[int],
    labels: Sequence[tuple[int, ...]],
    others: Sequence[Reading],
    classes: int,
    head: Head = SOFTMAX,
) -> CleanAccuracy:
    """Judges labels by a classifier's answers, by which class each has the largest logit of.

    Labels are taken for wrong where another reading fits so well that a classifier which is given the right
    ones would hardly ever answer so (it mistakes images for the class beside theirs in `MISTAKES` of them, or
    by chance); or where it is right no more often than by chance, one that is right on half of what chance
    leaves would hardly ever be so wrong, and it does not look like one that was never trained. What chance is
    for a sigmoid head, nobody knows.

    Args:
        predictions: what it says of the images at the places `chosen`.
        labels, others: of all images.
    """
    from scipy.stats import binom

    predicted = predictions["label"]
    hits = sum(answer in labels[k] for answer, k in zip(predicted, chosen))
    sure = predictions["true_confidence"]
    right = hits if head.threshold is None else int((sure > head.threshold).sum())
    images = len(predicted)
    found = CleanAccuracy(name, right, images)
    best: tuple[int, float, Reading] | None = None
    for other in others:
        apart = [(answer, k) for answer, k in zip(predicted, chosen) if other.labels[k] != labels[k]]
        fitting = sum(answer in other.labels[k] for answer, k in apart)
        kept = sum(answer in labels[k] for answer, k in apart)
        total = hits - kept + fitting
        chance = float(binom.sf(fitting - 1, len(apart), max(MISTAKES, 1 / classes)))
        if fitting > 2 * kept and chance < LIKELY and (best is None or total > best[0]):
            best = total, chance, other
    if best:
        total, chance, other = best
        text = f"{found.described}, and would be on {total} with {other.advice}"
        return CleanAccuracy(name, right, images, text, chance < CERTAIN)
    guessing = float(binom.sf(right - 1, images, chance_of_a_hit(predicted, chosen, labels, classes))) > 0.01
    too_few = float(binom.cdf(right, images, (1 + 1 / classes) / 2))
    if guessing and too_few < LIKELY and head.threshold is None:
        untrained = "" if is_trained(predictions, classes) else ", or it is not trained"
        text = (
            f"{found.described}, as by chance: the labels are not those of the images, or its classes are "
            f"not in the order of --captions{untrained}; look at a few images beside their labels"
        )
        is_certain = too_few < CERTAIN and is_trained(predictions, classes)
        return CleanAccuracy(name, right, images, text, is_certain)
    return found


def chance_of_a_hit(
    predicted: np.ndarray, chosen: Sequence[int], labels: Sequence[tuple[int, ...]], classes: int
) -> float:
    """How often an answer would be an image's label if the labels were dealt out anew among the images; of
    images of few classes, where that says little, how often it would be by guessing.
    """
    said, true = Counter(predicted.tolist()), Counter(label for k in chosen for label in set(labels[k]))
    dealt = sum(said[label] * count for label, count in true.items()) / len(chosen) ** 2
    return max(1 / classes, dealt) if len(true) >= FEW_CLASSES else 1 / classes


def is_trained(predictions: np.ndarray, classes: int) -> bool:
    """Whether a classifier's answers are sure of themselves and vary, as those of random weights do not."""
    sure = (float(predictions["confidence"].mean()) - 1 / classes) / (1 - 1 / classes)
    return sure > 0.2 and len(set(predictions["label"].tolist())) >= min(3, classes)
