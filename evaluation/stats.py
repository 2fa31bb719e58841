"""Intervals of figures, and tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0  # of the bootstrap
ALPHA = 0.05
PERMUTATIONS, KERNEL_PERMUTATIONS = 9999, 999


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; a share may have counts, too. NaN where nothing was counted."""

    value: float
    low: float
    high: float
    count: int | None = None
    total: int | None = None
    is_share: bool = False

    def __str__(self) -> str:
        if self.is_share:
            counts = "" if self.count is None else f"{self.count}/{self.total}"
            interval = "" if math.isnan(self.low) else f" [{self.low:.0%}, {self.high:.0%}]"
            percent = "" if math.isnan(self.value) else f"{self.value:.0%}{interval}"
            return " = ".join(filter(None, (counts, percent)))
        # three that count
        digits = (
            0
            if not self.value or not math.isfinite(self.value)
            else max(0, 2 - math.floor(math.log10(abs(self.value))))
        )
        return f"{self.value:.{digits}f}" + (
            "" if math.isnan(self.low) else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        )


def share(count: int, total: int) -> Estimate:
    """A share with its Wilson interval (Wilson, 1927)."""
    from scipy.stats import binomtest

    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, True)
    interval = binomtest(int(count), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / total, float(interval.low), float(interval.high), int(count), int(total), True)


def mean_over_images(values: np.ndarray) -> Estimate:
    """The mean of `(B,)` with its percentile bootstrap interval over images."""
    return resampled(len(values), lambda chosen: values[chosen].mean(-1))


def resampled(images: int, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A figure with its percentile bootstrap interval over images.

    Args:
        images: how many there are.
        statistic: from indices of images `(..., images)` to the figure `(...)`.
    """
    from scipy.stats import bootstrap

    everything = np.arange(images)
    value = float(statistic(everything)) if images else math.nan
    if images < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    interval = bootstrap(
        (everything,),
        lambda chosen, axis: statistic(chosen),
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        rng=SEED,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def jackknife(images: int, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A figure of a set of images, from their indices, with 1.96 times its standard error when each image is
    left out once (Tukey, 1958).
    """
    everything = np.arange(images)
    value = statistic(everything)
    if images < 3:
        return Estimate(value, math.nan, math.nan)
    left_out = np.array([statistic(np.delete(everything, k)) for k in everything])
    error = 1.96 * math.sqrt((images - 1) / images * np.square(left_out - left_out.mean()).sum())
    return Estimate(value, value - error, value + error)


@dataclass
class Difference:
    """One figure of one mode minus that of the first mode, on the same images; `p` is corrected by `holm`
    later.
    """

    estimate: Estimate
    p: float
    corrected: float = math.nan


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
            vectorized=True,
            rng=0,
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm, 1979)."""
    order = np.argsort(p_values)
    corrected, highest = np.empty(len(p_values)), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[k]))
        corrected[k] = highest
    return corrected.tolist()


def mean_difference(differences: np.ndarray, p: float | None = None) -> Difference:
    """Of paired differences `(B,)`."""
    return Difference(mean_over_images(differences), paired_permutation(differences) if p is None else p)


def smallest_success_difference(images: int, tests: int) -> float | None:
    """The smallest difference of success rates that McNemar's test can find, all changes in one direction, at
    Holm's first step.
    """
    needed = math.ceil(math.log2(2 * tests / ALPHA))
    return needed / images if needed <= images else None
