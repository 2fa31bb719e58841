"""The terms of the attack's loss, what they are computed from, and how strong each is."""

from dataclasses import dataclass

import torch

from diffattack.classifiers.heads import Head, marked
from diffattack.common.errors import NonFiniteLossError
from diffattack.diffusion.inversion import Inversion
from diffattack.options import AttackOptions

LOSS_TERMS = ("attack", "self-attention", "cross-attention")


@dataclass
class Losses:
    """The three terms of the loss before their factors, and what they are made of."""

    attack: torch.Tensor  # (B,), cross-entropy in nats, binary with a sigmoid head
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


@dataclass
class Pass:
    """What the start latents of an iteration lead to, b images; with a graph where it is learnt from."""

    picture: torch.Tensor  # (b, 3, H, W) in [0, 1]
    change: torch.Tensor  # (b, 3, H, W), of the picture, before a budget is applied; without a graph
    fits: torch.Tensor  # (b,), whether the picture is within the budget
    layer_losses: torch.Tensor  # (N, b, layers): L_i by layer
    class_attention: torch.Tensor  # (b, grid, grid, tokens), averaged over timesteps
    self_attention: torch.Tensor  # (b, h, w, h * w), averaged over timesteps; without a graph


def factors_at_start(inversion: Inversion, options: AttackOptions) -> torch.Tensor:
    """Of the three terms of each image's loss, `(3, B)`: away from the true class, or towards the target
    where there is one; a factor that depends on gradients is zero until they have been measured.
    """
    away_or_towards = torch.where(inversion.targets >= 0, 1.0, -1.0).to(inversion.latents)
    structure = options.self_attn_loss_weight if options.structure_share is None else 0.0
    ones = torch.ones_like(away_or_towards)
    return torch.stack(
        [
            options.attack_loss_weight * away_or_towards,
            structure * ones,
            options.cross_attn_loss_weight * ones,
        ]
    )


def verdict(
    losses: Losses, factors: torch.Tensor, inversion: Inversion, head: Head
) -> dict[str, torch.Tensor]:
    """What the record keeps of an iteration beside the weights, such as who is fooled; factors `(3, B)` are
    those of the terms.
    """
    terms, logits = losses.terms.detach(), losses.logits.detach()
    true_classes = marked(inversion.labels, logits.shape[-1])
    return {
        **dict(zip(("attack_loss", "self_attention_loss", "cross_attention_loss"), terms)),
        "total_loss": (factors * terms).sum(0),
        "self_attention_factor": factors[1],
        "layer_losses": losses.layer_losses.detach().movedim(1, -1),
        "distance": losses.distance,
        "confidence": head.confidence(head.probabilities(logits).mean(0), true_classes),
        "fooled": head.fooled(logits, inversion.labels, inversion.targets).all(0),
    }


def raise_if_not_finite(losses: Losses, factors: torch.Tensor, iteration: int, rows: torch.Tensor) -> None:
    """Raises NonFiniteLossError where a term `(3, b)`, or the sum with these factors, is not finite; `rows`
    `(b,)` are the places of the images.
    """
    terms = losses.terms.detach()
    bad = (~torch.cat([terms, (factors * terms).sum(0)[None]]).isfinite()).nonzero().tolist()
    if bad:
        term, row = bad[0]
        raise NonFiniteLossError(iteration, (*LOSS_TERMS, "total")[term], int(rows[row]))


# ---------------------------------------------------------------- how strong each term is


def measured_iterations(iterations: int, structure_share: float | None, often: bool = False) -> list[int]:
    """In which the gradient of each term is measured by itself, since that costs time: in the first in which
    anything has changed, and in the last.

    Where a factor depends on it, whenever the attack has gone some 60 % further (Fibonacci's numbers), as the
    structure term grows with the way; where weights do (`often`), once more in the tenth.
    """
    numbers = [2, 10] if often else [2]
    if structure_share is not None:
        numbers = [2, 3]
        while sum(numbers[-2:]) < iterations:
            numbers.append(sum(numbers[-2:]))
    return sorted({min(number, iterations) for number in (*numbers, iterations)})


def measure_gradients(
    losses: Losses,
    factors: torch.Tensor,
    latents: torch.Tensor,
    structure_share: float | None,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `(3, B)` of the terms, renewed where `structure_share` is wanted for the images marked in
    `rows` `(B,)`, and the norms `(3, B)` of the gradients of the terms with these factors on the latents
    `(B, C, h, w)`; `latents.grad` is then that of their sum. It costs two backward passes more than that
    alone.
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
        renewed = torch.where(rows & (norms[1] > 0), structure_share * norms[0] / norms[1], factors[1])
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
