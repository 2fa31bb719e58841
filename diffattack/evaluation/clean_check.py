"""Whether labels are those of the images: what classifiers predict of the clean pictures, before they are
attacked for hours, and where they are judged.

Labels that are off have one of few reasons, each of which is tried: they count from elsewhere, they are in
the order of names sorted otherwise, or in that of ImageNet's development kit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from natsort import natsorted, ns

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.common.errors import InputError, note
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, ClassNames
from diffattack.data.dataset import Item, class_folders, labels_and_targets
from diffattack.data.images import read_image
from diffattack.evaluation.predictions import PREDICTION, predict

IMAGES = 200  # that are classified, evenly out of all
SECONDS = 15  # of all classifiers; what is not classified by then is left
# A classifier that mistakes an image for the class beside it does so in so many of them at most: ImageNet's
# neighbours are alike.
MISTAKES = 0.05
FEW_CLASSES = 5
CERTAIN, LIKELY = 1e-3, 0.05  # chances of an error
SHIFTS = {"higher": 1, "lower": -1}
# ways in which other tools sort names
ORDERS = {
    "as text (img1, img10, img2)": sorted,
    "as text whatever their case": lambda names: sorted(names, key=str.lower),
    "naturally whatever their case": lambda names: natsorted(names, alg=ns.IGNORECASE),
}

Labels = Sequence[tuple[int, ...]]  # of all images


class CleanAccuracy(NamedTuple):
    """Of how many clean pictures a classifier predicts a true class, and what is doubtful about that."""

    description: str
    right: int
    images: int
    doubt: str = ""
    is_certain: bool = False  # that the labels are wrong


def predict_clean(
    items: Sequence[Item],
    classifiers: Sequence[torch.nn.Module],
    size: int,
    device: torch.device,
    head: Head,
) -> tuple[list[np.ndarray], list[int]]:
    """Predictions `(B,)` of the clean pictures by classifier, and the pictures' indices."""
    predictions, indices = [[np.zeros(0, PREDICTION)] for _ in classifiers], []
    count, started = min(IMAGES, len(items)), time.monotonic()
    for item in (items[k * len(items) // count] for k in range(count)):
        try:
            picture = read_image(item.path, size)
        except OSError:
            continue  # what is wrong with it is reported where it is attacked
        labels, _ = labels_and_targets([item])
        for found, classifier in zip(predictions, classifiers):
            found.append(predict(classifier, picture[None], labels, device, head=head)[0])
        indices.append(item.index)
        if time.monotonic() - started > SECONDS:
            break
    return [np.concatenate(found) for found in predictions], indices


def readings(
    items: Sequence[Item], class_names: Sequence[str], images_root: Path, label_path: Path | None, base: int
) -> dict[str, Labels]:
    """What else the labels of images may mean, by what to do if they do."""
    labels, classes = [item.labels for item in items], ClassNames.of(class_names)
    if classes.numbering:  # numbers as they stand in the file
        advice = "labels in the order that classifiers have; leave --captions out"
        return {advice: [tuple(classes.numbering.index(label) for label in each) for each in labels]}
    found = {}
    for word, shift in SHIFTS.items():
        remedy = f"; give --label_base {1 - base}" if shift == 2 * base - 1 else ""
        found[f"labels one {word}{remedy}"] = shifted(labels, shift)
    if classes == IMAGENET_CLASSES:
        advice = "labels in the order of ImageNet's development kit; give its meta.mat or map_clsloc.txt as "
        kit = [tuple(DEVELOPMENT_KIT[label + base - 1] for label in each) for each in labels]
        found[advice + "--captions"] = kit
    if label_path is not None:
        names = [str(item.path.relative_to(images_root)) for item in items]
        for order, ordered in ORDERS.items():
            label_of = dict(zip(ordered(names), labels))
            advice = f"labels in the order of names sorted {order}; give a table with columns filename,label"
            found[advice] = [label_of[name] for name in names]
    elif items[0].path.parent != images_root:
        folders = [path.name for path in class_folders(images_root)]
        for order, ordered in ORDERS.items() if len(folders) == len(classes) else ():
            place = {name: k for k, name in enumerate(ordered(folders))}
            advice = f"the places of folders sorted {order}; call them as the classes are called"
            found[advice] = [(place[item.path.parent.name],) for item in items]
    return {advice: other for advice, other in found.items() if other != labels}


def shifted(labels: Labels, shift: int) -> Labels:
    return [tuple(label + shift for label in each) for each in labels]


def clean_accuracy(
    name: str,
    predictions: np.ndarray,
    indices: Sequence[int],
    labels: Labels,
    others: Mapping[str, Labels],
    classes: int,
    head: Head = SOFTMAX,
) -> CleanAccuracy:
    """Judges labels by a classifier's predictions, by which class each has the largest logit of.

    Labels are taken for wrong where another reading fits so well that a classifier which is given the right
    ones would hardly ever predict so (see `best_reading`); or where it is right no more often than by chance,
    one that is right on half of what chance leaves would hardly ever be so wrong, and it does not look like
    one that was never trained. What chance is for a sigmoid head, nobody knows.

    Args:
        predictions: of the images at the places `indices`, `(B,)`.
        labels, others: of all images; others by what to do if they are meant.
    """
    from scipy.stats import binom

    predicted, images, chance = predictions["label"].tolist(), len(predictions), 1 / classes
    right = sum(label in labels[k] for label, k in zip(predicted, indices))
    if head.threshold is not None:
        right = int((predictions["true_confidence"] > head.threshold).sum())
    description = f"{name} is right on {right} of {images} clean images"
    if best := best_reading(predicted, indices, labels, others, chance):
        fitting, error, advice = best
        doubt = f"{description}, and would be on {fitting} with {advice}"
        return CleanAccuracy(description, right, images, doubt, error < CERTAIN)
    is_chance = binom.sf(right - 1, images, chance_of_a_hit(predicted, indices, labels, classes)) > 0.01
    error = binom.cdf(right, images, (1 + chance) / 2)
    if not is_chance or error >= LIKELY or head.threshold is not None:
        return CleanAccuracy(description, right, images)
    # predictions of random weights are not sure of themselves, or do not vary
    sure = (float(predictions["confidence"].mean()) - chance) / (1 - chance)
    is_trained = sure > 0.2 and len(set(predicted)) >= min(3, classes)
    doubt = (
        f"{description}, as by chance: the labels are not those of the images, or its classes are not in the "
        f"order of --captions{'' if is_trained else ', or it is not trained'}; look at a few images beside "
        f"their labels"
    )
    return CleanAccuracy(description, right, images, doubt, bool(error < CERTAIN and is_trained))


def best_reading(
    predicted: Sequence[int],
    indices: Sequence[int],
    labels: Labels,
    others: Mapping[str, Labels],
    chance: float,
) -> tuple[int, float, str] | None:
    """The reading that fits most images, of those that fit far more than the labels do where the two differ:
    on how many images, how likely a classifier would predict so that is given the right labels (it mistakes
    images for the class beside theirs in `MISTAKES` of them, or by chance), and what to do.
    """
    from scipy.stats import binom

    found = []
    for advice, other in others.items():
        apart = [(label, k) for label, k in zip(predicted, indices) if other[k] != labels[k]]
        fitting = sum(label in other[k] for label, k in apart)
        kept = sum(label in labels[k] for label, k in apart)
        error = float(binom.sf(fitting - 1, len(apart), max(MISTAKES, chance)))
        if fitting > 2 * kept and error < LIKELY:
            total = sum(label in other[k] for label, k in zip(predicted, indices))
            found.append((total, error, advice))
    return max(found, key=lambda reading: reading[0], default=None)


def chance_of_a_hit(predicted: Sequence[int], indices: Sequence[int], labels: Labels, classes: int) -> float:
    """How often a prediction would be an image's label if the labels were dealt out anew among the images; of
    images of few classes, where that says little, how often it would be by guessing.
    """
    counts, true = Counter(predicted), Counter(label for k in indices for label in set(labels[k]))
    if len(true) < FEW_CLASSES:
        return 1 / classes
    dealt = sum(counts[label] * count for label, count in true.items()) / len(indices) ** 2
    return max(1 / classes, dealt)


def check_labels(accuracies: Sequence[CleanAccuracy], trusted: bool) -> None:
    """Notes what there is to say of the labels.

    Raises:
        InputError: they are wrong, and `trusted` does not say otherwise.
    """
    for accuracy in accuracies:
        if accuracy.is_certain and not trusted:
            raise InputError(
                f"--label_path: {accuracy.doubt}; if they are right all the same, give --trust_labels"
            )
        note(accuracy.doubt or accuracy.description)
