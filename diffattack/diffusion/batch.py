"""The images that are attacked at once, what is kept of each of them, and the result of an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace

import torch

from diffattack.data.records import AttackRecord
from diffattack.diffusion.attention import Reference, principal_components
from diffattack.diffusion.composition import Composition
from diffattack.diffusion.inversion import Inversion, LatentDiffusion
from diffattack.diffusion.optimizers import AdamW, Momentum

# after an image's end these are as they were at its end; of other numbers there are none then
LASTING = ("weights", "fooled")


@dataclass
class AttackResult:
    """What an attack on B images returns."""

    adversarial: torch.Tensor = field(repr=False)  # (B, 3, H, W) in [0, 1]
    # (B, 3, H, W) in [0, 1], what comes back without any attack; None where that is the clean image
    reconstruction: torch.Tensor | None = field(repr=False)
    # what every iteration cost, and what the attack did to the attention
    record: AttackRecord = field(repr=False)
    steps: torch.Tensor  # (B,), iterations that led to each picture
    reached: torch.Tensor | None  # (B,), whether `stop_margin` was; None without one
    pictures_at: dict[int, torch.Tensor] = field(repr=False)  # by iteration of `judge_at`, as `adversarial`
    # of attacks on pixels, by image: the radius that the budget left it, None where it has none, and of how
    # many runs that was found
    searches: list[tuple[float | None, int]] | None = None

    def of_image(self, k: int) -> AttackResult:
        """The result of the k-th image, as a batch of one."""
        names = ("adversarial", "reconstruction", "steps", "reached", "pictures_at")
        parts = {name: at_rows(getattr(self, name), torch.tensor([k])) for name in names}
        searches = None if self.searches is None else self.searches[k : k + 1]
        return replace(self, **parts, record=self.record.of_image(k), searches=searches)


@dataclass
class Batch:
    """The images that are still attacked, b of B, and what goes with them."""

    rows: torch.Tensor  # (b,), their places among all, on the CPU
    inversion: Inversion
    reference: Reference
    composition: Composition
    optimizer: AdamW | Momentum
    factors: torch.Tensor  # (3, b), of the terms of the loss
    checkpointing: bool  # whether the graph of one timestep at a time is alive

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with those images of the batch alone that `rows` `(b,)` marks or names."""
        for name in ("rows", "inversion", "reference", "composition"):
            setattr(self, name, at_rows(getattr(self, name), rows))
        self.factors = self.factors[:, rows]
        self.optimizer.keep(rows)


def at_rows(value: object, rows: torch.Tensor) -> object:
    """Of the images at these places of a batch alone: of tensors whose first axis is the images, and of what
    holds such tensors.
    """
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, list):
        return [at_rows(part, rows) for part in value]
    if isinstance(value, dict):
        return {name: at_rows(part, rows) for name, part in value.items()}
    if is_dataclass(value):
        return replace(
            value, **{part.name: at_rows(getattr(value, part.name), rows) for part in fields(value)}
        )
    return value


@dataclass
class Outcome:
    """What the attack has come to for each of all B images: the last picture that may be kept, with what
    belongs to it, and what every iteration left.
    """

    inversion: Inversion
    reference: Reference  # without its latents and maps
    reconstruction: torch.Tensor | None  # (B, 3, H, W) in [0, 1]; None where that is the clean picture
    pictures_at: dict[int, torch.Tensor] = field(default_factory=dict)  # by step, as `adversarial`
    # by iteration: the images that it looked at, (b,), and what it left of them, (..., b) by name
    history: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self):
        images, reference = self.inversion.images, self.reference
        self.reference = replace(reference, latents=[], maps=None)
        self.adversarial = images.clone()  # (B, 3, H, W) in [0, 1]; the clean pictures at first
        self.class_attention = reference.class_attention.clone()  # (B, grid, grid, tokens), over timesteps
        self.self_attention = reference.self_attention.clone()  # (B, h, w, h * w), averaged over timesteps
        self.steps = torch.zeros(len(images), dtype=torch.long)  # (B,), that led to the picture
        # (B,), whether `stop_margin` was reached
        self.reached = torch.zeros(len(images), dtype=torch.bool)

    def add(
        self,
        rows: torch.Tensor,
        left: Mapping[str, torch.Tensor],
        weights: torch.Tensor,
        gradient_norms: torch.Tensor | None,
    ) -> None:
        """What an iteration left of the images at these places `(b,)`.

        Args:
            left: `(..., b)` by name.
            weights: those in force, `(N,)` or `(N, b)`.
            gradient_norms: `(3, b)`, None where none were measured.
        """
        if weights.ndim == 1:
            weights = weights[:, None].expand(-1, len(rows))
        if gradient_norms is None:
            gradient_norms = left["attack_loss"].new_full((3, len(rows)), torch.nan)
        self.history.append((rows, {**left, "weights": weights, "gradient_norms": gradient_norms}))

    def result(self, attack: LatentDiffusion, measured: Sequence[int]) -> AttackResult:
        """What `attack`, a DiffAttack, returns; it measured gradients in these iterations, counted from 1."""
        options = attack.options
        # of iterations that an image did not come to, its last picture
        pictures_at = {steps: self.pictures_at.get(steps, self.adversarial) for steps in options.judge_at}
        record = self.record(attack, options.iterations, measured)
        if attack.controller.weights().ndim == 1:  # which all images share
            record.weights = record.weights[..., 0]
        reached = None if options.stop_margin is None else self.reached
        return AttackResult(self.adversarial, self.reconstruction, record, self.steps, reached, pictures_at)

    def record(self, model: LatentDiffusion, iterations: int, measured: Sequence[int]) -> AttackRecord:
        """What each of so many iterations left, and the attention of the attacked run beside the unperturbed
        one's.
        """
        arrays = stacked(self.history, len(self.steps), iterations)
        norms = arrays.pop("gradient_norms")[[number - 1 for number in measured]]
        reference, class_tokens = self.reference, self.inversion.class_tokens
        prompts, counts = model.words(model.prompts(self.inversion.labels)), class_tokens.sum(1).tolist()
        words = [prompt[:count] for prompt, count in zip(prompts, counts)]
        own = slice(1, 1 + max(map(len, words)))  # between BOS and EOS
        attention = torch.stack([reference.class_attention, self.class_attention])[..., own]
        attention = attention * class_tokens[:, None, None, own]  # of shorter prompts than another
        components = principal_components(reference.self_attention.cpu(), self.self_attention.cpu())
        return AttackRecord(
            timesteps=model.timesteps.clone(),
            layers=list(reference.grids),
            grids=list(reference.grids.values()),
            gradient_iterations=list(measured),
            gradient_norms=norms,
            reference_squares=reference.squares.permute(1, 2, 0).cpu(),
            class_tokens=words,
            class_attention=attention.permute(0, 4, 2, 3, 1).float().cpu(),
            components=components.float(),
            **arrays,
        )


def stacked(
    history: Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]], images: int, iterations: int
) -> dict[str, torch.Tensor]:
    """What each iteration left of images, as `(iterations, ..., images)` by name, on the CPU; NaN after an
    image's end, but for what is LASTING.

    Args:
        history: by iteration, which images it looked at, `(b,)`, and what it left of them, `(..., b)` by
            name.
    """
    arrays = {}
    for name, first in history[0][1].items():
        is_lasting = name in LASTING
        array = first.new_full((iterations, *first.shape[:-1], images), 0 if is_lasting else torch.nan)
        for k, (rows, left) in enumerate(history):
            array[k : None if is_lasting else k + 1, ..., rows] = left[name]
        arrays[name] = array.cpu()
    return arrays
