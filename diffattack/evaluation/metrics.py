"""How visible a change is: SSIM, PSNR, LPIPS, and measures that follow an eye more closely than SSIM does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from diffattack.common.environment import mend_torchvision
from diffattack.data.contrast import change_where_smooth
from diffattack.data.images import to_tensor
from diffattack.evaluation.budget import ssim
from diffattack.evaluation.statistics import Estimate, mean_over_images, means_over_images

SMALLEST_MS_SSIM = (11 - 1) * 2 ** (5 - 1) + 1  # pixels: the window of 11 at the coarsest of 5 scales


@dataclass(frozen=True)
class Quality:
    """One figure of the adversarial images and of the reconstructions, both against the clean images; by
    image where it has one.
    """

    adversarial: Estimate
    reconstructed: Estimate | None = None
    by_image: np.ndarray | None = None  # (B,), of the adversarial images
    note: str | None = None


def visibility(clean: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """How far 8-bit pictures `(B, H, W, 3)` are from the clean ones, by image `(B,)`.

    SSIM (Wang et al., 2004) and PSNR; of the difference, L1 as the mean over pixels and channels and Linf,
    both in 8-bit levels, and L2 as the Euclidean norm with values in [0, 1]; and `change_where_smooth`, NaN
    for a picture that is smooth nowhere.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = to_tensor(clean), to_tensor(other)
    difference = (b - a).double().flatten(1)
    return {
        "SSIM": ssim(a, b).numpy(),
        "PSNR dB": peak_signal_noise_ratio(
            b.double(), a.double(), data_range=1.0, reduction="none", dim=(1, 2, 3)
        ).numpy(),
        "L1 (levels)": 255 * torch.linalg.vector_norm(difference, 1, 1).numpy() / difference.shape[1],
        "L2": torch.linalg.vector_norm(difference, 2, 1).numpy(),
        "Linf (levels)": 255 * torch.linalg.vector_norm(difference, math.inf, 1).numpy(),
        "where smooth (levels)": change_where_smooth(a, b).double().numpy(),
    }


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit images `(H, W, 3)`; infinite when they are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(
        peak_signal_noise_ratio(to_tensor(other).double(), to_tensor(clean).double(), data_range=1.0)
    )


def perceptual(clean: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of 8-bit pictures `(B, H, W, 3)` beside the clean ones, by image `(B,)`.

    MS-SSIM (Wang et al., 2003), which is left out where a side is below 161 pixels, as its window does not
    fit into the coarsest of its five scales; FSIMc (Zhang et al., 2011), the form of FSIM that sees colours,
    too; HaarPSI (Reisenhofer et al., 2018): 1 for equal pictures. GMSD (Xue et al., 2014), a deviation, and
    CIEDE2000 (Sharma et al., 2005), the mean over pixels of the difference of colours in CIELAB: 0 for equal
    ones.
    """
    mend_torchvision()  # which piq imports
    import piq

    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "MS-SSIM": lambda a, b: piq.multi_scale_ssim(b, a, data_range=1.0),
        "FSIMc": lambda a, b: piq.fsim(b, a, data_range=1.0, chromatic=True),
        # in float32 its logit is off by 2e-6 at 1; black on black it is infinite
        "HaarPSI": lambda a, b: piq.haarpsi(b.double(), a.double(), data_range=1.0).clamp(max=1),
        "GMSD": lambda a, b: piq.gmsd(b, a, data_range=1.0),
    }
    if min(clean.shape[1:3]) < SMALLEST_MS_SSIM:
        del found["MS-SSIM"]
    # picture by picture: FSIM holds 16 filtered copies of each, and is quicker so
    pairs = [(to_tensor(clean[k]), to_tensor(other[k])) for k in range(len(clean))]
    by_image = {name: np.array([float(measure(*pair)) for pair in pairs]) for name, measure in found.items()}
    return by_image | {"CIEDE2000": np.array([colour_difference(a, b) for a, b in zip(clean, other)])}


def colour_difference(clean: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pixels of two 8-bit sRGB pictures `(H, W, 3)` of CIEDE2000."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(deltaE_ciede2000(rgb2lab(clean), rgb2lab(other)).mean())


def is_at_hand(url: str) -> bool:
    """Whether what torch.hub would download from there is in its cache: a run does not download what it was
    not asked for, and does not wait for a network that is not there.
    """
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


@functools.lru_cache(1)
def lpips_network(device: torch.device) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    settings = {"net_type": "alex", "reduction": "none", "normalize": True, "sync_on_compute": False}
    return LearnedPerceptualImagePatchSimilarity(**settings).to(device)


@torch.no_grad()
def lpips(clean: np.ndarray, other: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """LPIPS (Zhang et al., 2018) with torchvision's AlexNet by image, `(B,)`; none without its weights, of
    which docs/usage.md says how to get them.
    """
    from torchvision.models import AlexNet_Weights

    if not is_at_hand(AlexNet_Weights.DEFAULT.url):
        return {}
    pairs = ([to_tensor(side[k]).to(device) for side in (other, clean)] for k in range(len(clean)))
    return {"LPIPS": np.array([float(lpips_network(device)(*pair)) for pair in pairs])}


def measures(clean: np.ndarray, other: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """All measures of how far 8-bit pictures `(B, H, W, 3)` are from the clean ones, by image `(B,)`."""
    return visibility(clean, other) | perceptual(clean, other) | lpips(clean, other, device)


@functools.cache
def names_of_measures(size: int, device: torch.device) -> tuple[str, ...]:
    """Of those that can be had here for pictures of so many pixels a side."""
    black = np.zeros((1, size, size, 3), np.uint8)
    return tuple(measures(black, black, device))


def means_of(figures: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Means over images by name; those with a value for all of them are resampled together, and NaN is left
    out.
    """
    whole = {name: values for name, values in figures.items() if not np.isnan(values).any()}
    means = dict(zip(whole, means_over_images(np.stack(list(whole.values()))) if whole else ()))
    return {
        name: means[name] if name in means else mean_over_images(values[~np.isnan(values)])
        for name, values in figures.items()
    }
