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
PERMUTATIONS = 9999


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
    return means_over_images(values[None])[0]


def means_over_images(values: np.ndarray) -> list[Estimate]:
    """The same of several measures of the same images, `(M, B)`, whose resamples are drawn once for all."""
    columns, images = np.asarray(values, np.float64).T, values.shape[1]

    def statistic(times: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # of a measure that is infinite, which has no interval
            return times @ columns / images

    return resampled(images, statistic)


def resampled(images: int, statistic: Callable[[np.ndarray], np.ndarray]) -> list[Estimate]:
    """Figures with their percentile bootstrap intervals over images. The resamples are those that
    scipy.stats.bootstrap draws from the same seed; they are taken in blocks, so that memory does not grow
    with the number of images, and as counts, so that a mean over each of them is a product of matrices.

    Args:
        images: how many there are, B.
        statistic: from how often each image counts, `(R, B)`, to the figures `(R, M)`; NaN for a figure that
            there is none of.
    """
    values = statistic(np.ones((1, images)))[0]
    lows = highs = np.full(len(values), math.nan)
    if images >= 2 and np.isfinite(values).any():
        random, found = np.random.default_rng(SEED), []
        for block in blocks(RESAMPLES, images):
            chosen = random.integers(0, images, (block, images))
            chosen += np.arange(block)[:, None] * images
            times = np.bincount(chosen.ravel(), minlength=block * images).reshape(block, images)
            found.append(statistic(times.astype(np.float64)))
        tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
        with np.errstate(invalid="ignore"):  # of figures that are infinite, and get no interval
            lows, highs = np.percentile(np.concatenate(found), tails, axis=0)
    return [
        Estimate(*map(float, ends))
        if math.isfinite(ends[0])
        else Estimate(float(ends[0]), math.nan, math.nan)
        for ends in zip(values, lows, highs)
    ]


BLOCK = 2**20  # numbers that are held at once


def blocks(count: int, each: int) -> list[int]:
    """So many rows of `each` numbers in pieces that keep to BLOCK, at least one row a piece."""
    rows = max(1, BLOCK // max(1, each))
    return [min(rows, count - start) for start in range(0, count, rows)]


def jackknifed(value: float, left_out: np.ndarray) -> Estimate:
    """A figure of a set of images, with 1.96 times its standard error from what it is when each image is left
    out once, `(B,)` (Tukey, 1958).
    """
    images = len(left_out)
    if images < 3:
        return Estimate(value, math.nan, math.nan)
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
            batch=max(1, BLOCK // len(differences)),
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
