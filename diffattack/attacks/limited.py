"""How far an attack on pixels goes: the limit at each place, with the gradient through it, and the radius
with which its picture, as it is written, just keeps to a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffattack.data.images import rounded
from diffattack.diffusion.composition import Composition
from diffattack.evaluation.budget import Budget, halved

SUMS = ("add", "__add__", "__radd__")


class CleanPictures(torch.Tensor):
    """Clean pictures `(B, 3, H, W)` to which an attack adds a change: where the change has a gradient, the
    sum is what the composition makes of it; all else is as with any tensor.

    Attacks of libraries look at transformed copies of the sum (resized and padded, scaled, warped, mixed),
    about which a limit behind the transformation, at the classifier's door, would know nothing: the limit has
    to come between the sum and what is done to it.
    """

    composition: Composition
    sums: list[torch.Tensor]  # the last of the pictures that were looked at or returned

    @classmethod
    def of(cls, composition: Composition) -> CleanPictures:
        """The clean pictures of a composition."""
        clean = composition.clean.clone().as_subclass(cls)
        clean.composition, clean.sums = composition, []
        return clean

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") in SUMS and len(args) == 2 and result.requires_grad:
                clean = next(one for one in args if isinstance(one, cls))
                if result.shape == clean.shape:
                    result = Limit.apply(result, clean.composition)
                    clean.sums[:] = [result.detach()]
            return result


class Limit(torch.autograd.Function):
    """A composition through which a gradient can come more than once, as through the sum that it stands for:
    some attacks look at several copies of one sum, one after the other.
    """

    @staticmethod
    def forward(context, images: torch.Tensor, composition: Composition) -> torch.Tensor:
        context.images, context.composition = images, composition
        return composition(images)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.enable_grad():
            images = context.images.detach().requires_grad_()
            picture = context.composition(images)
        return torch.autograd.grad(picture, images, gradient)[0], None


class BehindLimit(torch.nn.Module):
    """A classifier of what a composition makes of a picture. What is done to one beside that, such as
    resizing it, comes between the two: `classifier.logits(resized(classifier.picture(x)))`.
    """

    def __init__(self, classifier: torch.nn.Module, picture: Composition):
        super().__init__()
        self.logits, self.picture = classifier, picture

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(self.picture(images))


# ---------------------------------------------------------------- within a budget

ENOUGH = 0.98  # of a budget: 0.17 dB of a PSNR below its edge
TRIES = 7
NEAR = 1.1  # between radii that differ by less, pictures are mixed: bytes make changes jump
STEEPEST, FLATTEST, LARGEST_STEP = 2.0, 0.25, 10.0  # how a budget's share grows with a radius, and a step


@dataclass(frozen=True)
class Run:
    """Of an attack at a radius."""

    picture: torch.Tensor  # (1, 3, H, W) in [0, 1]
    radius: float
    share: float  # of the budget, as the picture is written
    fits: bool


def strongest(
    attack: Callable[[float], torch.Tensor], clean: torch.Tensor, budget: Budget, first: float
) -> tuple[torch.Tensor, float, int]:
    """The strongest picture of an attack within a budget, its radius, and how often the attack was run: at
    several radii, since a picture changes about in proportion to its radius, but for limits, clipping and
    bytes.

    Args:
        attack: from a radius to the picture `(1, 3, H, W)` in [0, 1] of clean `(1, 3, H, W)`.
        first: the radius to begin with.
    """
    runs: list[Run] = []
    radius = first
    while len(runs) < TRIES and not any(math.isclose(radius, run.radius, rel_tol=1e-3) for run in runs):
        picture = attack(radius)
        share, fits = float(budget.share(clean, rounded(picture))), bool(budget.fits(clean, picture).all())
        runs.append(Run(picture, radius, share, fits))
        # the run that uses most of the budget, and the one that is least beyond it
        below = max((run for run in runs if run.fits), key=rank, default=None)
        beyond = min((run for run in runs if not run.fits), key=rank, default=None)
        if below and (below.share >= ENOUGH or (beyond and beyond.radius < NEAR * below.radius)):
            break
        before = runs[-2:][0]
        if beyond is None and radius > 1.5 * before.radius and share < 1.02 * before.share:
            break  # limits keep a larger radius from changing more
        radius = next_radius(runs, below, beyond)
    if below is None:
        return budget.hold(clean, beyond.picture), beyond.radius, len(runs)
    is_best = beyond is None or below.share >= ENOUGH
    picture = below.picture if is_best else mixed(clean, budget, below.picture, beyond.picture)
    return picture, below.radius, len(runs)


def rank(run: Run) -> tuple[float, float]:
    return run.share, run.radius


def next_radius(runs: list[Run], below: Run | None, beyond: Run | None) -> float:
    """Where the share of the budget would be just below 1: straight in logarithms between two radii, or on
    from the last two, or in proportion.
    """
    aim, known = math.log((1 + ENOUGH) / 2), [run for run in runs if run.share > 0]
    if not known:
        return runs[-1].radius * LARGEST_STEP
    if below and beyond:
        if below.share in (0, beyond.share):
            return math.sqrt(below.radius * beyond.radius)
        part = (aim - math.log(below.share)) / slope(below, beyond) / math.log(beyond.radius / below.radius)
        return below.radius * (beyond.radius / below.radius) ** min(0.95, max(0.05, part))
    last, steepness = known[-1], 1.0
    if len(known) > 1 and known[-2].radius != last.radius:
        steepness = slope(known[-2], last)
    step = math.exp((aim - math.log(last.share)) / min(STEEPEST, max(FLATTEST, steepness)))
    return last.radius * min(LARGEST_STEP, max(1 / LARGEST_STEP, step))


def slope(one: Run, other: Run) -> float:
    """How the share of a budget grows with the radius, both in logarithms."""
    return math.log(other.share / one.share) / math.log(other.radius / one.radius)


def mixed(clean: torch.Tensor, budget: Budget, below: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    """Between two pictures of almost the same radius, of which one is within the budget and one is not, since
    bytes make the change of all pixels jump at once: some pixels of the second, drawn by chance, and the
    others of the first.
    """
    drawn = torch.rand(below.shape[-2:], generator=torch.Generator().manual_seed(0)).to(below)

    def mix(part: torch.Tensor) -> torch.Tensor:
        return torch.where(drawn < part.view(-1, 1, 1, 1), beyond, below)

    none, all_of_them = torch.zeros(1).to(below), torch.ones(1).to(below)
    return mix(halved(none, all_of_them, lambda part: budget.fits(clean, mix(part))))
