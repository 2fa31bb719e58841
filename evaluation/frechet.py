"""Frechet distance to statistics that come in a file, as FIDs are published with: `--fid_reference`."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, one_line


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


def distance_to(reference: Reference, features: torch.Tensor) -> float:
    """Frechet distance |m - mu|^2 + tr(S + sigma - 2 (S sigma)^(1/2)) of the Gaussians of the reference and
    of features `(B, d)`, B at least 2 (Heusel et al., 2017).

    With S = R^T R, the eigenvalues of S sigma that are not zero are those of R sigma R^T, which is symmetric
    and no larger than the number of pictures: that spares the root of a matrix of d x d.
    """
    mean = features.mean(0)
    root = torch.linalg.qr(features - mean, mode="r").R / math.sqrt(len(features) - 1)
    spectrum = torch.linalg.eigvalsh(root @ reference.covariance @ root.T).clamp(min=0)
    variances = root.square().sum() + reference.covariance.trace()
    return float((mean - reference.mean).square().sum() + variances - 2 * spectrum.sqrt().sum())
