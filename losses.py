"""The terms of the attack's loss, how strong each is, and what is asked of a classifier's logits."""

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


# ---------------------------------------------------------------- how strong each term is


def measured_iterations(iterations: int, structure_share: float | None) -> list[int]:
    """In which the gradient of each term is measured by itself: early, since in the first one nothing has
    changed yet, later, and at the end; where a factor depends on it, whenever the attack has gone some 60 %
    further (Fibonacci's numbers), as the structure term grows with the way.
    """
    numbers = [2, 10]
    if structure_share is not None:
        numbers = [2, 3]
        while sum(numbers[-2:]) < iterations:
            numbers.append(sum(numbers[-2:]))
    return sorted({min(number, iterations) for number in (*numbers, iterations)})


def measure_gradients(
    losses: Losses, factors: torch.Tensor, latents: torch.Tensor, structure_share: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `(3, B)` of the terms, renewed where `structure_share` is wanted, and the norms `(3, B)` of
    the gradients of the terms with these factors on the latents `(B, C, h, w)`; `latents.grad` is then that
    of their sum. It costs two backward passes more than that alone.
    """
    structure, cross = (
        torch.autograd.grad(term.sum(), latents, retain_graph=True)[0]
        for term in (losses.self_attention, losses.cross_attention)
    )
    (factors * losses.terms).sum().backward()
    structure_part, cross_part = (
        factor.view(-1, 1, 1, 1) * gradient for factor, gradient in zip(factors[1:], (structure, cross))
    )
    attack = latents.grad - structure_part - cross_part
    norms = torch.stack([part.flatten(1).norm(dim=1) for part in (attack, structure, cross)])
    if structure_share is not None:
        renewed = torch.where(norms[1] > 0, structure_share * norms[0] / norms[1], factors[1])
        latents.grad += (renewed - factors[1]).view(-1, 1, 1, 1) * structure
        factors = torch.stack([factors[0], renewed, factors[2]])
    return factors, norms * torch.cat([torch.ones_like(norms[:1]), factors[1:]])


def timestep_gradient_norms(losses: Losses, latents: torch.Tensor) -> torch.Tensor:
    """The norms `(N, B)` of the gradients of the unweighted `L_i` on the latents. That of the i-th goes back
    through i + 1 timesteps, so that all cost some three backward passes where N is 5.
    """
    gradients = [
        torch.autograd.grad(loss.sum(), latents, retain_graph=True)[0] for loss in losses.timestep_losses
    ]
    return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients])
