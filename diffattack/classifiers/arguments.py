"""What an attack is called with as a library, looked at where it comes in.

    attack.classifiers = checked_classifiers(classifier, class_names)
    images, labels, targets, masks = checked_arguments(attack, images, labels, targets, masks)

Whatever cannot be meant is a TypeError or a ValueError that names the argument, what it is, and what is
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffattack.classifiers.checks import check_logits, shown
from diffattack.classifiers.defences import undefended
from diffattack.common.frozen import frozen

SIDE, LEAST_SIDE = 32, 96
ROUNDING = 1e-6  # by which a value may be outside [0, 1]


def require(holds: bool, problem: str, expected: str, error: type[Exception] = ValueError) -> None:
    """Raises an error where something does not hold."""
    if not holds:
        raise error(f"{problem}; expected {expected}")


def checked_classifiers(
    classifier: torch.nn.Module | Sequence[torch.nn.Module], class_names: Sequence[str]
) -> list[torch.nn.Module]:
    """The classifiers of an attack, one or several."""
    told = f"class_names is the text {class_names!r:.40}"
    require(not isinstance(class_names, str), told, "a name for each class", TypeError)
    classifiers = [classifier] if isinstance(classifier, torch.nn.Module) else classifier
    wanted = "a torch.nn.Module, or a list of them"
    is_list = isinstance(classifiers, (list, tuple)) and len(classifiers) > 0
    require(is_list, f"classifier is {shown(classifiers)}", wanted, TypeError)
    for one in classifiers:
        require(isinstance(one, torch.nn.Module), f"classifier has {shown(one)} in it", wanted, TypeError)
    return list(classifiers)


def checked_arguments(
    attack: object, images: torch.Tensor, labels: object, targets: object, masks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The arguments of an attack, a DiffAttack or a PixelAttack, as it takes them: images `(B, 3, H, W)` in
    [0, 1], labels `(B, L)`, targets `(B,)`, masks `(B, 1, H, W)`.
    """
    images, classes = checked_images(images), len(attack.class_names)
    labels = checked_classes("labels", labels, len(images), classes)
    if targets is not None:
        targets = checked_classes("targets", targets, len(images), classes, may_be_none=True)
        require(targets.shape[1] == 1, f"targets are {tuple(targets.shape)}", "one class for each image")
        own = ((targets == labels) & (targets >= 0)).any(1).nonzero().view(-1).tolist()
        require(not own, f"targets: that of image {own[:1]} is its own label", "another class")
        targets = targets[:, 0]
    if masks is not None:
        expected = (len(images), 1, *images.shape[2:])
        is_mask = isinstance(masks, torch.Tensor) and masks.shape == expected
        require(is_mask, f"masks are {shown(masks)}", f"a tensor {expected} in [0, 1]")
        check_range("masks", masks)
    for network in map(undefended, attack.classifiers):
        with torch.no_grad(), frozen(network):
            logits = network(images[:1].to(attack.device, attack.dtype))
        check_logits("classifier", logits, 1)
        told = f"classifier has {logits.shape[1]} outputs, and class_names has {classes} names"
        require(logits.shape[1] == classes, told, "a name for each output")
    return images, labels, targets, masks


def checked_images(images: torch.Tensor) -> torch.Tensor:
    """Images without a graph, what rounding left outside [0, 1] put inside it."""
    is_float = isinstance(images, torch.Tensor) and images.is_floating_point()
    fits = is_float and images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
    require(fits, f"images are {shown(images)}", "floats (B, 3, H, W) in [0, 1], before any normalisation")
    height, width = images.shape[2:]
    fits = height == width and height % SIDE == 0 and height >= LEAST_SIDE
    wanted = f"squares whose side is a multiple of {SIDE}, at least {LEAST_SIDE}"
    require(fits, f"images are {height} x {width}", wanted)
    check_range("images", images)
    return images.detach().clamp(0, 1)


def check_range(name: str, values: torch.Tensor) -> None:
    """Raises ValueError for values outside [0, 1]."""
    least, most = values.amin().item(), values.amax().item()
    fits = -ROUNDING <= least <= most <= 1 + ROUNDING  # not if one is NaN
    require(fits, f"{name} go from {least:g} to {most:g}", "values in [0, 1]")


def checked_classes(
    name: str, values: object, images: int, classes: int, may_be_none: bool = False
) -> torch.Tensor:
    """Labels or targets, `(B,)` or `(B, L)` with -1 for those that an image lacks, as `(B, L)`.

    Args:
        may_be_none: an image may have none at all.
    """
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.tensor(torch.nan)
    is_integer = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    require(is_integer, f"{name} are {shown(values)}", "integers (B,) or (B, L)", TypeError)
    fits = rows.ndim in (1, 2) and len(rows) == images
    require(fits, f"{name} are {tuple(rows.shape)} for {images} images", "integers (B,) or (B, L)")
    rows = rows.reshape(images, -1).long().cpu().clone()
    for k, row in enumerate(rows.tolist()):
        given, who = [value for value in row if value != -1], f"{name}: image {k} has"
        require(given or may_be_none, f"{who} none", "a class")
        outside = [value for value in given if not 0 <= value < classes]
        require(not outside, f"{who} {outside[:1]}", f"classes from 0 to {classes - 1}")
        require(len(set(given)) == len(given), f"{who} a class twice", "indices of classes, not one-hot")
        rows[k] = torch.tensor(given + [-1] * (len(row) - len(given)))  # those that are there in front
    return rows
