"""Every statistic with its formula: intervals of figures, tests of paired differences, the difference of two
curves, and distances of two sets of pictures.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from tqdm import tqdm

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = PERMUTATIONS = 9999
SEED = 0  # of the bootstrap and of permutations
BLOCK = 2**20  # numbers that are held at once
ROWS = 1024  # features that are looked at together


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
    """Figures with their percentile bootstrap intervals over images, of two or more. What a statistic sees of
    a resample is counts, so that a mean over each is a product of matrices.

    Args:
        images: how many there are, B.
        statistic: from how often each image counts, `(R, B)`, to the figures `(R, M)`.
    """
    with np.errstate(invalid="ignore"):  # of no image
        values = statistic(np.ones((1, images)))[0].tolist()
    if images < 2:
        return [Estimate(value) for value in values]

    def of_chosen(chosen: np.ndarray, axis: int) -> np.ndarray:  # (R, B) of places to (M, R)
        places = chosen + np.arange(0, chosen.size, images)[:, None]
        times = np.bincount(places.ravel(), minlength=chosen.size).reshape(chosen.shape)
        return statistic(times.astype(np.float64)).T

    ends = scipy.stats.bootstrap(
        (np.arange(images),),
        of_chosen,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, BLOCK // images),
        method="percentile",
        vectorized=True,
        rng=SEED,
    ).confidence_interval
    return [Estimate(*each) for each in zip(values, ends.low.tolist(), ends.high.tolist())]


def mean_rate(counted: np.ndarray, found: np.ndarray) -> Estimate:
    """The mean over classifiers of the share of `found` among the images that are `counted`, `(classifiers,
    B)` each; images are resampled for all classifiers at once, and a classifier of which a resample leaves
    out all that it counts is left out. Of none or all the interval is Wilson's, of that many images.
    """

    def rates(times: np.ndarray) -> np.ndarray:
        totals = times @ counted.T
        each = times @ found.T / np.maximum(totals, 1)
        return each.sum(1, keepdims=True) / np.maximum((totals > 0).sum(1, keepdims=True), 1)

    if not counted.any():
        return Estimate(math.nan, is_share=True)
    mean = resampled(counted.shape[1], rates)[0]
    if mean.value in (0, 1):  # resamples are all alike then, as if nothing else could have come out
        images = int(counted.any(0).sum())
        wilson = share(int(mean.value) * images, images)
        mean = replace(mean, low=wilson.low, high=wilson.high)
    return replace(mean, is_share=True)


def shares_of_images(counted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """What each image adds to `mean_rate` of the same, times the number of images, `(B,)`: its mean is that
    mean.
    """
    return (found / np.maximum(1, counted.sum(1, keepdims=True))).mean(0) * counted.shape[1]


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
    steps = np.sort(p_values) * (count - np.arange(count))
    return np.maximum.accumulate(np.minimum(steps, 1))[np.argsort(order)].tolist()


def smallest_success_difference(images: int, tests: int) -> float | None:
    """The smallest difference of success rates that McNemar's test can find, all changes in one direction, at
    Holm's first step.
    """
    needed = math.ceil(math.log2(2 * tests / ALPHA))
    return needed / images if needed <= images else None


# ---------------------------------------------------------------- two curves


def difference_at_equal_visibility(
    visibility: tuple[np.ndarray, np.ndarray], scores: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The second curve minus the first, for each image, averaged over the visibilities that both reach:
    `(B,)`, NaN where they have none in common.

    Each image's points are joined by straight lines in the order of their visibility; nothing is
    extrapolated.

    Args:
        visibility, scores: of both curves, `(points, B)` each.
    """
    differences = np.full(visibility[0].shape[1], np.nan)
    orders = [np.argsort(each, 0, kind="stable") for each in visibility]
    sides = [
        [np.take_along_axis(each, o, 0).T for each, o in zip(one, orders)] for one in (visibility, scores)
    ]
    for k, (v1, v2, s1, s2) in enumerate(zip(*sides[0], *sides[1])):
        low, high = max(v1[0], v2[0]), min(v1[-1], v2[-1])
        if low <= high:
            grid = np.unique(np.clip(np.concatenate([v1, v2]), low, high))
            difference = np.interp(grid, v2, s2) - np.interp(grid, v1, s1)
            differences[k] = (
                np.trapezoid(difference, grid) / (high - low) if high > low else difference.mean()
            )
    return differences


# ---------------------------------------------------------------- two sets of pictures, in blocks of ROWS


def frechet_distance(clean: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to two sets of features `(B, d)` (Heusel et al., 2017).

    With R of the QR decomposition of each set's deviations, the covariances are R'R, and the trace of the
    root of their product is the sum of the singular values of R1 R2'.
    """
    (mean, factor), (other_mean, other_factor) = map(mean_and_factor, (clean, other))
    common = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    spread = np.square(factor).sum() + np.square(other_factor).sum() - 2 * common
    return float(np.square(mean - other_mean).sum() + spread)


def mean_and_factor(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of features `(B, d)` their mean `(d,)` and R, d columns, of which R'R is the covariance."""
    mean, factor = features.mean(0, dtype=np.float64), np.zeros((0, features.shape[1]))
    for block in blocks_of(features):
        factor = np.linalg.qr(np.concatenate([factor, block - mean]), mode="r")
    return mean, factor / math.sqrt(len(features) - 1)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`(x . y / d + 1)^3` of features `(A, d)` and `(B, d)`: `(A, B)`."""
    return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3


def kernel_distance(clean: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of as many features `(B, d)`, B at least 2: the unbiased squared MMD with the cubic kernel
    of KID (Binkowski et al., "Demystifying MMD GANs", ICLR 2018), over all pairs of pictures, where KID is
    usually a mean over random subsets.
    """
    count, distance = len(clean), 0.0
    pairs = list(itertools.product(enumerate(zip(blocks_of(clean), blocks_of(other))), repeat=2))
    for (row, (a, b)), (column, (x, y)) in tqdm(pairs, "kernel distance", delay=1, leave=False):
        within = kernel(a, x) + kernel(b, y)
        if row == column:  # no picture is paired with itself
            np.fill_diagonal(within, 0)
        distance += float(within.sum() / (count * (count - 1)) - 2 * kernel(a, y).sum() / count**2)
    return distance


def blocks_of(features: np.ndarray) -> list[np.ndarray]:
    """Features `(B, d)` in parts of up to ROWS."""
    return np.array_split(features, range(ROWS, len(features), ROWS))
