"""Intervals of figures, and tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

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
    if total == 0:
        return Estimate(math.nan, count=0, total=0, is_share=True)
    interval = scipy.stats.binomtest(int(count), int(total)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / total, float(interval.low), float(interval.high), int(count), int(total), True)


def mean_over_images(values: np.ndarray) -> Estimate:
    """The mean of `(B,)` with its percentile bootstrap interval over images, without what is not finite."""
    return means_over_images({"": values})[""]


def means_over_images(figures: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """The same of several figures of the same images; those of which the same are left out are resampled
    together.
    """
    alike: dict[bytes, list[str]] = {}
    for name, values in figures.items():
        alike.setdefault(np.isfinite(values).tobytes(), []).append(name)
    found: dict[str, Estimate] = {}
    for names in alike.values():
        values = np.stack([figures[name][np.isfinite(figures[name])] for name in names], 1)  # (B, M)
        means = resampled(len(values), lambda times, values=values: times @ values / len(values))
        found |= zip(names, means)
    return {name: found[name] for name in figures}


def resampled(images: int, statistic: Callable[[np.ndarray], np.ndarray]) -> list[Estimate]:
    """Figures with their percentile bootstrap intervals over images, of two or more. Resamples are those of
    scipy.stats.bootstrap, some at a time, so that memory does not grow with the number of images, and as
    counts, so that a mean over each is a product of matrices.

    Args:
        images: how many there are, B.
        statistic: from how often each image counts, `(R, B)`, to the figures `(R, M)`.
    """
    random, found, block = np.random.default_rng(SEED), [], max(1, BLOCK // max(1, images))
    with np.errstate(invalid="ignore"):  # of no image
        values = statistic(np.ones((1, images)))[0].tolist()
    for start in range(0, RESAMPLES if images >= 2 else 0, block):
        chosen = random.integers(0, images, (min(block, RESAMPLES - start), images))
        chosen += np.arange(0, chosen.size, images)[:, None]
        times = np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape)
        found.append(statistic(times.astype(np.float64)))
    tails = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    ends = np.percentile(np.concatenate(found), tails, 0).tolist() if found else []
    return [Estimate(*each) for each in zip(values, *ends)]


# ---------------------------------------------------------------- paired differences


@dataclass
class Difference:
    """One figure minus another, of the same images, and its p value, also corrected for all that are told
    together.
    """

    difference: Estimate
    p: float
    p_holm: float = math.nan

    def __str__(self) -> str:
        return f"{self.difference.with_interval('+.3g')}, p {self.p_holm:.2g}"


def sign_test(gained: int, lost: int) -> float:
    """Exact two-sided binomial p value of two counts that are as likely."""
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_permutation(differences: np.ndarray) -> float:
    """Two-sided p value of the mean of paired differences `(B,)` under random signs; exact for up to 13
    images.
    """
    if len(differences) < 2 or not differences.any():
        return 1.0
    return float(
        scipy.stats.permutation_test(
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
    known = differences[np.isfinite(differences)]
    counts = int((known > 0).sum()), int((known < 0).sum())
    return Difference(mean_over_images(known), sign_test(*counts) if yes_or_no else paired_permutation(known))


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
