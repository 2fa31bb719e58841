"""Images on their way through an attack: what each has come to, and the batch that they share while the
network looks at them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffattack.data.history import AttackResult, stacked
from diffattack.data.records import AttackRecord
from diffattack.diffusion.attention import Reference, principal_components
from diffattack.diffusion.composition import Composition
from diffattack.diffusion.inversion import Inversion, LatentDiffusion
from diffattack.diffusion.latent_optimizers import AdamW, Momentum


@dataclass(eq=False)  # itself, not one that looks the same
class Course:
    """One image's way: its last picture that may be kept, with what belongs to it, and what each iteration
    left.
    """

    place: int  # in the order in which images came
    adversarial: torch.Tensor  # (3, H, W) in [0, 1]; the clean picture at first
    class_attention: torch.Tensor  # (grid, grid, tokens), averaged over timesteps
    self_attention: torch.Tensor  # (h, w, h * w), averaged over timesteps
    reconstruction: torch.Tensor | None  # (3, H, W) in [0, 1]; None where that is the clean picture
    iterations: int = 0  # that it took part in
    steps: int = 0  # of them, those that led to the picture
    reached: bool = False  # the margin that was asked for
    pictures_at: dict[int, torch.Tensor] = field(default_factory=dict)  # by iteration, as `adversarial`
    history: list[dict[str, torch.Tensor]] = field(default_factory=list)  # an entry an iteration
    gradient_norms: dict[int, torch.Tensor] = field(default_factory=dict)  # (3,), by iteration


@dataclass
class Going:
    """The images that are attacked at once, b of them, and what goes with them."""

    courses: list[Course]
    inversion: Inversion
    reference: Reference
    composition: Composition
    factors: torch.Tensor  # (3, b), of the terms of the loss
    optimizer: AdamW | Momentum
    checkpointing: bool = False  # whether the graph of one timestep at a time is alive

    @property
    def iterations(self) -> list[int]:
        return [course.iterations for course in self.courses]

    @property
    def begun(self) -> torch.Tensor:
        """`(b,)`, whether latents have moved: before that nothing has changed, and the rounding of another
        batch than that of the unperturbed run must not decide where something seems to.
        """
        return torch.tensor([number > 0 for number in self.iterations], device=self.factors.device)

    def note(
        self,
        said: dict[str, torch.Tensor],
        norms: torch.Tensor | None,
        measured: torch.Tensor,
        moved: torch.Tensor,
    ) -> None:
        """Counts an iteration of the images marked in `moved` `(b,)`, and keeps what it left.

        Args:
            said: `(..., b)` by name; weights that all images share, `(N,)`.
            norms: `(3, b)`, of the terms' gradients; of those marked in `measured` `(b,)`.
        """
        for row in moved.nonzero().view(-1).tolist():
            course = self.courses[row]
            course.iterations += 1
            course.history.append(
                {
                    name: values if name == "weights" and values.ndim == 1 else values[..., row : row + 1]
                    for name, values in said.items()
                }
            )
            if norms is not None and measured[row]:
                course.gradient_norms[course.iterations] = norms[:, row]

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with the images at these places of the batch alone."""
        self.courses, self.factors = [self.courses[row] for row in rows.tolist()], self.factors[:, rows]
        self.inversion, self.reference, self.composition = (
            part.keep(rows) for part in (self.inversion, self.reference, self.composition)
        )
        self.optimizer.keep(rows)

    def join(self, other: Going) -> None:
        """Goes on with the images of another batch behind its own."""
        self.courses = self.courses + other.courses
        self.factors = torch.cat([self.factors, other.factors], 1)
        for name in ("inversion", "reference", "composition"):
            setattr(self, name, getattr(self, name).join(getattr(other, name)))
        self.optimizer.join(other.optimizer)


def result_of(course: Course, going: Going, attack: LatentDiffusion) -> tuple[int, AttackResult]:
    """The place of an image that has ended, and what its attack returns, as a batch of one.

    Args:
        attack: a DiffAttack, which stands on this module and cannot be named here.
    """
    options, measured = attack.options, attack.measured_iterations
    for step in options.judge_at:  # which it did not come to
        course.pictures_at.setdefault(step, course.adversarial)
    absent = torch.full((3,), torch.nan, dtype=course.adversarial.dtype)
    norms = torch.stack([course.gradient_norms.get(number, absent).cpu() for number in measured])
    return course.place, AttackResult(
        course.adversarial[None],
        None if course.reconstruction is None else course.reconstruction[None],
        record_of(course, going, attack, norms[..., None], measured, options.iterations),
        torch.tensor([course.steps]),
        None if options.stop_margin is None else torch.tensor([course.reached]),
        {step: picture[None] for step, picture in course.pictures_at.items()},
    )


def record_of(
    course: Course,
    going: Going,
    model: LatentDiffusion,
    gradient_norms: torch.Tensor,
    measured: list[int],
    iterations: int,
) -> AttackRecord:
    """What each iteration left, and the attention of the attacked run beside the reference's."""
    row = going.courses.index(course)
    inversion, reference, tokenizer = going.inversion, going.reference, model.pipeline.tokenizer
    count = int(inversion.class_tokens[row].sum())
    (prompt,) = model.prompts(inversion.labels[row : row + 1])
    own = slice(1, 1 + count)  # between BOS and EOS
    ids = tokenizer(prompt, add_special_tokens=False).input_ids[:count]
    attention = torch.stack([reference.class_attention[row], course.class_attention])[..., own]
    components = principal_components(
        reference.self_attention[row : row + 1].cpu(), course.self_attention[None].cpu()
    )
    return AttackRecord(
        timesteps=model.timesteps.clone(),
        layers=list(reference.grids),
        grids=list(reference.grids.values()),
        gradient_iterations=measured,
        gradient_norms=gradient_norms,
        reference_squares=reference.squares[..., row : row + 1].cpu(),
        class_tokens=[[tokenizer.decode([token]).strip() for token in ids]],
        class_attention=attention.permute(0, 3, 1, 2)[..., None].float().cpu(),
        components=components.float(),
        **stacked(course.history, iterations),
    )
