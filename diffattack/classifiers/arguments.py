"""What an attack is called with as a library, looked at where it comes in.

    attack.classifiers = checked_classifiers(classifier)
    images, labels, targets, masks = checked_arguments(attack, images, labels, targets, masks)

Whatever cannot be meant is a ValueError that names the argument, what it is, and what is expected.
"""

from collections.abc import Sequence

import torch

from diffattack.classifiers.checks import check_logits, shown
from diffattack.classifiers.defences import undefended
from diffattack.common.frozen import frozen

SIDE, LEAST_SIDE = 32, 96
ROUNDING = 1e-6  # by which a value may be outside [0, 1]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require(holds: object, problem: str, expected: str) -> None:
    """Raises ValueError where something does not hold."""
    if not holds:
        raise ValueError(f"{problem}; expected {expected}")


def checked_classifiers(classifier: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The classifiers of an attack, one or several."""
    given = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    fits = given and all(isinstance(one, torch.nn.Module) for one in given)
    require(fits, f"classifier is {', '.join(map(shown, given))}", "a torch.nn.Module, or a list of them")
    return list(given)


def checked_arguments(
    attack: object, images: torch.Tensor, labels: object, targets: object, masks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The arguments of an attack, a DiffAttack or a PixelAttack, as it takes them: images `(B, 3, H, W)` in
    [0, 1], labels `(B, L)`, targets `(B,)`, masks `(B, 1, H, W)`.
    """
    images, classes = checked_images(images), len(attack.class_names)
    labels = checked_classes("labels", labels, len(images), classes)
    require((labels[:, 0] >= 0).all(), "labels: an image has none", "a class for each image")
    if targets is not None:
        targets = checked_classes("targets", targets, len(images), classes)
        require(targets.shape[1] == 1, f"targets are {tuple(targets.shape)}", "one class for each image")
        own = ((targets == labels) & (targets >= 0)).any()
        require(not own, "targets: one is a label of its image", "another class")
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
        outputs = f"classifier has {logits.shape[1]} outputs, and class_names has {classes} names"
        require(logits.shape[1] == classes, outputs, "a name for each output")
    return images, labels, targets, masks


def checked_images(images: torch.Tensor) -> torch.Tensor:
    """Images without a graph, what rounding left outside [0, 1] put inside it."""
    is_batch = isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim == 4
    side = images.shape[-1] if is_batch and len(images) else 0
    fits = side >= LEAST_SIDE and side % SIDE == 0 and images.shape[1:] == (3, side, side)
    wanted = f"floats (B, 3, S, S) in [0, 1], not normalised, S a multiple of {SIDE} from {LEAST_SIDE} on"
    require(fits, f"images are {shown(images)}", wanted)
    check_range("images", images)
    return images.detach().clamp(0, 1)


def check_range(name: str, values: torch.Tensor) -> None:
    """Raises ValueError for values outside [0, 1]."""
    least, most = values.amin().item(), values.amax().item()
    fits = -ROUNDING <= least <= most <= 1 + ROUNDING  # not if one is NaN
    require(fits, f"{name} go from {least:g} to {most:g}", "values in [0, 1]")


def checked_classes(name: str, values: object, images: int, classes: int) -> torch.Tensor:
    """Labels or targets, `(B,)` or `(B, L)` with -1 for those that an image lacks, as `(B, L)`, those that
    it has in front.
    """
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.tensor(torch.nan)
    fits = rows.dtype in INTEGERS and rows.ndim in (1, 2) and len(rows) == images
    wanted = f"integers ({images},) or ({images}, L), for {images} images"
    require(fits, f"{name} are {shown(values)}", wanted)
    rows = rows.reshape(images, -1).long().cpu()
    rows = rows.gather(1, (rows == -1).int().argsort(dim=1, stable=True))
    ordered = rows.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any()
    fits = rows.min() >= -1 and rows.max() < classes and not twice
    wanted = f"indices of classes from 0 to {classes - 1}, none twice for an image, and no one-hot rows"
    require(fits, f"{name} go from {rows.min()} to {rows.max()}", wanted)
    return rows
