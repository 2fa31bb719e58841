"""How the self-attention loss is shared out among timesteps and layers, before weights, and the sums that say
so of an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LossSums:
    """Of the losses by layer `(images, K, N, L)` the sums from which they are drawn, a thirtieth or so of
    them; the images' axis may be missing.
    """

    by_timestep: np.ndarray  # (images, K, N), L_i: over layers
    of_first_layer: np.ndarray  # (images, K, N), no sum
    by_layer: np.ndarray  # (images, N, L), over iterations, NaN left out
    by_iteration: np.ndarray  # (images, K), over timesteps and layers, in float64
    of_timestep: np.ndarray  # (images, N), over iterations and layers, NaN left out

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def timestep_shares(self) -> np.ndarray:
        """`(images, N)`, of all layers and iterations; sum 1."""
        return normalised(self.of_timestep)

    @property
    def first_layer_shares(self) -> np.ndarray:
        """`(images, N)`, of the first layer and all iterations; sum 1."""
        return normalised(self.by_layer[..., 0])

    @property
    def layer_shares(self) -> np.ndarray:
        """`(images, L)`, of all timesteps and iterations; sum 1."""
        return normalised(self.by_layer.sum(-2))


def loss_sums(layer_losses: np.ndarray | LossSums) -> LossSums:
    """Of losses `(..., K, N, L)`; of what are such sums, themselves."""
    if isinstance(layer_losses, LossSums):
        return layer_losses
    return LossSums(
        layer_losses.sum(-1),
        layer_losses[..., 0],
        np.nansum(layer_losses, -3),
        layer_losses.sum((-2, -1), dtype=np.float64),
        np.nansum(layer_losses, (-3, -1)),
    )


def timestep_shares(layer_losses: np.ndarray) -> np.ndarray:
    """Each timestep's share of the self-attention loss, before weights, summed over iterations and layers:
    `(..., K, N, L)` to `(..., N)`, sum 1.
    """
    return normalised(np.nansum(layer_losses, (-3, -1)))


def normalised(values: np.ndarray) -> np.ndarray:
    """`(..., M)` over its sum over the last axis; NaN where that is zero, as in the first iteration, in which
    nothing has changed yet.
    """
    total = values.sum(-1, keepdims=True)
    return np.divide(values, total, out=np.full_like(values, np.nan, dtype=np.float64), where=total > 0)


def mean_without_nan(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """In float64; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis, dtype=np.float64)


def mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis, NaN left out; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0), np.nanstd(values, 0)


def timestep_rows(layer_losses: np.ndarray | LossSums, timesteps: Sequence[int]) -> list[list[str]]:
    """The table of what each timestep costs: `L_i`, mean and standard deviation over images of its mean over
    iterations, its share, and how many times the share is that of uniform losses; from losses `(images,
    iterations, N, L)` or their sums.
    """
    sums = loss_sums(layer_losses)
    mean, deviation = mean_and_deviation(mean_without_nan(sums.by_timestep, 1))
    share, share_deviation = mean_and_deviation(sums.timestep_shares)
    return [["timestep", "mean L_i", "deviation", "share %", "deviation", "times uniform"]] + [
        [
            f"{i}: t = {t}",
            f"{mean[i]:.3g}",
            f"{deviation[i]:.2g}",
            f"{100 * share[i]:.1f}",
            f"{100 * share_deviation[i]:.1f}",
            f"{share[i] * len(timesteps):.2f}",
        ]
        for i, t in enumerate(timesteps)
    ]
