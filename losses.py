"""The terms of the attack's loss, and what is asked of a classifier's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOSS_TERMS = ("attack", "self-attention", "cross-attention")


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; `iteration` counts from 1, `term` is one of LOSS_TERMS or "total",
    `index` is the image's place in its batch.
    """

    def __init__(self, iteration: int, term: str, index: int):
        super().__init__(f"the {term} loss is not finite in iteration {iteration}")
        self.iteration, self.term, self.index = iteration, term, index


@dataclass
class Losses:
    """The three terms of the loss before their factors, and what they are made of."""

    attack: torch.Tensor  # (B,), cross-entropy in nats
    self_attention: torch.Tensor  # (B,), sum_i c_i L_i
    cross_attention: torch.Tensor  # (B,), variance
    layer_losses: torch.Tensor  # (N, B, layers): L_i by layer
    logits: torch.Tensor  # (classifiers, B, classes)
    distance: torch.Tensor  # (B,), of the image to the clean one, L2 with values in [0, 1]

    @property
    def terms(self) -> torch.Tensor:
        """`(3, B)`, in the order of LOSS_TERMS."""
        return torch.stack([self.attack, self.self_attention, self.cross_attention])

    @property
    def timestep_losses(self) -> torch.Tensor:
        """`L_i`, `(N, B)`: the sum over all self-attention layers."""
        return self.layer_losses.sum(-1)


def marked(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels `(B, L)`, -1 for none, as `(B, classes)`, true at each."""
    return (labels[:, :, None] == torch.arange(classes, device=labels.device)).any(1)


def fooled(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether logits `(..., B, classes)` are highest at the target `(B,)`, or, where it is -1, at none of the
    labels `(B, L)`; `(..., B)`.
    """
    predicted = logits.argmax(-1)
    return torch.where(targets >= 0, predicted == targets, (predicted[..., None] != labels).all(-1))


def raise_if_not_finite(losses: torch.Tensor, iteration: int) -> None:
    """Raises NonFiniteLossError for losses `(4, B)`: those of LOSS_TERMS, then their weighted sum."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        term, index = bad[0].tolist()
        raise NonFiniteLossError(iteration, (*LOSS_TERMS, "total")[term], index)
