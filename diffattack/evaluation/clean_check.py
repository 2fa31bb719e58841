"""Whether labels are those of the images, by what classifiers predict of the clean pictures, before they are
attacked for hours. Labels that are off have few reasons, each of which is tried (`readings`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.common.errors import InputError, note
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, ClassNames
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image
from diffattack.evaluation.predictions import PREDICTION, predict

IMAGES, SECONDS = 200, 15  # at most, evenly out of all, and of all classifiers
MISTAKES = 0.05  # of images at most are taken for the class beside theirs: ImageNet's neighbours are alike
CERTAIN, LIKELY, FEW_CLASSES = 1e-3, 0.05, 5  # the first two are chances of an error
SHIFTS = {"higher": 1, "lower": -1}

Labels = Sequence[tuple[int, ...]]  # of all images


class CleanAccuracy(NamedTuple):
    """Of how many clean pictures a classifier predicts a true class, and what is doubtful about that."""

    description: str
    right: int
    images: int
    doubt: str = ""
    is_certain: bool = False  # that the labels are wrong


def predict_clean(
    items: Sequence[Item], classifiers: Sequence[torch.nn.Module], size: int, device: torch.device, head: Head
) -> tuple[list[np.ndarray], list[int]]:
    """Predictions `(B,)` of the clean pictures by classifier, and the pictures' indices."""
    predictions, indices = [[np.zeros(0, PREDICTION)] for _ in classifiers], []
    count, started = min(IMAGES, len(items)), time.monotonic()
    for item in (items[k * len(items) // count] for k in range(count)):
        if indices and time.monotonic() - started > SECONDS:
            break
        try:
            picture = read_image(item.path, size)
        except OSError:
            continue  # what is wrong with it is reported where it is attacked
        labels, _ = labels_and_targets([item])
        for found, classifier in zip(predictions, classifiers):
            found.append(predict(classifier, picture[None], labels, device, head=head)[0])
        indices.append(item.index)
    return [np.concatenate(found) for found in predictions], indices


def readings(
    items: Sequence[Item], class_names: Sequence[str], images_root: Path, label_path: Path | None, base: int
) -> dict[str, Labels]:
    """What else the labels of images may mean, by what to do if they do: numbers one off, in the order of
    ImageNet's development kit, or of names sorted as text (img1, img10, img2).
    """
    labels, classes, found = [item.labels for item in items], ClassNames.of(class_names), {}
    if classes.numbering:  # numbers as they stand in the file
        advice = "labels in the order that classifiers have; leave --captions out"
        return {advice: [tuple(map(classes.numbering.index, each)) for each in labels]}
    for word, shift in SHIFTS.items():
        remedy = f"; give --label_base {1 - base}" if shift == 2 * base - 1 else ""
        found[f"labels one {word}{remedy}"] = shifted(labels, shift)
    kit = "labels in the order of ImageNet's development kit; give its meta.mat or map_clsloc.txt as "
    for remedy, start in {"": 1, ", and add one to each": 0}.items() if classes == IMAGENET_CLASSES else ():
        other = [tuple(DEVELOPMENT_KIT[(k + base - start) % 1000] for k in each) for each in labels]
        found[f"{kit}--captions{remedy}"] = other
    paths = [item.path.relative_to(images_root) for item in items]
    names = [str(path) if label_path else path.parts[0] for path in paths]  # or the folders of classes
    label_of = dict(zip(names, labels))
    label_of = dict(zip(sorted(label_of), label_of.values()))
    table = "give a table with columns filename,label" if label_path else "call folders as the classes"
    advice = f"labels in the order of names sorted as text (1, 10, 2); {table}"
    found[advice] = [label_of[name] for name in names]
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
    """Judges labels, of all images, by a classifier's predictions `(B,)` of those at the places `indices`.

    They are wrong where another reading, by its advice in `others`, fits so well that a classifier that is
    given the right ones would hardly ever predict so; or where it is right by chance, as one that is right on
    half of what chance leaves would hardly ever be, and looks trained.
    """
    from scipy.stats import binom

    def hits(labels: Labels) -> np.ndarray:
        return np.array([label in labels[k] for label, k in zip(predicted, indices)], bool)

    predicted, images, chance = predictions["label"].tolist(), len(predictions), 1 / classes
    own, found = hits(labels), []
    right = int((predictions["true_confidence"] > head.threshold).sum()) if head.threshold else int(own.sum())
    accuracy = CleanAccuracy(f"{name} is right on {right} of {images} clean images", right, images)
    for advice, other in others.items():
        theirs, apart = hits(other), [other[k] != labels[k] for k in indices]
        error = float(binom.sf(theirs[apart].sum() - 1, sum(apart), max(MISTAKES, chance)))
        if theirs[apart].sum() > 2 * own[apart].sum() and error < LIKELY:
            found.append((theirs.sum(), f"would be on {theirs.sum()} with {advice}", error < CERTAIN))
    if found:
        _, doubt, is_certain = max(found, key=lambda reading: reading[0])
        return accuracy._replace(doubt=f"{accuracy.description}, and {doubt}", is_certain=is_certain)
    # by chance: if the labels were dealt out anew among the images, or of few classes, by guessing
    counts, true = Counter(predicted), Counter(label for k in indices for label in labels[k])
    dealt = sum(counts[label] * count for label, count in true.items()) / max(1, images) ** 2
    by_chance = max(chance, dealt if len(true) >= FEW_CLASSES else 0)
    error = binom.cdf(right, images, (1 + chance) / 2)
    # what chance is for a sigmoid head, nobody knows
    if error >= LIKELY or head.threshold or binom.sf(right - 1, images, by_chance) <= 0.01:
        return accuracy
    # predictions of random weights are not sure of themselves, or do not vary
    sure = (float(predictions["confidence"].mean()) - chance) / (1 - chance)
    is_trained = sure > 0.2 and len(set(predicted)) >= min(3, classes)
    doubt = (
        f"{accuracy.description}, as by chance: the labels are not those of the images, or the class names "
        f"not in its order{'' if is_trained else ', or it is not trained'}"
    )
    return accuracy._replace(doubt=doubt, is_certain=bool(error < CERTAIN and is_trained))


def check_labels(accuracies: Sequence[CleanAccuracy], trusted: bool) -> None:
    """Notes what there is to say of the labels; raises InputError where they are wrong, unless `trusted`."""
    for accuracy in accuracies:
        if accuracy.is_certain and not trusted:
            raise InputError(f"{accuracy.doubt}; if the labels are right all the same, give --trust_labels")
        note(accuracy.doubt or accuracy.description)
