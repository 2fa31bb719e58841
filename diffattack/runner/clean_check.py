"""What is looked at before an attack: whether the classifiers see in the clean pictures what the labels
say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.checks import check_prediction_type
from diffattack.evaluation.clean_check import (
    CleanAccuracy,
    check_labels,
    clean_accuracy,
    predict_clean,
    readings,
)
from diffattack.runner.setup import Experiment


def clean_accuracies(
    experiment: Experiment, items: Sequence[Item], classifiers: Sequence[torch.nn.Module]
) -> list[CleanAccuracy]:
    """Of how many clean pictures each surrogate predicts a true class, out of the items that are attacked."""
    options, names, head = experiment.options, experiment.class_names, experiment.options.classifier_head
    predictions, indices = predict_clean(items, classifiers, options.res, experiment.device, head)
    others = readings(experiment.items, names, options.images_root, options.label_path, options.label_base)
    labels = [item.labels for item in experiment.items]
    return [
        clean_accuracy(name, predicted, indices, labels, others, len(names), head)
        for name, predicted in zip(options.model_name, predictions)
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
    for item in items:
        try:
            picture = read_image(item.path, experiment.options.res)
        except OSError:
            continue
        labels, _ = labels_and_targets([item])
        check_prediction_type(attack.diffusion, to_tensor(picture), torch.from_numpy(labels))
        return
