"""What a classifier says of pictures, and whether it is right or fooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from images import to_tensor


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image."""

    label: int
    confidence: float  # probability of that label
    true_confidence: float  # probability of the true label, or of all of them

    def described(self, class_names: Sequence[str], base: int) -> dict:
        """For results.json: the label counted from `base`, and its class."""
        return {**asdict(self), "label": self.label + base, "class": class_names[self.label]}

    @classmethod
    def of_description(cls, description: dict, base: int) -> Prediction:
        """The prediction that `described` described."""
        return cls(description["label"] - base, description["confidence"], description["true_confidence"])


@torch.no_grad()
def predict(
    classifier: torch.nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device, batch: int = 16
) -> list[Prediction]:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)` or `(B, L)`."""
    predictions = []
    for start in range(0, len(images), batch):
        probabilities = classifier(to_tensor(images[start : start + batch]).to(device)).softmax(-1)
        confidences, predicted = probabilities.max(-1)
        for row, c, p, label in zip(
            probabilities, confidences, predicted, labels.reshape(len(labels), -1)[start : start + batch]
        ):
            predictions.append(Prediction(int(p), float(c), float(row[label[label >= 0]].sum())))
    return predictions


def correct(predictions: Sequence[Prediction], labels: np.ndarray) -> np.ndarray:
    """Whether each prediction is the label, or one of them: `(B,)`."""
    return (np.array([p.label for p in predictions], int)[:, None] == labels.reshape(len(labels), -1)).any(1)


def fooled(predictions: Sequence[Prediction], labels: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
    """Whether each prediction is the target, or, where there is none, no true label: `(B,)`."""
    wrong = ~correct(predictions, labels)
    return (
        wrong
        if targets is None
        else np.where(targets >= 0, np.array([p.label for p in predictions], int) == targets, wrong)
    )
