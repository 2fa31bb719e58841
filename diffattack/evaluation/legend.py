"""What a table is read by: which images its success counts, and which way each measure of visibility and
realism goes, from where to where.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from diffattack.evaluation.predictions import ClassifierResult

COUNTED = "of the images that a classifier had right before"  # by ClassifierResult.success

# by measure: whether pictures are nearer to the clean ones the "higher" or the "lower" it is, and its range
MEASURES = {
    "SSIM": ("higher", "-1 to 1"),
    "MS-SSIM": ("higher", "0 to 1"),
    "FSIMc": ("higher", "0 to 1"),
    "HaarPSI": ("higher", "0 to 1"),
    "PSNR dB": ("higher", "0 up, infinite for equal pictures"),
    "GMSD": ("lower", "0 to 0.5"),
    "CIEDE2000": ("lower", "0 up, in units of CIELAB"),
    "L1 (levels)": ("lower", "0 to 255"),
    "L2": ("lower", "0 up, of values in [0, 1]"),
    "Linf (levels)": ("lower", "0 to 255"),
    "where smooth (levels)": ("lower", "0 to 255"),
    "LPIPS": ("lower", "0 up"),
    "kernel distance": ("lower", "about 0 up"),
    "KID": ("lower", "about 0 up"),
    "Frechet distance": ("lower", "0 up"),
    "FID": ("lower", "0 up"),
}


def legend_of_head(result: ClassifierResult) -> list[str]:
    """What is right, what is fooled, and what mAP is a mean of, where the head is sigmoid."""
    if result.head.threshold is None:
        return []
    limit, is_targeted = (
        f"{result.head.threshold:g}",
        result.targets is not None and (result.targets >= 0).any(),
    )
    lines = [
        f"right: at least one of an image's true classes has a probability above {limit}"
        + (", and before the attack its target has none" if is_targeted else "")
        + (f"; fooled: {'its target has one' if is_targeted else 'none of them has'}")
    ]
    if result.precisions:
        shown = ~np.isnan(result.precisions["after"])
        lines.append(
            f"mAP: the mean average precision over those {shown.sum()} of {len(shown)} classes "
            f"that an image shows"
        )
    return lines


def legend(rows: Iterable[str]) -> list[str]:
    """A line for each direction, of the measures that rows are named after: "KID", "Frechet distance to FILE,
    NETWORK".
    """
    present = {name.split(",")[0].split(" to ")[0] for name in rows}
    lines = []
    for way in ("higher", "lower"):
        told = [
            f"{name.removesuffix(' (levels)')} ({limits})"
            for name, (direction, limits) in MEASURES.items()
            if direction == way and name in present
        ]
        if told:
            lines.append(f"the {way}, the nearer: {', '.join(told)}")
    return lines
