"""How visible a change is by measures that follow an eye more closely than SSIM does, and need no weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from diffattack.common.environment import mend_torchvision
from diffattack.common.errors import note, one_line
from diffattack.data.images import to_tensor

SMALLEST_MS_SSIM = (11 - 1) * 2 ** (5 - 1) + 1  # pixels: the window of 11 at the coarsest of 5 scales


@functools.cache
def perceptual_is_at_hand() -> bool:
    """Whether piq can be imported; where it cannot, as without a torchvision that fits torch, it says so."""
    mend_torchvision()  # which piq imports
    try:
        import piq  # noqa: F401
    except ImportError as error:
        note(f"without piq there are no MS-SSIM, FSIMc, HaarPSI, GMSD and CIEDE2000: {one_line(error)}")
        return False
    return True


def perceptual(clean: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of 8-bit pictures `(B, H, W, 3)` beside the clean ones, by image `(B,)`.

    MS-SSIM (Wang et al., 2003), which is left out where a side is below 161 pixels, as its window does not
    fit into the coarsest of its five scales; FSIMc (Zhang et al., 2011), the form of FSIM that sees colours,
    too; HaarPSI (Reisenhofer et al., 2018): 1 for equal pictures. GMSD (Xue et al., 2014), a deviation, and
    CIEDE2000 (Sharma et al., 2005), the mean over pixels of the difference of colours in CIELAB: 0 for equal
    ones.

    Raises:
        ImportError: piq cannot be imported, as where there is no torchvision that fits torch.
    """
    mend_torchvision()  # which piq imports
    import piq

    measures: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "MS-SSIM": lambda a, b: piq.multi_scale_ssim(b, a, data_range=1.0),
        "FSIMc": lambda a, b: piq.fsim(b, a, data_range=1.0, chromatic=True),
        # in float32 its logit is off by 2e-6 at 1; black on black it is infinite
        "HaarPSI": lambda a, b: piq.haarpsi(b.double(), a.double(), data_range=1.0).clamp(max=1),
        "GMSD": lambda a, b: piq.gmsd(b, a, data_range=1.0),
    }
    if min(clean.shape[1:3]) < SMALLEST_MS_SSIM:
        del measures["MS-SSIM"]
    # picture by picture: FSIM holds 16 filtered copies of each, and is quicker so
    pairs = [(to_tensor(clean[k]), to_tensor(other[k])) for k in range(len(clean))]
    figures = {
        name: np.array([float(measure(a, b)) for a, b in pairs], np.float64)
        for name, measure in measures.items()
    }
    return figures | {"CIEDE2000": np.array([colour_difference(a, b) for a, b in zip(clean, other)])}


def colour_difference(clean: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pixels of two 8-bit sRGB pictures `(H, W, 3)` of CIEDE2000."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(deltaE_ciede2000(rgb2lab(clean), rgb2lab(other)).mean())
