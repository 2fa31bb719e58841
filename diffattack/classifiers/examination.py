"""Tries a classifier before it is used, on two pictures that nobody took: whether it takes them, gives logits
and a gradient, and says of each what it would say of it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffattack.common.errors import ClassifierError, one_line

# Largest differences, of the largest logit, that are arithmetic's: between batches of as many images, which
# are computed alike, and of other sizes; in half precision.
SAME_SIZE, OTHER_SIZE, HALF = 1e-3, 1e-2, 5e-2
MANY = 1000  # images at once, which no run has
FAR = 50  # a logit so far below the largest has no probability, such as that of a class that is masked
# batches in which each image stands in several places, the dark one first, and which are larger than two
ORDER = (1, 0, 1, 1, 0)


class InPrecision(torch.nn.Module):
    """A classifier in half precision or float64, as one that takes and returns float32."""

    def __init__(self, classifier: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.classifier, self.dtype = classifier, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images.to(self.dtype)).float()


class OneByOne(torch.nn.Module):
    """A classifier of one image, as one of any number of them."""

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.classifier(image) for image in images.split(1)])


@dataclass(frozen=True)
class Examined:
    """A classifier that can be used."""

    classifier: torch.nn.Module  # of any number of images, in and out in float32
    outputs: int
    is_steady: bool  # whether it answers the same when it is asked again
    precision: torch.dtype  # of its weights


def fixed_images(side: int) -> torch.Tensor:
    """Two images `(2, 3, side, side)` in [0, 1], always the same: noise, and a smooth dark one, so that what
    normalises over a batch is moved by the second.
    """
    random = torch.Generator().manual_seed(0)
    noise, coarse = torch.rand(1, 3, side, side, generator=random), torch.rand(1, 3, 4, 4, generator=random)
    smooth = F.interpolate(0.4 * coarse, (side, side), mode="bilinear", align_corners=False)
    return torch.cat([noise, smooth])


def answer(classifier: torch.nn.Module, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Logits, with what the network draws of torch's random numbers always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return classifier(images)


def comparable(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(B, classes)` as numbers `(B, 2 classes)` that tell what an answer is: below the largest, which
    is what a softmax takes of them, and as they are, which a sigmoid does; either no further than `FAR`, so
    that neither a masked class nor what is added to all of them hides the others.
    """
    below = logits - logits.amax(-1, keepdim=True)
    return torch.cat([below.clamp(min=-FAR), logits.clamp(-FAR, FAR)], -1)


def examine(name: str, classifier: torch.nn.Module, side: int, attacked: bool) -> Examined:
    """Runs a classifier on two images, forwards and, where it is attacked, backwards; makes of one that needs
    another precision, or one image at a time, one that does not; and counts its outputs.

    Raises:
        ClassifierError: it fails, returns something else than finite logits, has no gradient, or its answer
            depends on the other images of a batch.
    """
    dtypes = {parameter.dtype for parameter in classifier.parameters() if parameter.is_floating_point()}
    precision = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if precision != torch.float32:
        classifier = InPrecision(classifier, precision)
    images = fixed_images(side).requires_grad_(attacked)
    try:
        outputs = answer(classifier, images)
    except Exception as error:  # networks raise whatever their code makes them
        try:
            answer(classifier, images[:1].detach())
        except Exception:
            count = only_batch(classifier, images.detach())
            if count:
                raise ClassifierError(
                    f"classifier {name!r} takes {count} images at once and no other number; export it again "
                    f"with a batch of any size, by dynamic_shapes"
                ) from None
            raise ClassifierError(
                f"classifier {name!r} fails on images (2, 3, {side}, {side}) in [0, 1] ({one_line(error)}); "
                f"it must take images of that size, so resize inside it or give its own as --res, on the "
                f"device of the images, so move nothing inside it"
            ) from None
        classifier = OneByOne(classifier)
        outputs = answer(classifier, images)
    check_outputs(name, outputs)
    several = answer_several(classifier, images.detach())
    if several is None:
        answer_alone(name, classifier, images[:1].detach())
        classifier = OneByOne(classifier)
        several = answer_several(classifier, images.detach())
    if attacked:
        check_gradient(name, outputs, images)
    is_steady = check_batches(name, classifier, images.detach(), outputs.detach(), several, precision)
    return Examined(classifier, outputs.shape[1], is_steady, precision)


@torch.no_grad()
def only_batch(classifier: torch.nn.Module, images: torch.Tensor) -> int | None:
    """How many images a classifier takes that takes neither one nor two; None where no number was found."""
    for count in (4, 8, 16, 32, 64, 3):
        try:
            answer(classifier, images[:1].expand(count, -1, -1, -1))
            return count
        except Exception:
            continue
    return None


@torch.no_grad()
def answer_several(classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """The logits of both images in `ORDER`; None of a classifier that does not take so many, or not many
    more, as a program that was exported for few.
    """
    bounds = getattr(getattr(classifier, "program", None), "range_constraints", {}).values()
    if any(bound.upper <= MANY for bound in bounds):
        return None
    try:
        return answer(classifier, images[list(ORDER)])
    except Exception:
        return None


def check_outputs(name: str, outputs: object) -> None:
    """Raises ClassifierError where a classifier returned something else than finite logits of two images."""
    wanted = "expected logits (2, classes)"
    if not isinstance(outputs, torch.Tensor):
        raise ClassifierError(
            f"classifier {name!r} returns a {type(outputs).__name__} for two images; {wanted}, so return "
            f"them alone"
        )
    if outputs.ndim != 2 or len(outputs) != 2:
        raise ClassifierError(f"classifier {name!r} returns {tuple(outputs.shape)} for two images; {wanted}")
    if not outputs.is_floating_point():
        raise ClassifierError(
            f"classifier {name!r} returns {str(outputs.dtype).removeprefix('torch.')}; {wanted}, so return "
            f"what it takes the largest of"
        )
    if not outputs.isfinite().all():
        raise ClassifierError(f"classifier {name!r} returns numbers that are not finite; {wanted}")


def check_gradient(name: str, outputs: torch.Tensor, images: torch.Tensor) -> None:
    """Raises ClassifierError where the images' logits have no gradient at them."""
    gradient = (
        torch.autograd.grad(outputs.float().log_softmax(-1)[:, 0].sum(), images, allow_unused=True)[0]
        if outputs.requires_grad
        else None
    )
    if gradient is None:
        raise ClassifierError(
            f"classifier {name!r} has no gradient at the image, so that it cannot be attacked: look for "
            f"torch.no_grad, inference_mode, detach or NumPy inside it"
        )


# ---------------------------------------------------------------- one image's answer, whatever is beside it


@torch.no_grad()
def check_batches(
    name: str,
    classifier: torch.nn.Module,
    images: torch.Tensor,
    outputs: torch.Tensor,
    several: torch.Tensor,
    precision: torch.dtype,
) -> bool:
    """Asks for each image alone, and among others in other places, which must be the same; returns whether
    the classifier is steady. Of one that draws random numbers, which differ by place, it is the first alone.

    Args:
        images, outputs: both images `(2, 3, H, W)`, and their logits `(2, classes)`.
        several: the logits of both in `ORDER`.
    Raises:
        ClassifierError: the answer depends on the batch, or batch normalisation is in training mode, which in
            a batch of one image makes another network of it than its authors'.
    """
    with BatchStatistics() as normalisation:
        again = answer(classifier, images)
    if normalisation.is_training:
        raise ClassifierError(
            f"classifier {name!r} normalises by the batch, in training mode; {remedy(name)}"
        )
    half = precision in (torch.float16, torch.bfloat16)
    same, other = (HALF, HALF) if half else (SAME_SIZE, OTHER_SIZE)
    if change_of(outputs, again) > same:
        return False  # random, so that nothing else can be told: `warnings_about_outputs` says so
    alone = torch.cat([answer_alone(name, classifier, image) for image in images.split(1)])
    if change_of(outputs, answer(classifier, images, seed=1)) > same:  # draws of its own
        beside_itself = answer(classifier, images[:1].repeat(2, 1, 1, 1))[:1]
        changes = [(outputs[:1], beside_itself, same), (outputs[:1], alone[:1], other)]
    else:
        changes = [(alone, outputs, other), (alone[list(ORDER)], several, other)]
    for expected, found, tolerance in changes:
        change = change_of(expected, found)
        if change > tolerance:
            raise ClassifierError(
                f"classifier {name!r} says something else of an image with others beside it than without, by "
                f"{100 * change:.2g} % of its largest logit; {remedy(name)}"
            )
    return True


def answer_alone(name: str, classifier: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The logits `(1, classes)` of an image `(1, 3, H, W)`.

    Raises:
        ClassifierError: there are none.
    """
    try:
        outputs = answer(classifier, image)
        fault = None if outputs.ndim == 2 and len(outputs) == 1 else f"returns {tuple(outputs.shape)} for one"
    except Exception as error:  # networks raise whatever their code makes them
        fault = f"takes two images and fails on one ({one_line(error)})"
    if fault:
        raise ClassifierError(
            f"classifier {name!r} {fault}; it must take any number, so export it with a batch of any "
            f"size, or look for a squeeze"
        )
    return outputs


def change_of(expected: torch.Tensor, found: torch.Tensor) -> float:
    """How far logits `(B, classes)` are from others, as a part of the largest; inf where one is no number."""
    if not (expected.isfinite().all() and found.isfinite().all()):
        return math.inf
    expected, found = comparable(expected), comparable(found)
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


def remedy(name: str) -> str:
    """What to do about a classifier that is not one of single images."""
    if name.endswith((".ts", ".pt2")):
        how = "torch.jit.trace" if name.endswith(".ts") else "torch.export.export"
        return f"that is fixed in the file: call .eval() on the network before {how}, and save it again"
    return "put it into eval mode, with nothing inside that normalises over the batch or calls .train()"


class BatchStatistics(TorchDispatchMode):
    """Sees whether batch normalisation that has statistics of its own takes those of the batch instead;
    instance normalisation, which runs as the same operation, has none.
    """

    def __init__(self):
        super().__init__()
        self.is_training = False

    def __torch_dispatch__(self, function, types, args: Sequence = (), kwargs: dict | None = None) -> object:
        operation = function.overloadpacket.__name__
        if "batch_norm" in operation and "backward" not in operation:
            given = dict(zip((argument.name for argument in function._schema.arguments), args))
            given |= kwargs or {}
            training = given.get("training", operation == "_batch_norm_with_update")
            self.is_training |= bool(training) and given.get("running_mean") is not None
        return function(*args, **(kwargs or {}))
