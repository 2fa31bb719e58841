"""How far an attack goes: the radius with which its picture, as it is written, just keeps to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffattack.data.images import rounded
from diffattack.evaluation.budget import Budget, halved

ENOUGH = 0.98  # of a budget: 0.17 dB of a PSNR below its edge
TRIES = 7
NEAR = 1.1  # between radii that differ by less, pictures are mixed: bytes make changes jump
STEEPEST, FLATTEST, LARGEST_STEP = (
    2.0,
    0.25,
    10.0,
)  # how the share of a budget grows with a radius, and a step


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    picture: torch.Tensor  # (1, 3, H, W) in [0, 1]
    radius: float | None
    runs: int  # of the attack


@dataclass(frozen=True)
class Run:
    """Of an attack at a radius."""

    radius: float
    share: float  # of the budget, as the picture is written
    fits: bool
    picture: torch.Tensor


def strongest(
    attack: Callable[[float], torch.Tensor], clean: torch.Tensor, budget: Budget, first: float
) -> Found:
    """The strongest picture of an attack within a budget, by its radius: of runs at several, since a picture
    changes about in proportion to its radius, but for limits, clipping and bytes.

    Args:
        attack: from a radius to the picture `(1, 3, H, W)` in [0, 1] of clean `(1, 3, H, W)`.
        first: the radius to begin with.
    """
    runs: list[Run] = []
    radius = first
    while len(runs) < TRIES:
        picture = attack(radius)
        share, fits = float(budget.share(clean, rounded(picture))), bool(budget.fits(clean, picture).all())
        runs.append(Run(radius, share, fits, picture))
        below, beyond = nearest(runs)
        if below and (below.share >= ENOUGH or (beyond and beyond.radius < NEAR * below.radius)):
            break
        if beyond is None and is_held_back(runs):
            break
        radius = next_radius(runs, below, beyond)
        if any(math.isclose(radius, run.radius, rel_tol=1e-3) for run in runs):
            break
    if below is None:
        return Found(budget.hold(clean, beyond.picture), beyond.radius, len(runs))
    if beyond is None or below.share >= ENOUGH:
        return Found(below.picture, below.radius, len(runs))
    return Found(mixed(clean, budget, below.picture, beyond.picture), below.radius, len(runs))


def nearest(runs: list[Run]) -> tuple[Run | None, Run | None]:
    """The run that uses most of the budget, and the one that is least beyond it."""
    below = max((run for run in runs if run.fits), key=lambda run: (run.share, run.radius), default=None)
    beyond = min((run for run in runs if not run.fits), key=lambda run: (run.share, run.radius), default=None)
    return below, beyond


def is_held_back(runs: list[Run]) -> bool:
    """Whether limits keep a larger radius from changing more."""
    if len(runs) < 2:
        return False
    before, last = runs[-2:]
    return last.radius > 1.5 * before.radius and last.share < 1.02 * before.share


def next_radius(runs: list[Run], below: Run | None, beyond: Run | None) -> float:
    """Where the share of the budget would be just below 1: straight in logarithms between two radii, or on
    from the last two, or in proportion.
    """
    aim, known = math.log((1 + ENOUGH) / 2), [run for run in runs if run.share > 0]
    if not known:
        return runs[-1].radius * LARGEST_STEP
    if below and beyond and (below.share == 0 or below.share == beyond.share):
        return math.sqrt(below.radius * beyond.radius)
    if below and beyond:
        slope = math.log(beyond.share / below.share) / math.log(beyond.radius / below.radius)
        part = (aim - math.log(below.share)) / slope / math.log(beyond.radius / below.radius)
        return below.radius * (beyond.radius / below.radius) ** min(0.95, max(0.05, part))
    last, slope = known[-1], 1.0
    if len(known) > 1 and known[-2].radius != last.radius:
        slope = math.log(last.share / known[-2].share) / math.log(last.radius / known[-2].radius)
    step = math.exp((aim - math.log(last.share)) / min(STEEPEST, max(FLATTEST, slope)))
    return last.radius * min(LARGEST_STEP, max(1 / LARGEST_STEP, step))


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
