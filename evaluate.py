"""Judges an attack by the files that were written: who is fooled, and how much of the picture changed.

    from evaluate import predict, psnr
    labels, confidences = predict(classifier, images)     # images uint8 (B, H, W, 3), as read back from the PNGs
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image."""

    label: int
    confidence: float       # probability of that label
    true_confidence: float  # probability of the true label


@torch.no_grad()
def predict(classifier: torch.nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device, batch: int = 16) -> list[Prediction]:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)`."""
    predictions = []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start:start + batch]).to(device).permute(0, 3, 1, 2).float() / 255
        probabilities = classifier(x).softmax(-1)
        confidences, predicted = probabilities.max(-1)
        for row, c, p, label in zip(probabilities, confidences, predicted, labels[start:start + batch]):
            predictions.append(Prediction(int(p), float(c), float(row[label])))
    return predictions


def accuracy(predictions: list[Prediction], labels: np.ndarray) -> float:
    """Share of the predictions that are the true label; NaN for none."""
    return float(np.mean([p.label == label for p, label in zip(predictions, labels)])) if predictions else float("nan")


def attack_success(before: list[Prediction], after: list[Prediction], labels: np.ndarray) -> tuple[int, int]:
    """How many of the images classified correctly before are misclassified after, and how many were correct before."""
    correct = [p.label == int(label) for p, label in zip(before, labels)]
    fooled = [c and p.label != int(label) for c, p, label in zip(correct, after, labels)]
    return sum(fooled), sum(correct)


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit images `(H, W, 3)`; infinite when they are equal."""
    error = np.square(clean.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")
