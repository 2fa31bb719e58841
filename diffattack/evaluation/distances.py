"""How real pictures look: Frechet distance (Heusel et al., 2017) and kernel distance (Binkowski et al., 2018)
of two sets of pictures in the features of a network. Features are gone through in blocks: they may lie in a
file.
"""

from __future__ import annotations

import functools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.errors import InputError, one_line
from diffattack.common.progress import progress
from diffattack.data.images import to_tensor
from diffattack.evaluation.metrics import Quality, is_at_hand, means_of
from diffattack.evaluation.statistics import (
    Difference,
    Estimate,
    jackknifed,
    paired_permutation,
)

INCEPTION = "Inception v3"


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


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of a set of pictures."""

    mean: torch.Tensor  # (d,), float64, as is
    covariance: torch.Tensor  # (d, d)


def read_reference(path: Path, network: str, dimension: int) -> Reference:
    """Reads `mu` (d,) and `sigma` (d, d) from an .npz file, as guided-diffusion, pytorch-fid and clean-fid
    call them; what else is in it is not read.

    Args:
        network, dimension: the feature network that is in use, and its d.
    Raises:
        InputError: the file cannot be read, or holds no such statistics.
    """
    begin = f"--fid_reference: {str(path)!r}"
    if not path.is_file():
        raise InputError(f"{begin} is no file")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{begin} is no .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("mu", "sigma") if name in file}
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{begin} cannot be read as an .npz file: {one_line(error)}") from None
    if len(arrays) < 2:
        absent = " and no ".join(name for name in ("mu", "sigma") if name not in arrays)
        raise InputError(
            f"{begin} has no {absent}; expected mu and sigma, as pytorch-fid, clean-fid and "
            f"guided-diffusion write them"
        )
    mean, covariance = arrays.values()
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not mean.size:
        raise InputError(
            f"{begin}: mu is of shape {mean.shape} and sigma of {covariance.shape}; expected (d,) and (d, d)"
        )
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (mean, covariance)):
        raise InputError(f"{begin}: mu or sigma holds what is not a finite floating-point number")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not np.allclose(covariance, covariance.T, atol=1e-4 * np.abs(covariance).max()):
        raise InputError(f"{begin}: sigma is not symmetric, so that it is no covariance")
    if len(mean) != dimension:
        raise InputError(
            f"{begin} is of {len(mean)} features, and the network in use here, {network}, has {dimension}; "
            f"published statistics are of Inception's 2048, which docs/usage.md says how to get"
        )
    return Reference(torch.from_numpy(mean), torch.from_numpy(covariance))


def in_blocks(features: torch.Tensor) -> Iterator[torch.Tensor]:
    """Features `(B, d)` in float64, so many rows at a time."""
    for start in range(0, len(features), ROWS):
        yield features[start : start + ROWS].double()


class Given(torch.nn.Module):
    """Stands where torchmetrics expects a feature network, for features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(clean: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features `(B, d)` (Heusel et al., 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if (
        2 * len(clean) < clean.shape[1]
    ):  # rotated into the span of all features, which changes no distance, it is far quicker
        clean, other = clean.double(), other.double()
        basis, _ = torch.linalg.qr(torch.cat([clean, other]).T)
        clean, other = clean @ basis, other @ basis
    # of several processes only one evaluates, so there is nothing to synchronise with
    metric = FrechetInceptionDistance(feature=Given(clean.shape[1]), sync_on_compute=False).set_dtype(
        torch.float64
    )
    for features, real in ((clean, True), (other, False)):
        for block in in_blocks(features):
            metric.update(block, real=real)
    return float(metric.compute())


def distance_to(reference: Reference, features: torch.Tensor) -> float:
    """Frechet distance |m - mu|^2 + tr(S + sigma - 2 (S sigma)^(1/2)) of the Gaussians of the reference and
    of features `(B, d)`, B at least 2 (Heusel et al., 2017).

    With S = R^T R, the eigenvalues of S sigma that are not zero are those of R sigma R^T, which is symmetric
    and no larger than the number of pictures or of features: that spares the root of a product.
    """
    mean = sum(block.sum(0) for block in in_blocks(features)) / len(features)
    if len(features) <= features.shape[1]:
        root = torch.linalg.qr(features.double() - mean, mode="r").R
    else:
        scatter = sum((block - mean).T @ (block - mean) for block in in_blocks(features))
        values, vectors = torch.linalg.eigh(scatter)
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    root = root / math.sqrt(len(features) - 1)
    spectrum = torch.linalg.eigvalsh(root @ reference.covariance @ root.T).clamp(min=0)
    variances = root.square().sum() + reference.covariance.trace()
    return float((mean - reference.mean).square().sum() + variances - 2 * spectrum.sqrt().sum())


class ClassifierFeatures(torch.nn.Module):
    """What goes into a classifier's last linear layer: images `(B, 3, H, W)` in [0, 1] to `(B,
    num_features)`.
    """

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier, self.features = classifier, None
        last = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, inputs: setattr(self, "features", inputs[0]))
        self.num_features = last.in_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.classifier(images)
        return self.features


@dataclass(frozen=True)
class FeatureNetwork:
    """What pictures' features are taken from, by its name; loaded when it is first needed."""

    name: str

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    @functools.cached_property
    def network(self) -> torch.nn.Module:
        """From images in [0, 1] to features."""
        if not self.is_inception:
            return ClassifierFeatures(load_classifier(self.name))
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        return torch.nn.Sequential(ToBytes(), network)

    def loaded(self, device: torch.device) -> torch.nn.Module:
        return self.network.to(device)

    @property
    def dimension(self) -> int:
        return 2048 if self.is_inception else self.network.num_features


def feature_network(surrogates: Sequence[str]) -> FeatureNetwork:
    """Inception v3 where torch-fidelity and its weights are at hand, else an embedded classifier, and no
    surrogate if there is another.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError:
        URL_INCEPTION_V3 = None
    if URL_INCEPTION_V3 is None or not is_at_hand(URL_INCEPTION_V3):
        networks = {split_name(name)[0] for name in surrogates}
        return FeatureNetwork(([name for name in REGISTRY if name not in networks] or list(REGISTRY))[-1])
    return FeatureNetwork(INCEPTION)


def check_reference(path: Path | None, surrogates: Sequence[str]) -> None:
    """Raises InputError where `--fid_reference` cannot be used with these surrogates."""
    if path is not None:
        network = feature_network(surrogates)
        read_reference(path, network.name, network.dimension)


class ToBytes(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 255).round().byte()


@torch.no_grad()
def features_of(
    network: torch.nn.Module, images: np.ndarray, device: torch.device, batch: int = 16
) -> torch.Tensor:
    """Features `(B, d)` in float64 of 8-bit pictures `(B, H, W, 3)`."""
    return torch.cat(
        [
            network(to_tensor(images[k : k + batch]).to(device)).double().cpu()
            for k in range(0, len(images), batch)
        ]
    )


def quality_of(
    by_image: Sequence[Mapping[str, np.ndarray]],
    features: Sequence[torch.Tensor],
    network: FeatureNetwork,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """All figures of visibility and realism; each of the attack beside that of the reconstruction alone.

    Args:
        by_image: measures by name, `(B,)`, of the adversarial pictures, and of the reconstructed, if any.
        features: of the clean pictures and of both, `(B, d)`.
    """
    summed = [means_of(figures) for figures in by_image]
    absent = [None] * (2 - len(by_image))
    quality = {
        name: Quality(*[means[name] for means in summed], *absent, by_image=values)
        for name, values in by_image[0].items()
    }
    if len(features[0]) >= 2:
        quality |= realism(features[0], features[1:], network, fid_reference)
    return quality


def realism(
    clean: torch.Tensor,
    sides: Sequence[torch.Tensor],
    network: FeatureNetwork,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """Kernel and Frechet distance of the features `(B, d)` of one or two sets of pictures to those of the
    clean ones, and Frechet distance to the statistics in a file.
    """
    count, dimension = clean.shape
    bias = (
        None
        if count > dimension
        else f"biased with {count} images and {dimension} features: not comparable with published figures"
    )
    absent, named = [None] * (2 - len(sides)), "" if network.is_inception else f", {network.name}"
    with progress(total=blocks_of(count, len(sides)), desc="kernel distance", unit="block") as bar:
        of_clean = KernelDistance(clean, bar.update)
        kernel = [of_clean.to(other) for other in sides]
    with progress(total=len(sides) * (1 + (fid_reference is not None)), desc="Frechet distance") as bar:
        frechet = []
        for other in sides:
            frechet.append(Estimate(frechet_distance(clean, other), math.nan, math.nan))
            bar.update()
        distances = {
            f"kernel distance{named}" if named else "KID": Quality(
                *kernel,
                *absent,
                note="can be below 0, since both sets show the same scenes",
                features=(clean, sides[0]),
            ),
            f"Frechet distance{named}" if named else "FID": Quality(*frechet, *absent, note=bias),
        }
        if fid_reference is not None:
            reference = read_reference(fid_reference, network.name, dimension)
            of_clean, *to_file = (
                Estimate(distance_to(reference, features), math.nan, math.nan) for features in (clean, *sides)
            )
            title = f"{'Frechet distance' if named else 'FID'} to {fid_reference.name}{named}"
            note = "; ".join(filter(None, [f"{of_clean} for the clean images", bias]))
            distances[title] = Quality(*to_file, *absent, note=note)
    return distances
