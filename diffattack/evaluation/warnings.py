"""When a result is not to be trusted: each check gives lines that say what is wrong and what to do. Whether
labels are those of the images is seen in what classifiers predict of the clean pictures, before these are
attacked for hours: labels that are off have few reasons, each of which is tried (`readings`).
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.common.errors import InputError, note
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, ClassNames
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image, to_tensor
from diffattack.evaluation.predictions import predict

SHOWN = 20  # images that are named in a warning
CORNERS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # (8, 3), of the colours
IMAGES, SECONDS = 200, 15  # at most, evenly out of all, and of all classifiers
MISTAKES = 0.05  # of images at most are taken for the class beside theirs: ImageNet's neighbours are alike
CERTAIN, LIKELY, FEW_CLASSES = 1e-3, 0.05, 5  # the first two are chances of an error
SHIFTS = {"higher": 1, "lower": -1}
KIT = "labels in the order of ImageNet's development kit; give its meta.mat or map_clsloc.txt as --captions"

# ---------------------------------------------------------------- classifiers


@torch.no_grad()
def warnings_about_outputs(
    name: str,
    classifier: torch.nn.Module,
    images: np.ndarray,
    device: torch.device,
    head: Head = SOFTMAX,
) -> list[str]:
    """Outputs that are probabilities or no numbers, and answers that change."""
    x = to_tensor(images[:4]).to(device)
    first, second = classifier(x), classifier(x)
    if not (first.isfinite().all() and second.isfinite().all()):
        return [f"{name} returns numbers that are not finite for some pictures, which cannot be attacked"]
    # of plain colours, too, since few numbers can be from 0 to 1 by chance
    plain = CORNERS.to(x)[:, :, None, None].expand(-1, -1, *x.shape[-2:]).split(1)
    outputs, warnings = itertools.chain([first], map(classifier, plain)), []
    if (first >= 0).all() and torch.allclose(first.sum(-1), torch.ones_like(first[:, 0]), atol=1e-3):
        warnings.append(
            f"{name} returns probabilities; cross-entropy needs logits, and its gradients vanish where they "
            f"saturate: take the softmax off its end"
        )
    elif all(((output >= 0) & (output <= 1)).all() for output in outputs):
        warnings.append(
            f"{name} returns numbers from 0 to 1 alone, as a sigmoid does; the loss needs logits: take the "
            f"sigmoid off its end"
            + (", and give --head sigmoid if an image can show several classes" * (head.threshold is None))
        )
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        warnings.append(
            f"{name} answers differently when asked twice, so that success may be luck: put it into eval "
            f"mode and switch off its randomness"
        )
    return warnings


def has_gradient(
    classifier: torch.nn.Module,
    clean: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    head: Head = SOFTMAX,
) -> bool:
    """Whether the classifier's loss has a gradient at a picture `(H, W, 3)`; labels `(L,)`, -1 for none."""
    x = to_tensor(clean).to(device).requires_grad_()
    classes = torch.as_tensor(labels, device=device).reshape(1, -1)
    loss = head.cross_entropy(classifier(x)[None], classes, torch.full_like(classes[:, 0], -1), 1.0)
    return bool(torch.autograd.grad(loss.sum(), x)[0].any())


def warnings_about_gradients(name: str, has_gradients: Sequence[bool]) -> list[str]:
    """Images at which the classifier's loss has no gradient, so that no attack by gradients can move."""
    return about_some(
        [str(k + 1) for k, has_one in enumerate(has_gradients) if not has_one],
        name + " has a gradient of exactly zero at image {}; that it is not fooled says nothing about its "
        "robustness: look for steps without a gradient, or try --logit_temperature 10 where it is too sure "
        "of itself",
    )


def warnings_about_rounding(rows: Sequence[dict]) -> list[str]:
    """Images that fooled the surrogate as float tensors and no longer do as 8-bit files, by the rows of their
    records.
    """
    return about_some(
        [row["file"] for row in rows if row["fooled_as_tensor"] and not row["fooled"]],
        "success was lost in rounding to 8 bits, and does not count: {}; more --iterations give it a margin",
    )


def about_some(images: Sequence[str], line: str) -> list[str]:
    """A line with the first SHOWN of images in it, and how many more there are; none of no images."""
    shown = ", ".join(images[:SHOWN]) + f" and {len(images) - SHOWN} more" * (len(images) > SHOWN)
    return [line.format(shown)] if images else []


def warnings_about_transfer(surrogates: Sequence[str], transfer: Sequence[str]) -> list[str]:
    """A surrogate that is asked to be a transfer classifier, too."""
    return [
        f"{name} is a surrogate and so left out of the transfer classifiers: take it out of --transfer_models"
        for name in surrogates
        if name in transfer
    ]


# ---------------------------------------------------------------- labels


class CleanAccuracy(NamedTuple):
    """Of how many clean pictures a classifier predicts a true class, and what is doubtful about that."""

    description: str
    doubt: str = ""
    is_certain: bool = False  # that the labels are wrong


def predict_clean(
    items: Sequence[Item], classifiers: Sequence[torch.nn.Module], size: int, device: torch.device, head: Head
) -> tuple[list[np.ndarray], list[int]]:
    """Predictions of the clean pictures, of each by all classifiers `(classifiers,)`, and their indices."""
    predictions, indices = [], []
    count, end = min(IMAGES, len(items)), time.monotonic() + SECONDS
    for item in (items[k * len(items) // count] for k in range(count)):
        if indices and time.monotonic() > end:
            break
        try:
            picture = read_image(item.path, size)[None]
        except OSError:
            continue  # what is wrong with it is reported where it is attacked
        about = (picture, labels_and_targets([item])[0], device, 1, head)
        predictions.append(np.concatenate([predict(classifier, *about) for classifier in classifiers]))
        indices.append(item.index)
    return predictions, indices


def readings(
    items: Sequence[Item], class_names: Sequence[str], images_root: Path, label_path: Path | None, base: int
) -> dict[str, np.ndarray]:
    """What else the labels of images may mean, `(B, L)`, by what to do if they do: numbers one off, in the
    order of ImageNet's development kit, or of names sorted as text (img1, img10, img2).
    """
    labels, classes, kit = labels_and_targets(items)[0], ClassNames.of(class_names), np.array(DEVELOPMENT_KIT)
    others: dict[str, np.ndarray] = {}
    if classes.numbering:  # numbers as they stand in the file
        advice = "labels in the order that classifiers have; leave --captions out"
        others[advice] = np.argsort(classes.numbering)[labels]
    else:
        for word, shift in SHIFTS.items():
            remedy = f"; give --label_base {1 - base}" * (shift == 2 * base - 1)
            others[f"labels one {word}{remedy}"] = labels + shift
        if classes == IMAGENET_CLASSES:
            others[KIT] = kit[(labels + base - 1) % 1000]
            others[f"{KIT}, and add one to each"] = kit[(labels + base) % 1000]
        paths = [item.path.relative_to(images_root) for item in items]
        names = [str(path) if label_path else path.parts[0] for path in paths]  # or the folders of classes
        label_of = dict(zip(names, labels))
        label_of = dict(zip(sorted(label_of), label_of.values()))
        table = "give a table with columns filename,label" if label_path else "call folders as the classes"
        advice = f"labels in the order of names sorted as text (1, 10, 2); {table}"
        others[advice] = np.stack([label_of[name] for name in names])
    others = {advice: np.where(labels < 0, -1, other) for advice, other in others.items()}
    return {advice: other for advice, other in others.items() if (other != labels).any()}


def clean_accuracy(
    name: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    others: Mapping[str, np.ndarray],
    classes: int,
    head: Head = SOFTMAX,
) -> CleanAccuracy:
    """Judges labels `(B, L)` by a classifier's predictions `(B,)` of their images.

    They are wrong where another reading, by its advice in `others`, fits so well that a classifier that is
    given the right ones would hardly ever predict so; or where it is right by chance, as one that is right on
    half of what chance leaves would hardly ever be, and looks trained.
    """
    predicted, images, chance = predictions["label"], len(predictions), 1 / classes
    own, fitting = (predicted[:, None] == labels).any(1), []
    right = int((predictions["true_confidence"] > head.threshold).sum() if head.threshold else own.sum())
    told = f"{name} is right on {right} of {images} clean images"
    for advice, other in others.items():
        theirs, apart = (predicted[:, None] == other).any(1), (other != labels).any(1)
        error = scipy.stats.binom.sf(theirs[apart].sum() - 1, apart.sum(), max(MISTAKES, chance))
        if theirs[apart].sum() > 2 * own[apart].sum() and error < LIKELY:
            fitting.append((theirs.sum(), advice, bool(error < CERTAIN)))
    if fitting:
        count, advice, is_certain = max(fitting, key=lambda reading: reading[0])
        return CleanAccuracy(told, f"{told}, and would be on {count} with {advice}", is_certain)
    # by chance: if the labels were dealt out anew among the images, or of few classes, by guessing
    true = labels[labels >= 0]
    dealt = np.bincount(predicted, minlength=classes)[true].sum() / max(1, images) ** 2
    by_chance = max(chance, dealt if len(np.unique(true)) >= FEW_CLASSES else 0)
    error = scipy.stats.binom.cdf(right, images, (1 + chance) / 2)
    # what chance is for a sigmoid head, nobody knows
    if error >= LIKELY or head.threshold or scipy.stats.binom.sf(right - 1, images, by_chance) <= 0.01:
        return CleanAccuracy(told)
    # predictions of random weights are not sure of themselves, or do not vary
    sure = (predictions["confidence"].mean() - chance) / (1 - chance)
    is_trained = bool(sure > 0.2 and len(np.unique(predicted)) >= min(3, classes))
    doubt = (
        f"{told}, as by chance: the labels are not those of the images, or the class names not in its "
        f"order{'' if is_trained else ', or it is not trained'}"
    )
    return CleanAccuracy(told, doubt, bool(error < CERTAIN and is_trained))


def check_labels(accuracies: Sequence[CleanAccuracy], trusted: bool) -> None:
    """Notes what there is to say of the labels; raises InputError where they are wrong, unless `trusted`."""
    for accuracy in accuracies:
        if accuracy.is_certain and not trusted:
            raise InputError(f"{accuracy.doubt}; if the labels are right all the same, give --trust_labels")
        note(accuracy.doubt or accuracy.description)
