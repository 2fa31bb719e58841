"""Frechet distance of two sets of pictures (Heusel et al., 2017), and to statistics that come in a file, as
FIDs are published with: `--fid_reference`. Features are gone through in blocks: they
may lie in a file.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffattack.common.errors import InputError, one_line


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


ROWS = 1024  # features that are looked at together


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
