"""Our latent attack's momentum on pixels instead: steps of the same kind, through draws of the same resizing,
without any diffusion model. What the diffusion model is worth is measured against this; and it is an example
of an attack of one's own.

    python main.py --attack docs/pixel_attack.py:momentum
    python compare.py --attacks "diffattack,docs/pixel_attack.py:momentum(iterations=20,draws=4)"

docs/results.md and docs/appendix_choice.md say what follows.
"""

import torch

from diffattack.classifiers.defences import defend, under_attack
from diffattack.diffusion.optimizers import Momentum


def momentum(
    images: torch.Tensor,
    labels: torch.Tensor,
    classifier: torch.nn.Module,
    eps: float = 8.0,
    iterations: int = 20,
    draws: int = 4,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Images `(1, 3, H, W)` in [0, 1] to adversarial ones whose change, limited as the run limits it, has an
    L2 of about `eps`. The radius has the field's name, so that a run finds the one that its budget allows.
    """
    # resizing comes behind the limit at each place, of which there may be none
    picture_of = getattr(classifier, "picture", torch.nn.Identity())
    surrogate = defend(getattr(classifier, "logits", classifier), ["resize:0.9"])
    radius = torch.full((len(images),), eps).to(images)
    optimizer = Momentum(images, radius, iterations, images, images)
    for iteration in range(iterations):
        for draw in range(draws):  # gradients add up
            picture = picture_of(optimizer.latents).clamp(0, 1)
            logits = under_attack(surrogate, picture, iteration * draws + draw)
            if targets is None:
                (-torch.nn.functional.cross_entropy(logits, labels)).backward()
            else:
                torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step(picture.detach() - images)
    return optimizer.latents.detach()
