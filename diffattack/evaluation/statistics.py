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
    return means_over_images(values[None])[0]


def means_over_images(values: np.ndarray) -> list[Estimate]:
    """The same of several measures of the same images, `(M, B)`, whose resamples are drawn once for all."""
    columns, images = np.asarray(values, np.float64).T, values.shape[1]

    def means(times: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # of a measure that is infinite
            return times @ columns / images

    return resampled(images, means)


def resampled(images: int, statistic: Callable[[np.ndarray], np.ndarray]) -> list[Estimate]:
    """Figures with their percentile bootstrap intervals over images. Resamples are taken some at a time, so
    that memory does not grow with the number of images, and as counts, so that a mean over each of them is a
    product of matrices.

    Args:
        images: how many there are, B.
        statistic: from how often each image counts, `(R, B)`, to the figures `(R, M)`; NaN for a figure that
            there is none of.
    """
    from scipy.stats import bootstrap

    def figures(chosen: np.ndarray, axis: int) -> np.ndarray:
        """From the images of each resample, `(R, B)`, to `(M, R)`."""
        places = chosen + images * np.arange(len(chosen))[:, None]
        times = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        return statistic(times.astype(np.float64))[:, is_finite].T

    values = statistic(np.ones((1, images)))[0]
    is_finite = np.isfinite(values)  # what is infinite gets no interval
    ends = np.full((2, len(values)), math.nan)
    if images >= 2 and is_finite.any():
        ends[:, is_finite] = bootstrap(
            (np.arange(images),),
            figures,
            n_resamples=RESAMPLES,
            batch=max(1, BLOCK // images),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=SEED,
        ).confidence_interval
    return [Estimate(*map(float, each)) for each in zip(values, *ends)]


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


def paired(first: np.ndarray, second: np.ndarray) -> Difference:
    """The mean of what the second is more than the first `(B,)`: of yes and no by McNemar's test; of numbers
    by random signs, without the images of which one has none.
    """
    if first.dtype == bool:
        return Difference(mean_over_images(second.astype(float) - first), mcnemar(first, second))
    with np.errstate(invalid="ignore"):  # of pictures that neither changed, whose PSNR is infinite
        differences = second - first
    return mean_difference(differences[np.isfinite(differences)])


def mean_difference(differences: np.ndarray) -> Difference:
    """Of paired differences `(B,)`."""
    return Difference(mean_over_images(differences), paired_permutation(differences))


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
