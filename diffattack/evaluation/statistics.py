"""Intervals of figures, and tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = PERMUTATIONS = 9999
SEED = 0  # of the bootstrap and of permutations
BLOCK = 2**20  # numbers that are held at once


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; a share may have counts, too. NaN where nothing was counted."""

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int | None = None
    total: int | None = None
    is_share: bool = False

    def __str__(self) -> str:
        if self.is_share:
            counts = "" if self.count is None else f"{self.count}/{self.total}"
            percent = "" if math.isnan(self.value) else self.with_interval(".0%")
            return " = ".join(filter(None, (counts, percent)))
        is_ordinary = self.value and math.isfinite(self.value)
        digits = max(0, 2 - math.floor(math.log10(abs(self.value)))) if is_ordinary else 0  # three that count
        return self.with_interval(f".{digits}f")

    def with_interval(self, form: str) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{interval}"


# ---------------------------------------------------------------- intervals


def share(count: int, total: int) -> Estimate:
    """A share with its Wilson interval (Wilson, 1927)."""
    from scipy.stats import binomtest

    if total == 0:
        return Estimate(math.nan, count=0, total=0, is_share=True)
    interval = binomtest(int(count), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / total, float(interval.low), float(interval.high), int(count), int(total), True)


def mean_over_images(values: np.ndarray) -> Estimate:
    """The mean of `(B,)` with its percentile bootstrap interval over images."""
    return resampled(values[None])[0]


def resampled(values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean) -> list[Estimate]:
    """Figures with their percentile bootstrap intervals over images, whose resamples are drawn once for all
    of them, and some at a time, so that memory does not grow with the number of images.

    Args:
        values: of each image, `(M, B)`.
        statistic: from `(M, ..., B)` over the last axis, which it is told, to the figures, as many as M, or
            one.
    """
    from scipy.stats import bootstrap

    if not values.size:
        return [Estimate(math.nan)] * len(values)
    found = np.atleast_1d(statistic(values, axis=-1)).astype(np.float64)
    ends = np.full((2, len(found)), math.nan)
    if values.shape[1] >= 2:
        with np.errstate(invalid="ignore"):  # of what is infinite, which gets no interval
            ends[:] = np.reshape(
                bootstrap(
                    (values,),
                    statistic,
                    n_resamples=RESAMPLES,
                    batch=max(1, BLOCK // values.size),
                    vectorized=True,
                    axis=-1,
                    confidence_level=CONFIDENCE,
                    method="percentile",
                    rng=SEED,
                ).confidence_interval,
                ends.shape,
            )
    ends[:, ~np.isfinite(found)] = math.nan
    return [Estimate(*map(float, each)) for each in zip(found, *ends)]


# ---------------------------------------------------------------- paired differences


@dataclass
class Difference:
    """One figure minus another, of the same images, and its p value, also corrected for all that are told
    together.
    """

    difference: Estimate
    p: float
    p_holm: float = math.nan


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p value of McNemar's test for paired yes and no, `(B,)` each: only the pairs that
    differ say anything.
    """
    from scipy.stats import binomtest

    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def paired_permutation(differences: np.ndarray) -> float:
    """Two-sided p value of the mean of paired differences `(B,)` under random signs; exact for up to 13
    images.
    """
    from scipy.stats import permutation_test

    if len(differences) < 2 or not differences.any():
        return 1.0
    return float(
        permutation_test(
            (differences,),
            lambda x, axis: x.mean(axis),
            permutation_type="samples",
            n_resamples=PERMUTATIONS,
            batch=max(1, BLOCK // len(differences)),
            vectorized=True,
            rng=SEED,
        ).pvalue
    )


def paired(first: np.ndarray, second: np.ndarray, yes_or_no: bool = False) -> Difference:
    """The mean of what the second is more than the first `(B,)`, without the images of which one is NaN or
    infinite: by McNemar's test where they are 0 or 1 for yes or no, else by random signs.
    """
    with np.errstate(invalid="ignore"):  # of pictures that neither changed, whose PSNR is infinite
        differences = second - first
    known = np.isfinite(differences)
    p = mcnemar(first[known] > 0, second[known] > 0) if yes_or_no else paired_permutation(differences[known])
    return Difference(mean_over_images(differences[known]), p)


def correct(differences: Sequence[Difference]) -> None:
    """Corrects p by Holm over all of them."""
    for difference, corrected in zip(differences, holm([difference.p for difference in differences])):
        difference.p_holm = corrected


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm, 1979)."""
    order, count = np.argsort(p_values), len(p_values)
    corrected = np.empty(count)
    steps = np.asarray(p_values, np.float64)[order] * (count - np.arange(count))
    corrected[order] = np.maximum.accumulate(np.minimum(steps, 1))
    return corrected.tolist()


def smallest_success_difference(images: int, tests: int) -> float | None:
    """The smallest difference of success rates that McNemar's test can find, all changes in one direction, at
    Holm's first step.
    """
    needed = math.ceil(math.log2(2 * tests / ALPHA))
    return needed / images if needed <= images else None
