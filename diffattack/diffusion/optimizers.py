"""What moves the start latents of an attack: AdamW, or momentum within a budget of change in the picture.

    optimizer = AdamW(latents, 0.01)           # latents (B, C, h, w)
    optimizer.latents                          # where to attack; requires a gradient
    optimizer.step(change)                     # once it has one; how far the pictures changed, (B, 3, H, W)

An image never influences another one of its batch.
"""

import torch


class AdamW:
    """torch's AdamW, which moves all numbers of the latents by about the learning rate in each step."""

    keeps_within = False  # a budget: an image ends where it would exceed it

    def __init__(self, latents: torch.Tensor, learning_rate: float):
        self.latents = latents.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.latents], lr=learning_rate)

    def step(self, change: torch.Tensor) -> None:
        """A step down the gradient in `latents.grad`."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with the images at these places of the batch alone."""
        state, rate = self.optimizer.state[self.latents], self.optimizer.defaults["lr"]
        self.latents = self.latents.detach()[rows].requires_grad_()
        self.optimizer = torch.optim.AdamW([self.latents], lr=rate)
        self.optimizer.state[self.latents] = {
            name: value[rows] if value.ndim else value for name, value in state.items()
        }


class Momentum:
    """Momentum of normalised gradients (Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR
    2018): `g <- g + gradient / mean |gradient|`, and a step along `g / ||g||`.

    A step is as long as would make the picture's distance grow by `2 radius / iterations`, by how far the
    step before it moved the picture; latents of a picture beyond its radius are drawn back towards the start.

    Args:
        latents: `(B, C, h, w)`, where it starts.
        radius: `(B,)`, how far a picture may change, L2 with values in [0, 1].
        iterations: how many steps there will be.
        images, end: `(B, 3, H, W)` and the latents `(B, C, h, w)` that they are decoded from: until a step
            has shown how far pictures move with their latents, the decoder is taken for a change of scale.
    """

    growth, keeps_within = 2.0, True
    by_image = ("start", "radius", "gain", "least_gain", "direction", "before", "moved")

    def __init__(
        self,
        latents: torch.Tensor,
        radius: torch.Tensor,
        iterations: int,
        images: torch.Tensor,
        end: torch.Tensor,
    ):
        self.start, self.latents = latents.clone(), latents.clone().requires_grad_()
        self.radius, self.iterations = radius, iterations
        sizes = (norm(values - values.mean((1, 2, 3), keepdim=True)) for values in (images, end))
        gain = next(sizes) / next(sizes).clamp(min=1e-6)  # (B,), of the picture by its latents
        self.gain = torch.where(gain > 0, gain, 1.0)
        # Where limits or a mask hold a picture back, its latents must not be driven ever further for that.
        self.least_gain = 0.1 * self.gain
        self.direction = torch.zeros_like(latents)
        self.before = torch.zeros_like(images)  # the change of the picture before the last step
        self.moved = torch.zeros_like(radius)  # (B,), how far the last step moved the latents

    @torch.no_grad()
    def step(self, change: torch.Tensor) -> None:
        """A step down the gradient in `latents.grad`.

        Args:
            change: `(B, 3, H, W)`, of the pictures of the latents as they are, before a budget is applied.
        """
        travelled = norm(change - self.before)
        known = (travelled > 0) & (self.moved > 0)  # not before the first step
        gain = torch.where(known, travelled / self.moved.clamp(min=1e-30), self.gain)
        self.gain = torch.maximum(gain, self.least_gain)
        gradient = self.latents.grad
        self.direction -= gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        beyond = (self.radius / norm(change).clamp(min=1e-30)).clamp(max=1)
        latents = self.start + as_batch(beyond) * (self.latents - self.start)
        length = self.growth * self.radius / self.iterations / self.gain
        latents += as_batch(length / norm(self.direction).clamp(min=1e-30)) * self.direction
        self.before, self.moved = change, norm(latents - self.latents)
        self.latents = latents.requires_grad_()

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with the images at these places of the batch alone."""
        for name in self.by_image:
            setattr(self, name, getattr(self, name)[rows])
        self.latents = self.latents.detach()[rows].requires_grad_()


def norm(values: torch.Tensor) -> torch.Tensor:
    """L2 of each image of a batch: `(B, ...)` to `(B,)`."""
    return values.flatten(1).norm(dim=1)


def as_batch(numbers: torch.Tensor) -> torch.Tensor:
    """`(B,)` to `(B, 1, 1, 1)`."""
    return numbers.view(-1, 1, 1, 1)
