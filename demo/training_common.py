"""What the stages of demo/train_tiny_diffusion.py share: the clock of a resumable training, and files that
are whole or not there.
"""

import math
import sys
import time
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))  # the stages use the project's own modules

import numpy as np
import torch

import diffattack.common.environment  # isort: skip  # noqa: F401
import diffattack.common.torchvision  # isort: skip  # noqa: F401

SIZE = 224


class Clock:
    """Minutes of training done so far, over several runs; gives the learning rate and says when to stop and
    to save.
    """

    def __init__(self, minutes: float, done_seconds: float = 0.0):
        self.total, self.done, self.last = minutes * 60, done_seconds, None
        self.saved = done_seconds

    def tick(self) -> bool:
        now = time.monotonic()
        if self.last is not None:
            self.done += min(now - self.last, 10)  # a pause, as of a laptop that sleeps, is no training
        self.last = now
        return self.done < self.total

    def learning_rate(self, peak: float, step: int, warmup: int = 200) -> float:
        return (
            peak
            * min(1.0, (step + 1) / warmup)
            * 0.5
            * (1 + math.cos(math.pi * min(1.0, self.done / self.total)))
        )

    def time_to_save(self) -> bool:
        if self.done - self.saved < 60:
            return False
        self.saved = self.done
        return True


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Written whole or not at all, so that what an interrupted run left is never taken for a finished
    file.
    """
    np.save(path.with_suffix(".partial.npy"), array)
    path.with_suffix(".partial.npy").replace(path)


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit `(B, H, W, 3)` to `(B, 3, H, W)` in [-1, 1]."""
    return pixels.movedim(-1, 1).float() / 127.5 - 1
