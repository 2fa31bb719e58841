"""What an attack leaves of an image: the picture that is kept, and what its iterations cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from diffattack.data.records import KEPT_WHOLE, AttackRecord

# after an image's end these are as they were at its end; of other numbers there are none then
STAYS = ("weights", "fooled")


def stacked(entries: Sequence[dict[str, torch.Tensor]], iterations: int) -> dict[str, torch.Tensor]:
    """What each iteration left of an image, as `(iterations, ...)` by name, on the CPU; NaN after its end."""
    arrays = {}
    for name in entries[0]:
        values = [entry[name] for entry in entries]
        after = values[-1] if name in STAYS else torch.full_like(values[-1], torch.nan)
        arrays[name] = torch.stack(values + [after] * (iterations - len(values))).cpu()
    return arrays


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
    # of attacks on pixels, by image: the radius that the budget left it, None where it has none, and of how
    # many runs that was found
    searches: list[tuple[float | None, int]] | None = None


def joined_records(records: Sequence[AttackRecord]) -> AttackRecord:
    """The record of several images, of which each is a batch of one."""
    tokens = max(record.class_attention.shape[1] for record in records)
    joined = {}
    for field in fields(AttackRecord):
        values = [getattr(record, field.name) for record in records]
        if field.name == "class_attention":  # of prompts of different lengths
            padded = [value.new_zeros(2, tokens, *value.shape[2:]) for value in values]
            for target, value in zip(padded, values):
                target[:, : value.shape[1]] = value
            values = padded
        if field.name not in KEPT_WHOLE or (field.name == "weights" and values[0].ndim == 3):
            joined[field.name] = torch.cat(values, -1)
    return replace(records[0], **joined, class_tokens=[record.class_tokens[0] for record in records])


def joined_results(results: Sequence[AttackResult]) -> AttackResult:
    """The result of several images, of which each is a batch of one."""
    first = results[0]

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(result, name) for result in results]
        return None if parts[0] is None else torch.cat(parts)

    return AttackResult(
        joined("adversarial"),
        joined("reconstruction"),
        joined_records([result.record for result in results]),
        joined("steps"),
        joined("reached"),
        {step: torch.cat([result.pictures_at[step] for result in results]) for step in first.pictures_at},
        None if first.searches is None else [one for result in results for one in result.searches],
    )


def result_of_image(result: AttackResult, k: int) -> AttackResult:
    """The result of the k-th image, as a batch of one."""
    one = slice(k, k + 1)
    return AttackResult(
        result.adversarial[one],
        None if result.reconstruction is None else result.reconstruction[one],
        result.record.of_image(k),
        result.steps[one],
        None if result.reached is None else result.reached[one],
        {step: images[one] for step, images in result.pictures_at.items()},
        None if result.searches is None else result.searches[one],
    )
