"""AdvAD (Li et al., NeurIPS 2024, "AdvAD: Exploring Non-Parametric Diffusion for Imperceptible Adversarial
Attacks"): from noise to the image along a diffusion path without a network, which the gradient bends.

    python main.py --attack "advad(steps=100)"
    adversarial = advad(images, labels, classifier, eps=8 / 255, steps=1000)

The path starts at `x_T = sqrt(abar_T) x + sqrt(1 - abar_T) e` and takes DDIM steps in which the noise `e` is
known. In each, guidance moves it by `d_t = -sqrt(1 - abar_t) grad log(1 - p(label))`, held at each pixel. The
noise itself cancels: with `s_t = sqrt(1 / abar_t - 1)` what the path has added to the image is

    change_{t-1} = change_t - (s_t - s_{t-1}) d_t,      s_0 = 0,      change_T = 0

and the clamp of `|d_t|` to `eps / s_T` holds the whole change to eps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TRAINED_STEPS, BETAS = 1000, (1e-4, 0.02)  # the linear schedule of Ho et al. (2020)


def noise_levels(steps: int) -> torch.Tensor:
    """`s_t`, `(steps,)` in float64, rising: evenly spaced timesteps of the schedule."""
    alphas_cumprod = (1 - torch.linspace(*BETAS, TRAINED_STEPS, dtype=torch.float64)).cumprod(0)
    return (1 / alphas_cumprod[:: TRAINED_STEPS // steps][:steps] - 1).sqrt()


def advad(
    images: torch.Tensor,
    labels: torch.Tensor,
    classifier: torch.nn.Module,
    eps: float = 8 / 255,
    steps: int = 1000,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Images `(B, 3, H, W)` in [0, 1] and labels `(B,)` to adversarial images.

    Args:
        classifier: from such images to logits `(B, classes)`.
        eps: the largest change of a value.
        steps: of the path, 1 to 1000.
        targets: `(B,)`, what the classifier is to see; None for anything but the labels.
    Raises:
        ValueError: of steps.
    """
    if not 1 <= steps <= TRAINED_STEPS:
        raise ValueError(f"steps is {steps}; expected 1 to {TRAINED_STEPS}")
    levels = [0.0, *noise_levels(steps).tolist()]
    change, guidance = torch.zeros_like(images), torch.zeros_like(images)
    for level, lower in zip(levels[:0:-1], levels[-2::-1]):
        predicted = (images + change - level * guidance).requires_grad_()
        logits = classifier(predicted.clamp(0, 1))
        gradient = torch.autograd.grad(objective(logits, labels, targets).sum(), predicted)[0]
        # on x_t it is that on the predicted image over sqrt(abar_t); the paper's values are from -1 to 1
        guidance = (-level * gradient / 4).clamp(-eps / levels[-1], eps / levels[-1])
        change = change - (level - lower) * guidance
    return (images + change).clamp(0, 1)


def objective(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """What the guidance raises, `(B,)`: log(1 - p(label)), or log p(target)."""
    log_probabilities = F.log_softmax(logits, -1)
    if targets is not None:
        return log_probabilities.gather(1, targets[:, None])[:, 0]
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    return log_probabilities.masked_fill(is_label, -torch.inf).logsumexp(-1)  # exact where p is nearly 1
