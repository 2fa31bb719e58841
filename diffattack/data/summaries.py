"""What all images of a run say together, read in one pass that keeps a few numbers of each: what figures and
tables are made of takes some 100 MB of 50,000 images, and not the 2 GB of their records.

    run.summary.structure.timestep_shares        # Run in data/records.py makes it, once
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

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
    by_layer: np.ndarray  # (images, N, L), over iterations, NaN left out

    @property
    def timestep_shares(self) -> np.ndarray:
        """`(images, N)`, of all layers and iterations; sum 1."""
        return normalised(self.by_layer.sum(-1))

    @property
    def first_layer_shares(self) -> np.ndarray:
        """`(images, N)`, of the first layer and all iterations; sum 1."""
        return normalised(self.by_layer[..., 0])

    @property
    def layer_shares(self) -> np.ndarray:
        """`(images, L)`, of all timesteps and iterations; sum 1."""
        return normalised(self.by_layer.sum(-2))


def loss_sums(layer_losses: np.ndarray) -> LossSums:
    """Of losses `(..., K, N, L)`."""
    return LossSums(layer_losses.sum(-1), np.nansum(layer_losses, -3))


def timestep_shares(layer_losses: np.ndarray) -> np.ndarray:
    """Each timestep's share of the self-attention loss, before weights, summed over iterations and layers:
    `(..., K, N, L)` to `(..., N)`, sum 1.
    """
    return loss_sums(layer_losses).timestep_shares


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


def timestep_rows(sums: LossSums, timesteps: Sequence[int]) -> list[list[str]]:
    """The table of what each timestep costs: `L_i`, mean and standard deviation over images of its mean over
    iterations, its share, and how many times the share is that of uniform losses.
    """
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


def summary_of(records: Sequence) -> SimpleNamespace:
    """What `numbers_of` keeps of each ImageRecord, stacked: `(images, ...)`, and `structure`, the LossSums of
    the self-attention losses. It holds one record at a time.

    Raises:
        RecordError: two of them have other iterations, timesteps or layers than each other.
    """
    kept: dict[str, np.ndarray] = {}
    for k, record in enumerate(tqdm(records, desc="records", unit="image", delay=1, leave=False)):
        for name, values in numbers_of(record).items():
            if k == 0:
                kept[name] = np.empty((len(records), *values.shape), values.dtype)
            if values.shape != kept[name].shape[1:]:
                raise RecordError(f"{record.path} has other iterations, timesteps or layers than others")
            kept[name][k] = values
    return SimpleNamespace(structure=LossSums(kept.pop("by_timestep"), kept.pop("by_layer")), **kept)


def numbers_of(record) -> dict[str, np.ndarray]:
    """What is kept of an ImageRecord of K iterations, N timesteps and L self-attention layers. Of attacks
    that know no timesteps N, and here K, are 0: nothing of theirs is drawn over iterations, of which each
    image may have another number.
    """
    iterations = record.losses.shape[-1] if len(record.timesteps) else 0
    ever, first = bool(record.fooled.any()), int(record.fooled.argmax())
    kept = {
        "losses": record.losses[:, :iterations],  # (4, K), without factors
        "confidence": record.confidence[:iterations],  # (K,), of the true class
        "fooled": record.fooled[:iterations],  # (K,), bool
        "self_attention_factor": record.self_attention_factor[:iterations],  # (K,)
        "gradient_norms": record.gradient_norms,  # (M, 3): attack, self-attention, cross-attention
        "reference_squares": record.reference_squares,  # (N, L), mean square of layers' unperturbed maps
        "weights": record.weights[:iterations],  # (K, N)
        # the iteration, from 1, in which the image first fools the surrogates, and its L2 distance to the
        # clean image there; NaN for one that never does
        "first_fooled": np.array(first + 1.0 if ever else np.nan),
        "distance_then": np.array(record.distance[first] if ever else np.nan, np.float64),
        "indices": np.array(record.index),  # of the image in the data set
        "psnr": np.array(record.row["psnr"], np.float64),  # dB; infinite where nothing has changed
    }
    # the curve, with `--judge_at` at P iterations by C classifiers, see evaluation/curves.py:
    # curve_iterations (P,), curve_predictions (P, C, 2), curve_measures (M,), curve_visibility (P, M)
    return vars(loss_sums(record.layer_losses[:iterations])) | kept | record.curve


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
