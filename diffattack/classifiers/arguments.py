"""What an attack is called with as a library, looked at where it comes in.

    attack.classifiers = checked_classifiers(classifier, class_names)
    images, labels, targets, masks = checked_arguments(attack, images, labels, targets, masks)

Whatever cannot be meant is a TypeError or a ValueError that names the argument, what it is, and what is
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffattack.classifiers.defences import undefended
from diffattack.common.frozen import frozen

SIDE, LEAST_SIDE = 32, 96
ROUNDING = 1e-6  # by which a value may be outside [0, 1]


def checked_classifiers(
    classifier: torch.nn.Module | Sequence[torch.nn.Module], class_names: Sequence[str]
) -> list[torch.nn.Module]:
    """The classifiers of an attack, one or several."""
    if isinstance(class_names, str):
        raise TypeError(f"class_names is the text {class_names[:40]!r}; expected a name for each class")
    classifiers = [classifier] if isinstance(classifier, torch.nn.Module) else classifier
    if not isinstance(classifiers, (list, tuple)) or not classifiers:
        raise TypeError(f"classifier is {shown(classifier)}; expected a torch.nn.Module, or a list of them")
    for one in classifiers:
        if not isinstance(one, torch.nn.Module):
            raise TypeError(f"classifier has {shown(one)} in it; expected a list of torch.nn.Module")
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
        if targets.shape[1] > 1:
            raise ValueError(f"targets are {tuple(targets.shape)}; expected one class for each image")
        own = ((targets == labels) & (targets >= 0)).any(1).nonzero().view(-1).tolist()
        if own:
            raise ValueError(f"targets: that of image {own[0]} is its own label; expected another class")
        targets = targets[:, 0]
    if masks is not None:
        expected = (len(images), 1, *images.shape[2:])
        if not isinstance(masks, torch.Tensor) or masks.shape != expected:
            raise ValueError(f"masks are {shown(masks)}; expected a tensor {expected} in [0, 1]")
        check_range("masks", masks)
    for classifier in attack.classifiers:
        check_logits(undefended(classifier), images[:1].to(attack.device, attack.dtype), classes)
    return images, labels, targets, masks


def checked_images(images: torch.Tensor) -> torch.Tensor:
    """Images without a graph, what rounding left outside [0, 1] put inside it."""
    expected = "expected floats (B, 3, H, W) in [0, 1], before any normalisation"
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError(f"images are {shown(images)}; {expected}")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images are {tuple(images.shape)}; {expected}")
    height, width = images.shape[2:]
    if height != width or height % SIDE or height < LEAST_SIDE:
        raise ValueError(
            f"images are {height} x {width}; expected squares whose side is a multiple of {SIDE}, at least "
            f"{LEAST_SIDE}"
        )
    check_range("images", images)
    return images.detach().clamp(0, 1)


def check_range(name: str, values: torch.Tensor) -> None:
    """Raises ValueError for values outside [0, 1]."""
    least, most = values.amin().item(), values.amax().item()
    if not -ROUNDING <= least <= most <= 1 + ROUNDING:  # nor if one is NaN
        raise ValueError(f"{name} go from {least:g} to {most:g}; expected values in [0, 1]")


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
        raise TypeError(f"{name} are {shown(values)}; expected integers (B,) or (B, L)") from None
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"{name} are {rows.dtype}; expected integers (B,) or (B, L)")
    if rows.ndim not in (1, 2) or len(rows) != images:
        raise ValueError(f"{name} are {tuple(rows.shape)} for {images} images; expected (B,) or (B, L)")
    rows = rows.reshape(images, -1).long().cpu().clone()
    for k, row in enumerate(rows.tolist()):
        given = [value for value in row if value != -1]
        outside = [value for value in given if not 0 <= value < classes]
        if outside or not (given or may_be_none):
            what = outside[0] if outside else "none"
            raise ValueError(f"{name}: image {k} has {what}; expected classes from 0 to {classes - 1}")
        if len(set(given)) < len(given):
            raise ValueError(f"{name}: image {k} has a class twice; expected indices of classes, not one-hot")
        rows[k] = torch.tensor(given + [-1] * (len(row) - len(given)))  # those that are there in front
    return rows


def check_logits(classifier: torch.nn.Module, image: torch.Tensor, classes: int) -> None:
    """Raises TypeError or ValueError for a classifier that does not map an image `(1, 3, H, W)` to logits
    `(1, classes)`.
    """
    with torch.no_grad(), frozen(classifier):
        logits = classifier(image)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"classifier returns {shown(logits)}; expected a tensor of logits (B, classes): wrap it in a "
            f"torch.nn.Module that returns that alone"
        )
    if logits.shape != (1, classes):
        raise ValueError(
            f"classifier returns {tuple(logits.shape)} for one image, and class_names has {classes} names; "
            f"expected logits (B, classes) and a name for each of these classes"
        )


def shown(value: object) -> str:
    """What an argument is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"an object of type {type(value).__name__}"
