"""Which images of a run have figures of their own, where it has more than anyone looks at: the extremes, and
some that nobody chose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIGURE_IMAGES = 12  # unless the user says otherwise
MOST, LEAST, DRAWN = "most visible", "least visible", "drawn by seed"


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
