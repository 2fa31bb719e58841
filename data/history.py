"""What an attack on a batch leaves, image by image, where some images end before others: the pictures that
are kept, and what its iterations cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data.records import AttackRecord

# after an image's end these are as they were at its end; of other numbers there are none then
STAYS = ("weights", "fooled")


class History:
    """Arrays by name, one an iteration, whose last axis is the images that were attacked in it.

    Args:
        iterations: how many there are at most.
        images: of the batch.
    """

    def __init__(self, iterations: int, images: int):
        self.iterations, self.images = iterations, images
        self.entries: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []

    def append(self, rows: torch.Tensor, entry: dict[str, torch.Tensor]) -> None:
        """What an iteration left of the images at these places of the batch, `(b,)`."""
        self.entries.append((rows, entry))

    def stacked(self) -> dict[str, torch.Tensor]:
        """`(iterations, ..., images)` by name, on the CPU; NaN after an image's end. Weights that all images
        share are `(iterations, N)`.
        """
        return {name: self._stacked(name) for name in self.entries[0][1]}

    def _stacked(self, name: str) -> torch.Tensor:
        steps = []
        for rows, entry in self.entries:
            value = entry[name]
            if name == "weights" and value.ndim == 1:  # of all images
                whole = value
            else:
                whole = steps[-1].clone() if name in STAYS and steps else self._nothing(value)
                whole[..., rows.to(value.device)] = value
            steps.append(whole)
        after = whole if name in STAYS else torch.full_like(whole, torch.nan)
        return torch.stack(steps + [after] * (self.iterations - len(steps))).cpu()

    def _nothing(self, value: torch.Tensor) -> torch.Tensor:
        """Like `value`, of all images."""
        return value.new_full((*value.shape[:-1], self.images), torch.nan if value.is_floating_point() else 0)


@dataclass
class Found:
    """What is kept of a batch: of each image the last picture that may be kept, and its attention."""

    adversarial: torch.Tensor  # (B, 3, H, W) in [0, 1]
    class_attention: torch.Tensor  # (B, grid, grid, tokens), averaged over timesteps
    self_attention: torch.Tensor  # (B, h, w, h * w), averaged over timesteps
    steps: torch.Tensor  # (B,), after how many iterations that was
    reached: torch.Tensor  # (B,), whether it exceeds the margin that was asked for
    pictures_at: dict[int, torch.Tensor] = field(default_factory=dict)  # by iteration, as `adversarial`

    @classmethod
    def nothing(
        cls, images: torch.Tensor, class_attention: torch.Tensor, self_attention: torch.Tensor
    ) -> Found:
        """Before the first iteration: the clean images."""
        none = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return cls(images.clone(), class_attention.clone(), self_attention.clone(), none, none.bool())


@dataclass
class AttackResult:
    """What an attack on B images returns."""

    adversarial: torch.Tensor  # (B, 3, H, W) in [0, 1]
    # (B, 3, H, W) in [0, 1], what comes back without any attack; None where that is the clean image
    reconstruction: torch.Tensor | None
    record: AttackRecord  # what every iteration cost, and what the attack did to the attention
    steps: torch.Tensor  # (B,), iterations that led to each picture
    reached: torch.Tensor | None  # (B,), whether `stop_margin` was; None without one
    pictures_at: dict[int, torch.Tensor]  # by iteration of `judge_at`, as `adversarial`
