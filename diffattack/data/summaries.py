"""What all images of a run say together, read in one pass that keeps a few numbers of each: what figures and
tables are made of takes some 100 MB of 50,000 images, and not the 2 GB of their records.

    run.summary.structure.timestep_shares        # Run in data/records.py makes it, once
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from tqdm import tqdm

from diffattack.common.errors import RecordError

# which images of a run have figures of their own, where it has more than anyone looks at: the extremes, and
# some that nobody chose
FIGURE_IMAGES = 12  # unless the user says otherwise
MOST, LEAST, DRAWN = "most visible", "least visible", "drawn by seed"


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
        layer_losses[..., :1].sum(-1),  # there may be none
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
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.nanmean(values, axis, dtype=np.float64)


def mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis, NaN left out; NaN where there is nothing else."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
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


@dataclass(frozen=True)
class Summary:
    """K iterations, N timesteps, L self-attention layers. Of attacks that know no timesteps N, and here K,
    are 0: nothing of theirs is drawn over iterations, of which each image may have another number.
    """

    structure: LossSums  # the self-attention losses
    losses: np.ndarray  # (images, 4, K): attack, sums of L_i and c_i L_i, cross-attention; without factors
    confidence: np.ndarray  # (images, K), of the true class
    fooled: np.ndarray  # (images, K), bool
    self_attention_factor: np.ndarray  # (images, K)
    gradient_norms: np.ndarray  # (images, M, 3): attack, self-attention, cross-attention
    reference_squares: np.ndarray  # (images, N, L), mean square of each layer's unperturbed map
    weights: np.ndarray  # (images, K, N)
    # the iteration, from 1, in which each image first fools the surrogates, and its L2 distance to the clean
    # image there; (images,) each, NaN for an image that never does
    first_fooled: np.ndarray
    distance_then: np.ndarray
    indices: np.ndarray  # (images,), of the images in the data set
    psnr: np.ndarray  # (images,), dB, of the written picture; infinite where nothing has changed
    # with `--judge_at` at P iterations by C classifiers, else None; see evaluation/curves.py
    curve_iterations: np.ndarray | None = None  # (images, P)
    curve_predictions: np.ndarray | None = None  # (images, P, C, 2)
    curve_visibility: np.ndarray | None = None  # (images, P, measures)


def summary_of(records: Sequence) -> Summary:
    """Of ImageRecords, of which it holds one at a time.

    Raises:
        RecordError: two of them have other iterations, timesteps or layers than each other.
    """
    kept: dict[str, np.ndarray] = {}
    for k, record in enumerate(tqdm(records, desc="records", unit="image", delay=1, leave=False)):
        for name, values in numbers_of(record).items():
            if k == 0:
                kept[name] = np.empty((len(records), *values.shape), values.dtype)
            if values.shape != kept[name].shape[1:]:
                raise RecordError(
                    f"{record.path} has other iterations, timesteps or layers than the images before it"
                )
            kept[name][k] = values
    structure = LossSums(**{declared.name: kept.pop(declared.name) for declared in fields(LossSums)})
    return Summary(structure, **kept)


def numbers_of(record) -> dict[str, np.ndarray]:
    """What is kept of an ImageRecord, by the names of the fields above."""
    iterations = record.losses.shape[-1] if len(record.timesteps) else 0
    ever = bool(record.fooled.any())
    first = int(record.fooled.argmax()) if ever else 0
    return vars(loss_sums(record.layer_losses[:iterations])) | {
        "losses": record.losses[:, :iterations],
        "confidence": record.confidence[:iterations],
        "fooled": record.fooled[:iterations],
        "self_attention_factor": record.self_attention_factor[:iterations],
        "gradient_norms": record.gradient_norms,
        "reference_squares": record.reference_squares,
        "weights": record.weights[:iterations],
        "first_fooled": np.array(first + 1.0 if ever else np.nan),
        "distance_then": np.array(record.distance[first] if ever else np.nan, np.float64),
        "indices": np.array(record.index),
        "psnr": np.array(record.row["psnr"], np.float64),
        **record.curve,
    }


def choose(psnr: Sequence[float], count: int, seed: int) -> dict[int, str]:
    """Some of the images of a run by their places, with why they were chosen, "" where all are: a third the
    most visible, a third the least, and the rest drawn from the others, so many together, in this order; the
    most extreme first, and those that are drawn in the order of the run. The same for the same arguments.

    Args:
        psnr: of each image of a run, in dB; the lower, the more visible. Of equal ones the first counts as
            the more visible.
    """
    if len(psnr) <= count:
        return dict.fromkeys(range(len(psnr)), "")
    by_visibility = np.argsort(np.nan_to_num(psnr, nan=np.inf), kind="stable").tolist()
    most = -(-count // 3)
    least = -(-(count - most) // 2)
    others = sorted(by_visibility[most : len(psnr) - least])
    drawn = np.random.default_rng(seed).choice(others, count - most - least, replace=False)
    return {
        **dict.fromkeys(by_visibility[:most], MOST),
        **dict.fromkeys(by_visibility[::-1][:least], LEAST),
        **dict.fromkeys(sorted(drawn.tolist()), DRAWN),
    }
