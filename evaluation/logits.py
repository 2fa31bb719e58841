"""What is asked of a classifier's logits: how sure it is of the true classes, and whether it is fooled."""

from __future__ import annotations

import torch


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Of each image's classes, or its target, the mean over them and over the classifiers: logits
    `(classifiers, B, classes)` to `(B,)`; labels and targets as for `fooled`.
    """
    aim = torch.where(targets[:, None] >= 0, targets[:, None], labels)  # (B, L)
    aim = marked(aim, logits.shape[-1]).to(logits)
    return -((aim / aim.sum(-1, keepdim=True)) * (logits / temperature).log_softmax(-1)).sum(-1).mean(0)


def marked(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels `(B, L)`, -1 for none, as `(B, classes)`, true at each."""
    return (labels[:, :, None] == torch.arange(classes, device=labels.device)).any(1)


def fooled(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether logits `(..., B, classes)` are highest at the target `(B,)`, or, where it is -1, at none of the
    labels `(B, L)`; `(..., B)`.
    """
    predicted = logits.argmax(-1)
    return torch.where(targets >= 0, predicted == targets, (predicted[..., None] != labels).all(-1))


def margin(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """By how much logits `(..., B, classes)` are wrong: the largest of a wrong class over the largest of a
    true one; with a target, the target's over the largest of the others; `(..., B)`.
    """
    aimed_at = targets[:, None] >= 0
    these = marked(torch.where(aimed_at, targets[:, None], labels), logits.shape[-1])  # (B, classes)
    inside = logits.masked_fill(~these, -torch.inf).amax(-1)
    outside = logits.masked_fill(these, -torch.inf).amax(-1)
    return torch.where(targets >= 0, inside - outside, outside - inside)
