"""The kernel distance, its intervals and the bootstrap against their slow, plain versions; in blocks, too."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from diffattack.common.environment import mend_torchvision
from diffattack.evaluation import distances, statistics
from diffattack.evaluation.distances import (
    KernelDistance,
    Reference,
    distance_to,
    frechet_distance,
    kernel_difference,
)
from diffattack.evaluation.statistics import means_over_images, resampled

COUNT = 50


@pytest.fixture(scope="module")
def features() -> list[torch.Tensor]:
    """Of three sets of 50 pictures, `(50, 24)`; the third is away from the others."""
    torch.manual_seed(0)
    first, second, third = (torch.randn(COUNT, 24) for _ in range(3))
    return [first, second, third + 0.4]


def plain_distance(clean: torch.Tensor, other: torch.Tensor) -> float:
    mend_torchvision()
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(clean.double(), other.double()))


def left_out(k: int) -> list[int]:
    return [i for i in range(COUNT) if i != k]


@pytest.mark.parametrize("rows", [1024, 7])
def test_the_distance_and_its_interval_are_those_of_leaving_each_image_out(features, monkeypatch, rows):
    monkeypatch.setattr(distances, "ROWS", rows)
    clean, _, other = features
    estimate = KernelDistance(clean).to(other)
    assert estimate.value == pytest.approx(plain_distance(clean, other), abs=1e-9)
    without = np.array([plain_distance(clean[left_out(k)], other[left_out(k)]) for k in range(COUNT)])
    error = 1.96 * np.sqrt((COUNT - 1) / COUNT * np.square(without - without.mean()).sum())
    assert estimate.high - estimate.value == pytest.approx(error, abs=1e-9)
    assert estimate.value - estimate.low == pytest.approx(error, abs=1e-9)


def test_the_difference_is_that_of_the_distances_and_its_p_that_of_swapping_results(features):
    clean, first, second = features
    found = kernel_difference(clean, first, second)
    differences = [
        plain_distance(clean[kept], second[kept]) - plain_distance(clean[kept], first[kept])
        for kept in [list(range(COUNT)), *map(left_out, range(COUNT))]
    ]
    assert found.estimate.value == pytest.approx(differences[0], abs=1e-9)
    deviations = np.array(differences[1:]) - np.mean(differences[1:])
    error = 1.96 * np.sqrt((COUNT - 1) / COUNT * np.square(deviations).sum())
    assert found.estimate.high - found.estimate.value == pytest.approx(error, abs=1e-9)
    # a smaller difference, so that p is neither 0 nor 1
    weak = first + 0.25 * (second - first)
    found, random = kernel_difference(clean, first, weak), np.random.default_rng(1)
    swapped = []
    for _ in range(400):
        swaps = torch.from_numpy(random.random(COUNT) < 0.5)[:, None]
        a, b = torch.where(swaps, weak, first), torch.where(swaps, first, weak)
        swapped.append(plain_distance(clean, b) - plain_distance(clean, a))
    above = np.mean(np.array(swapped) >= found.estimate.value)
    assert found.p == pytest.approx(2 * min(above, 1 - above), abs=0.08)


def test_a_frechet_distance_in_blocks_is_the_same(features, monkeypatch):
    clean, _, other = features
    reference = Reference(clean.double().mean(0), torch.cov(clean.double().T))
    whole = frechet_distance(clean, other), distance_to(reference, other)
    monkeypatch.setattr(distances, "ROWS", 11)
    assert (frechet_distance(clean, other), distance_to(reference, other)) == pytest.approx(whole, rel=1e-9)
    assert whole[0] == pytest.approx(whole[1], rel=1e-6)


@pytest.mark.parametrize("block", [2**20, 500])
def test_intervals_of_means_are_those_of_scipys_bootstrap(monkeypatch, block):
    monkeypatch.setattr(statistics, "BLOCK", block)
    values = np.random.default_rng(3).normal(size=(3, 57)) ** 2
    for row, estimate in zip(values, means_over_images(values)):
        expected = bootstrap(
            (np.arange(57),),
            lambda chosen, axis, row=row: row[chosen].mean(-1),
            confidence_level=0.95,
            n_resamples=statistics.RESAMPLES,
            method="percentile",
            vectorized=True,
            rng=statistics.SEED,
        ).confidence_interval
        assert estimate.value == pytest.approx(row.mean(), rel=1e-12)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), rel=1e-12)


def test_a_figure_that_is_infinite_or_of_nothing_has_no_interval():
    finite, infinite = means_over_images(np.array([[1.0, 2.0, 3.0], [1.0, np.inf, 3.0]]))
    assert np.isfinite([finite.low, finite.high]).all() and infinite.value == np.inf
    assert np.isnan([infinite.low, infinite.high]).all()
    (none,) = resampled(0, lambda times: np.full((len(times), 1), np.nan))
    assert np.isnan(none.value)
