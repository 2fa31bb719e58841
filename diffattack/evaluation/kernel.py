"""The kernel distance of two sets of pictures: the unbiased squared MMD with the cubic kernel of KID
(Binkowski et al., "Demystifying MMD GANs", ICLR 2018), over all pairs of pictures.

KID is usually given as a mean over random subsets, since all pairs of many pictures are many. Here they are
gone through in blocks: sums over the rows of the kernel's matrix give the distance, and also what it is
without each picture, so that its jackknife costs no more than the distance itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from diffattack.evaluation.stats import Difference, Estimate, jackknifed, paired_permutation

ROWS = 1024  # of a block


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(x . y / d + 1)^3` of features `(A, d)` and `(B, d)`: `(A, B)` in float64."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def block_pairs(count: int) -> Iterator[tuple[slice, slice]]:
    """All blocks of a matrix of so many rows and columns."""
    starts = range(0, count, ROWS)
    for row in starts:
        for column in starts:
            yield slice(row, row + ROWS), slice(column, column + ROWS)


def blocks_of(count: int, sides: int) -> int:
    """How many blocks a KernelDistance goes through for so many pictures and sets of others."""
    return math.ceil(count / ROWS) ** 2 * (1 + 2 * sides)


class Sums:
    """Of the kernel's matrix between two sets of as many features `(B, d)`: over each row and each column,
    and the diagonal, `(B,)`, in float64.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, step: Callable[[], object] | None = None):
        count = len(a)
        self.rows, self.columns, self.diagonal = (np.zeros(count) for _ in range(3))
        for rows, columns in block_pairs(count):
            block = kernel(a[rows], b[columns]).numpy()
            self.rows[rows] += block.sum(1)
            self.columns[columns] += block.sum(0)
            if rows == columns:
                self.diagonal[rows] = block.diagonal()
            if step:
                step()

    @property
    def within(self) -> tuple[float, np.ndarray]:
        """Of a set with itself: the sum over all pairs of different pictures, and what each takes part
        in.
        """
        others = self.rows - self.diagonal
        return others.sum(), 2 * others

    @property
    def between(self) -> tuple[float, np.ndarray]:
        """Of two sets: the sum over all pairs, and what the k-th picture of either takes part in."""
        return self.rows.sum(), self.rows + self.columns - self.diagonal


def distances(within_a: Sums, within_b: Sums, between: Sums) -> tuple[float, np.ndarray]:
    """The squared MMD, and what it is without the k-th picture of both sets, `(B,)`."""
    count = len(within_a.rows)
    (of_a, by_a), (of_b, by_b), (of_both, by_both) = within_a.within, within_b.within, between.between

    def distance(inside: np.ndarray, across: np.ndarray, n: int) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return inside / (n * (n - 1)) - 2 * across / n**2

    whole = distance(np.float64(of_a + of_b), np.float64(of_both), count)
    return float(whole), distance(of_a + of_b - by_a - by_b, of_both - by_both, count - 1)


class KernelDistance:
    """Of the clean pictures' features `(B, d)` to those of others, picture by picture the same ones.

    Args:
        step: called after each of the `blocks_of` blocks.
    """

    def __init__(self, clean: torch.Tensor, step: Callable[[], object] | None = None):
        self.clean, self.step = clean, step
        self.within = Sums(clean, clean, step)

    def to(self, other: torch.Tensor) -> Estimate:
        """With 1.96 times its standard error by the jackknife over pictures."""
        return jackknifed(*self.distances(other))

    def distances(self, other: torch.Tensor) -> tuple[float, np.ndarray]:
        return distances(self.within, Sums(other, other, self.step), Sums(self.clean, other, self.step))


def kernel_difference(clean: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Difference:
    """Of the kernel distances of two attacks to the clean images, all features `(B, d)`: the second's minus
    the first's, with the jackknife's interval, and the p of swapping images' two results at random.

    The difference is a sum over images, of which each swap turns the sign: of a pair of images the one whose
    results are swapped and the other not adds k(first, second) - k(second, first), so that with these, summed
    over all others, no pairs are left to go through for each permutation.
    """
    count, of_clean = len(clean), KernelDistance(clean)
    (a, without_a), (b, without_b) = of_clean.distances(first), of_clean.distances(second)
    estimate = jackknifed(b - a, without_b - without_a)
    if count < 2 or torch.equal(first, second):
        return Difference(estimate, 1.0)
    of_first, of_second, mixed = Sums(first, first), Sums(second, second), Sums(first, second)
    inside = of_second.rows - of_second.diagonal - of_first.rows + of_first.diagonal
    inside -= mixed.rows - mixed.columns
    across = Sums(clean, second).columns - Sums(clean, first).columns
    shares = inside / (count * (count - 1)) - 2 * across / count**2  # their sum is the difference
    return Difference(estimate, paired_permutation(shares))
