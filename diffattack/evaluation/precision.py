"""How well a classifier with a sigmoid head tells each class, over all images: average precision by class.

It needs no threshold, and is what papers on several labels report, as its mean over classes (mAP), before an
attack and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from diffattack.evaluation.stats import Estimate

BLOCK = 2**24  # numbers that are read at once


@dataclass(frozen=True)
class Precision:
    """The average precision of each class, `(classes,)`; NaN for one that no image shows."""

    by_class: np.ndarray
    positives: np.ndarray  # (classes,), images that show it

    @cached_property
    def mean(self) -> Estimate:
        """mAP: over the classes that some image shows."""
        known = self.by_class[self.positives > 0]
        return Estimate(float(known.mean()) if len(known) else math.nan, math.nan, math.nan)


def average_precision(logits: np.ndarray, labels: np.ndarray) -> Precision:
    """Of logits `(B, classes)`, which may lie in a file, of images with labels `(B,)` or `(B, L)`, -1 for
    none; as torchmetrics' MultilabelAveragePrecision has it.
    """
    from scipy.stats import rankdata
    from torchmetrics.functional.classification import binary_average_precision

    images, classes = logits.shape
    positives = np.bincount(labels[labels >= 0], minlength=classes)  # labels of an image differ
    by_class, step = np.full(classes, np.nan), max(1, BLOCK // images)
    for start in range(0, classes, step):
        block = np.array(logits[:, start : start + step])
        for k in np.flatnonzero(positives[start : start + step]):
            true = (labels.reshape(images, -1) == start + k).any(1)
            # ranks, since the probabilities of sure answers are all one
            scores = torch.from_numpy(rankdata(block[:, k], "min") / images)
            by_class[start + k] = binary_average_precision(scores, torch.from_numpy(true.astype(np.int64)))
    return Precision(by_class, positives)


def described(precisions: Mapping[str, Precision], class_names: Sequence[str]) -> list[dict[str, object]]:
    """For JSON, by kind of picture: the average precision of each class that some image shows, and of how
    many images.
    """
    positives = next(iter(precisions.values())).positives
    return [
        {
            "class": class_names[k],
            "images": int(positives[k]),
            **{side: float(precision.by_class[k]) for side, precision in precisions.items()},
        }
        for k in np.flatnonzero(positives)
    ]
