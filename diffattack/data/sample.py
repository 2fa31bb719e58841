"""Which images of a run have figures of their own, where it has more than anyone looks at: the extremes, and
some that nobody chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIGURE_IMAGES = 12  # unless the user says otherwise
MOST, LEAST, DRAWN = "most visible", "least visible", "drawn by seed"


@dataclass(frozen=True)
class Sample:
    """Some of the images of a run, or all of them."""

    images: int  # of the run
    seed: int
    why: dict[int, str]  # by place among the run's images, MOST, LEAST or DRAWN; "" where all are chosen

    @property
    def is_part(self) -> bool:
        return len(self.why) < self.images

    def __str__(self) -> str:
        counts = Counter(self.why.values())
        parts = (f"{counts[why]:,} {why}" for why in (MOST, LEAST, DRAWN) if counts[why])
        return f"figures of {len(self.why):,} of {self.images:,} images: {', '.join(parts)} {self.seed}"


def choose(psnr: Sequence[float], count: int, seed: int) -> Sample:
    """A third the most visible, a third the least, and the rest drawn from the others, so many together, in
    this order; the most extreme first, and those that are drawn in the order of the run. The same for the
    same arguments.

    Args:
        psnr: of each image of a run, in dB; the lower, the more visible. Of equal ones the first counts as
            the more visible.
    """
    if len(psnr) <= count:
        return Sample(len(psnr), seed, dict.fromkeys(range(len(psnr)), ""))
    by_visibility = np.argsort(np.nan_to_num(psnr, nan=np.inf), kind="stable").tolist()
    most = -(-count // 3)
    least = -(-(count - most) // 2)
    others = sorted(by_visibility[most : len(psnr) - least])
    drawn = np.random.default_rng(seed).choice(others, count - most - least, replace=False)
    return Sample(
        len(psnr),
        seed,
        {
            **dict.fromkeys(by_visibility[:most], MOST),
            **dict.fromkeys(by_visibility[::-1][:least], LEAST),
            **dict.fromkeys(sorted(drawn.tolist()), DRAWN),
        },
    )
