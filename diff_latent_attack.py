"""The attack: DDIM inversion, null-text optimisation, and the latent optimised until a classifier fails.

    from diff_latent_attack import DiffAttack
    attack = DiffAttack(pipeline, classifier, weight_mode="fixed")
    result = attack(images, labels)             # (B, 3, H, W) in [0, 1] and (B,)
    result.adversarial                          # (B, 3, H, W) in [0, 1]
    result.record.layer_losses                  # what every iteration cost, by timestep and layer

The method is DiffAttack (Chen et al., "Diffusion Models for Imperceptible and Transferable Adversarial
Attack", TPAMI 2024, arXiv 2305.08192) with timestep weights on its self-attention loss. By default it goes
beyond that: a step is momentum's, the gradient comes through draws of resizing, and the picture is the clean
one plus the decoder's change, fine, almost grey and limited at each place; `--preset diffattack` does without
all these. Images in a batch never influence each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attentionControl import make_controller
from diffattack.classifiers.arguments import checked_arguments, checked_classifiers
from diffattack.classifiers.defences import at_a_stop, defend, under_attack
from diffattack.common.errors import InputError
from diffattack.common.frozen import frozen, recompute
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.images import rounded
from diffattack.diffusion.attention import (
    Reference,
    average_maps,
    maps_of,
    masked_variance,
    reference_run,
    self_attention_losses,
)
from diffattack.diffusion.batch import AttackResult, Batch, Outcome
from diffattack.diffusion.composition import Composition, attention_mask, change_limits
from diffattack.diffusion.inversion import Inversion, LatentDiffusion
from diffattack.diffusion.optimizers import AdamW, Momentum, norm
from diffattack.diffusion.pipeline import stance
from diffattack.evaluation.budget import least_change
from diffattack.losses import (
    Losses,
    Pass,
    factors_at_start,
    measure_gradients,
    measured_iterations,
    raise_if_not_finite,
    timestep_gradient_norms,
    verdict,
)
from diffattack.options import AttackOptions

if TYPE_CHECKING:  # diffusers takes seconds to import, and main.py answers bad input without it
    from diffusers import StableDiffusionPipeline


class DiffAttack(LatentDiffusion):
    """Attack on a classifier, or several at once, in the latent space of a Stable Diffusion model.

    Args:
        pipeline: any Stable Diffusion 1.x or 2.x pipeline; it decides device and dtype. In half precision the
            networks alone run in it: latents, losses, attention probabilities and the optimisers' states are
            float32.
        classifier: maps images `(B, 3, H, W)` in [0, 1] to logits `(B, classes)`, differentiably. Of several,
            the mean of their losses is attacked.
        class_names: the prompt of each label; ImageNet's by default, so give your own with a classifier of
            other classes.
        options: how to attack; see AttackOptions in options.py for each of them with its default.
        checkpointing: keep the graph of one timestep at a time and compute the others anew in the backward
            pass, which costs more time and less memory; None decides by the memory that is free.
        settings: options by name, such as `weight_mode="fixed"`; they come before those of `options`.
    Raises:
        InputError: a ValueError, of an option out of its range.
        TypeError: there is no option of that name.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        classifier: torch.nn.Module | Sequence[torch.nn.Module],
        class_names: Sequence[str] = IMAGENET_CLASSES,
        options: AttackOptions | None = None,
        *,
        checkpointing: bool | None = None,
        **settings,
    ):
        if settings.get("preset"):
            raise InputError("preset is for command lines; give **ATTACK_PRESETS[name] of options.py instead")
        # not by replacing defaults, which depend on each other
        options = AttackOptions(**settings) if options is None else replace(options, **settings)
        self.options = options
        options.verify()
        super().__init__(
            pipeline,
            class_names,
            diffusion_steps=options.diffusion_steps,
            start_step=options.start_step,
            guidance=options.guidance,
            inversion=options.inversion,
        )
        self.classifiers = checked_classifiers(classifier)
        self.head = options.classifier_head
        # what the gradient goes through; what judges is without these defences
        self.attacked = [
            defend(one, options.attack_through, self, options.draws, self.head) for one in self.classifiers
        ]
        self.checkpointing = checkpointing
        self.controller = make_controller(
            options.weight_mode, options.schedule, self.num_timesteps, options.seed, options.pace
        )
        self.measured_iterations = measured_iterations(
            options.iterations, options.structure_share, self.controller.follows_gradients
        )

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | Sequence,
        targets: torch.Tensor | Sequence[int] | None = None,
        progress: Callable[[int, torch.Tensor], None] | None = None,
        masks: torch.Tensor | None = None,
    ) -> AttackResult:
        """Attacks a batch.

        Args:
            images: `(B, 3, H, W)` in [0, 1]; H = W, a multiple of 32 from 96 on.
            labels: `(B,)`, indices into the classifier's output and into `class_names`; or `(B, L)` where
                images have up to L labels, -1 for those they lack.
            targets: `(B,)`, the classes that the classifier is to see; without them, or where it is -1, it is
                to see any but the image's own.
            progress: called after each iteration with its number and the three losses, on the CPU, of the
                images still attacked, `(3, b)` in the order of LOSS_TERMS.
            masks: `(B, 1, H, W)` in [0, 1]; where one is 0 its picture may not change.
        Raises:
            ValueError: of an argument, or a classifier's output, that is not as said here.
            NonFiniteLossError: a loss became NaN or infinite.
        """
        return self.attack(self.invert(*checked_arguments(self, images, labels, targets, masks)), progress)

    def attack(
        self, inversion: Inversion, progress: Callable[[int, torch.Tensor], None] | None = None
    ) -> AttackResult:
        """Optimises the start latents so that the classifier fails and the attention maps stay; see
        `__call__`. Images that have ended leave the batch.
        """
        iterations = self.options.iterations
        with (
            frozen(self.unet, self.vae, *self.classifiers),
            self.controller.attached(self.unet, self.branches),
        ):
            batch, outcome = self.begin(inversion)
            for iteration in range(1, iterations + 1):
                with stance(self.unet, "default"):
                    passed = self.forward(batch, iteration - 1)
                    ended = self.look(passed, batch, outcome, iteration - 1)
                    losses = self.losses(passed, batch, iteration)
                    weights, norms = self.controller.weights(), None
                    if not ended.all():
                        measured = ~ended & (iteration in self.measured_iterations)
                        norms = self.descend(losses, passed, batch, measured)
                left = verdict(losses, batch.factors, batch.inversion, self.head)
                outcome.add(batch.rows, left, weights, norms)
                if progress is not None:
                    progress(iteration, losses.terms.detach().cpu())
                if ended.all():
                    break
                if ended.any():
                    batch.keep(~ended)
                    self.controller.keep(~ended)
            else:
                with torch.no_grad():
                    self.look(self.forward(batch, iterations), batch, outcome, iterations)
        return outcome.result(self, self.measured_iterations)

    # ------------------------------------------------------------ the steps, in the order of the method

    def begin(self, inversion: Inversion) -> tuple[Batch, Outcome]:
        """The unperturbed run, and what the first iteration starts from."""
        options, images = self.options, inversion.images
        self.controller.begin(len(images))
        reference = reference_run(self, self.controller.collecting, inversion)
        composition, reconstruction = self.compose(inversion, reference)
        anew = not reference.graphs_fit() if self.checkpointing is None else self.checkpointing
        if options.latent_optimizer == "adamw":
            optimizer = AdamW(inversion.latents, options.latent_lr)
        else:
            radius = options.allowed_change.radius(images, images)
            optimizer = Momentum(inversion.latents, radius, options.iterations, images, reference.end)
        rows, factors = torch.arange(len(images)), factors_at_start(inversion, options)
        batch = Batch(rows, inversion, reference, composition, optimizer, factors, anew)
        return batch, Outcome(inversion, reference, reconstruction)

    @torch.no_grad()
    def compose(self, inversion: Inversion, reference: Reference) -> tuple[Composition, torch.Tensor | None]:
        """How decoded latents become pictures, and the unperturbed run's picture where it is not the clean
        one.
        """
        options, images, mask = self.options, inversion.images, inversion.masks
        unperturbed = self.decode(reference.end)
        if mask is None and (options.is_apply_mask or options.is_hard_mask):
            mask = attention_mask(reference.class_attention, inversion.class_tokens, images.shape[-2:])
        if mask is not None and options.is_hard_mask:
            mask = (mask > 0.5).to(mask)
        limits = change_limits(images, options.contrast_limit)
        base = unperturbed if options.composition == "residual" else None
        composition = Composition(images, base, limits, mask, options.high_pass, options.colour)
        return composition, composition(unperturbed) if base is None else None

    def forward(self, batch: Batch, steps: int) -> Pass:
        """From the start latents, which have moved so many steps, through all timesteps and the decoder to
        pictures.
        """
        clean, latents, anew = batch.inversion.images, batch.optimizer.latents, batch.checkpointing
        budget, of_timesteps = self.options.allowed_change, []
        for i in range(self.num_timesteps):
            latents, *seen = computed(self.timestep, latents, i, batch.inversion, batch.reference, anew=anew)
            of_timesteps.append(seen)
        layer_losses, class_attention, self_attention = map(torch.stack, zip(*of_timesteps))
        picture = computed(self.picture, latents, batch.composition, steps == 0, anew=anew)
        change = picture.detach() - clean
        fits = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
        if budget is not None and batch.optimizer.keeps_within:
            picture = budget.hold(clean, picture)
        elif budget is not None:
            fits = budget.fits(clean, picture.detach())
        layer_losses = layer_losses * float(steps > 0)  # before that maps differ by rounding alone
        return Pass(picture, change, fits, layer_losses, class_attention.mean(0), self_attention.mean(0))

    def timestep(
        self, latents: torch.Tensor, i: int, inversion: Inversion, reference: Reference
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The i-th attacked timestep: next latents; self-attention losses `(B, layers)`; cross-attention `(B,
        grid, grid, tokens)`; and, without a gradient, self-attention `(B, h, w, h * w)`.
        """
        reference_maps = maps_of(reference, self, self.controller.collecting, inversion, i)
        with self.controller.collecting(reference.looked_at) as maps:
            latents = self.guided_step(latents, i, inversion)
        losses = self_attention_losses(maps, reference_maps, self.options.layer_norm == "relative")
        return latents, losses, *average_maps(maps, inversion.images.shape[-1])

    def picture(self, latents: torch.Tensor, composition: Composition, unperturbed: bool) -> torch.Tensor:
        """Of the latents after all timesteps, `(b, 3, H, W)` in [0, 1]."""
        return composition(self.decode(latents), unperturbed)

    @torch.no_grad()
    def look(self, passed: Pass, batch: Batch, outcome: Outcome, steps: int) -> torch.Tensor:
        """Keeps the pictures after so many steps that are within the budget; of those that reach the margin,
        as small a part of their change as still does. Returns which images end, `(b,)` on the CPU: those that
        do, and those beyond the budget.
        """
        picture, fits = passed.picture.detach(), passed.fits.cpu()
        ended = ~fits
        if self.options.stop_margin is not None:

            def reaches(pictures: torch.Tensor) -> torch.Tensor:
                return self.margins(pictures, batch.inversion) >= self.options.stop_margin

            reached = passed.fits & reaches(picture)
            if reached.any():
                least = least_change(batch.inversion.images, picture, reaches)
                picture = torch.where(reached.view(-1, 1, 1, 1), least, picture)
            outcome.reached[batch.rows] = reached.cpu()
            ended = ended | reached.cpu()
        rows = batch.rows[fits]
        outcome.adversarial[rows] = picture[fits]
        outcome.class_attention[rows] = passed.class_attention[fits]
        outcome.self_attention[rows] = passed.self_attention[fits]
        outcome.steps[rows] = steps
        if steps in self.options.judge_at:
            outcome.pictures_at[steps] = outcome.adversarial.clone()
        return ended

    def margins(self, images: torch.Tensor, inversion: Inversion) -> torch.Tensor:
        """By how much every classifier is wrong about images `(b, 3, H, W)` once they are written, `(b,)`."""
        written = rounded(images, truncated=self.inversion == "diffattack")
        logits = torch.stack([at_a_stop(classifier, written) for classifier in self.classifiers])
        return self.head.margin(logits.float(), inversion.labels, inversion.targets).amin(0)

    def losses(self, passed: Pass, batch: Batch, iteration: int) -> Losses:
        """The three terms of the loss; NonFiniteLossError, before a gradient can spoil the weights."""
        inversion, temperature = batch.inversion, self.options.logit_temperature or 1.0
        seen = [under_attack(classifier, passed.picture, iteration - 1) for classifier in self.attacked]
        logits = torch.stack(seen).to(self.dtype)
        losses = Losses(
            attack=self.head.cross_entropy(logits, inversion.labels, inversion.targets, temperature),
            self_attention=self.controller.weighted_sum(passed.layer_losses.sum(-1)),
            cross_attention=masked_variance(passed.class_attention, inversion.class_tokens),
            layer_losses=passed.layer_losses,
            logits=logits,
            distance=norm(passed.picture.detach() - inversion.images),
        )
        raise_if_not_finite(losses, batch.factors, iteration, batch.rows)
        return losses

    def descend(
        self, losses: Losses, passed: Pass, batch: Batch, measured: torch.Tensor
    ) -> torch.Tensor | None:
        """One step down the gradient; the norms `(3, b)` of the terms' gradients, if those of any image are
        wanted, which `measured` `(b,)` marks.
        """
        optimizer, latents, norms = batch.optimizer, batch.optimizer.latents, None
        if measured.any():
            measured = measured.to(latents.device)
            if self.controller.follows_gradients:
                self.controller.balance(timestep_gradient_norms(losses, latents), measured)
            batch.factors, norms = measure_gradients(
                losses, batch.factors, latents, self.options.structure_share, measured
            )
            norms = norms.masked_fill(~measured, torch.nan)
        else:
            (batch.factors * losses.terms).sum(0).sum().backward()
        if optimizer.keeps_within:
            clean = batch.inversion.images
            optimizer.radius = self.options.allowed_change.radius(clean, clean + passed.change)
        optimizer.step(passed.change)
        self.controller.update(losses.timestep_losses.detach(), batch.factors[1])
        return norms


def computed(function: Callable, *arguments, anew: bool) -> object:
    """What it returns; where that has a graph, `anew` keeps none of it, and computes it once more in the
    backward pass.
    """
    if anew and torch.is_grad_enabled():
        return recompute(function, *arguments)
    return function(*arguments)
