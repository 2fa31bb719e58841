"""What is looked at before an attack: whether the classifiers see in the clean pictures what the labels
say."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.common.errors import InputError, note
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.prediction import check_prediction_type
from diffattack.evaluation.clean_check import CleanAccuracy, clean_accuracy, readings
from diffattack.evaluation.predictions import PREDICTION, predict
from diffattack.runner.setup import Experiment

IMAGES = 200  # that are looked at, evenly out of all
SECONDS = 15  # of all classifiers; what is not looked at by then is left
BATCH = 16


def clean_accuracies(
    experiment: Experiment, items: Sequence[Item], classifiers: Sequence[torch.nn.Module]
) -> list[CleanAccuracy]:
    """Of how many clean pictures each surrogate says a true class, out of the items that are attacked."""
    options, device, head = experiment.options, experiment.device, experiment.options.classifier_head
    chosen = [items[k * len(items) // IMAGES] for k in range(IMAGES)] if len(items) > IMAGES else list(items)
    predicted: list[list[np.ndarray]] = [[np.zeros(0, PREDICTION)] for _ in classifiers]
    looked_at: list[int] = []
    started = time.monotonic()
    for start in range(0, len(chosen), BATCH):
        pictures, batch = [], []
        for item in chosen[start : start + BATCH]:
            try:
                pictures.append(read_image(item.path, options.res))
                batch.append(item)
            except OSError:
                continue  # said where it is attacked
        if not batch:
            continue
        labels, _ = labels_and_targets(batch)
        for answers, classifier in zip(predicted, classifiers):
            answers.append(predict(classifier, np.stack(pictures), labels, device, head=head)[0])
        looked_at += [item.index for item in batch]
        if time.monotonic() - started > SECONDS:
            break
    base, classes = options.label_base, len(experiment.class_names)
    others = readings(experiment.items, experiment.class_names, options.images_root, options.label_path, base)
    labels = [item.labels for item in experiment.items]
    return [
        clean_accuracy(name, np.concatenate(answers), looked_at, labels, others, classes, head)
        for name, answers in zip(options.model_name, predicted)
    ]


def look_at_clean_images(
    experiment: Experiment, attack: DiffAttack | PixelAttack, items: Sequence[Item]
) -> None:
    """Looks before the attack whether labels are those of the images, and whether the diffusion model is read
    as it was trained.

    Raises:
        InputError: they are not, or it is not.
    """
    check_labels(clean_accuracies(experiment, items, attack.classifiers), experiment.options.trust_labels)
    check_diffusion_model(experiment, attack, items)


def check_diffusion_model(
    experiment: Experiment, attack: DiffAttack | PixelAttack, items: Sequence[Item]
) -> None:
    """Looks by the first image that can be read whether the UNet predicts what its scheduler says.

    Raises:
        InputError: it does not.
    """
    if not isinstance(attack, DiffAttack):
        return
    for item in items[:IMAGES]:
        try:
            picture = read_image(item.path, experiment.options.res)
        except OSError:
            continue
        labels, _ = labels_and_targets([item])
        check_prediction_type(attack.diffusion, to_tensor(picture), torch.from_numpy(labels))
        return


def check_labels(accuracies: Sequence[CleanAccuracy], trusted: bool) -> None:
    """Says what there is to say of the labels.

    Raises:
        InputError: they are wrong, and `trusted` does not say otherwise.
    """
    for accuracy in accuracies:
        if accuracy.is_certain and not trusted:
            raise InputError(
                f"--label_path: {accuracy.doubt}; if they are right all the same, give --trust_labels"
            )
        note(accuracy.doubt or accuracy.described)
