"""The attack: DDIM inversion, null-text optimisation, and the latent optimised until a classifier fails.

    from diff_latent_attack import DiffAttack
    attack = DiffAttack(pipeline, classifier, weight_mode="fixed")
    result = attack(images, labels)             # (B, 3, H, W) in [0, 1] and (B,)
    result.adversarial                          # (B, 3, H, W) in [0, 1]
    result.record.layer_losses                  # what every iteration cost, by timestep and layer

The method is DiffAttack (Chen et al., "Diffusion Models for Imperceptible and Transferable Adversarial
Attack", TPAMI 2024, arXiv 2305.08192) with timestep weights on its self-attention loss. Images in a batch
never influence each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from attentionControl import (
    Maps,
    Reference,
    average_attention,
    make_controller,
    masked_variance,
    principal_components,
    self_attention_losses,
)
from classifiers.defences import Defended, defend
from common.devices import bytes_saved, free_memory
from common.errors import InputError
from data.class_names import IMAGENET_CLASSES
from data.history import AttackResult, Found, History
from data.images import rounded
from data.records import AttackRecord
from diffusion.composition import Composition, attention_mask, change_limits
from diffusion.inversion import Inversion, LatentDiffusion, frozen
from diffusion.latent_optimizers import AdamW, Momentum, norm
from evaluation.budget import least_change
from losses import (
    Going,
    Losses,
    Pass,
    cross_entropy,
    factors_at_start,
    margin,
    measure_gradients,
    measured_iterations,
    raise_if_not_finite,
    timestep_gradient_norms,
    verdict,
)
from options import AttackOptions
from timestep_weights import Pace

if TYPE_CHECKING:  # diffusers takes seconds to import, and main.py answers bad input without it
    from diffusers import StableDiffusionPipeline

# Of the memory that is free: the reference maps are kept where they take at most this share of it, else
# computed anew at each timestep; and the graphs of all timesteps are alive at once where all that the attack
# keeps is estimated at no more than the second, else one at a time.
REFERENCE_SHARE, GRAPH_SHARE = 0.25, 0.6


class DiffAttack(LatentDiffusion):
    """Attack on a classifier, or several at once, in the latent space of a Stable Diffusion model.

    Args:
        pipeline: any Stable Diffusion 1.x or 2.x pipeline, epsilon- or v-prediction; it decides device and
            dtype. In half precision the networks alone run in it: latents, losses, attention probabilities
            and the optimisers' states are float32.
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
        self.classifiers = [classifier] if isinstance(classifier, torch.nn.Module) else list(classifier)
        # what the gradient goes through; what judges is without these defences
        self.attacked = [
            defend(classifier, options.attack_through, self, options.draws) for classifier in self.classifiers
        ]
        self.checkpointing = checkpointing
        self.controller = make_controller(
            options.weight_mode,
            options.schedule,
            options.weight_lr,
            self.num_timesteps,
            options.seed,
            Pace(options.weight_step, options.weight_pull),
        )
        self.measured_iterations = measured_iterations(
            options.iterations, options.structure_share, self.controller.follows_gradients
        )

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
        progress: Callable[[int, torch.Tensor], None] | None = None,
        masks: torch.Tensor | None = None,
    ) -> AttackResult:
        """Attacks a batch.

        Args:
            images: `(B, 3, H, W)` in [0, 1]; H = W, a multiple of 32.
            labels: `(B,)`, indices into the classifier's output and into `class_names`; or `(B, L)` where
                images have up to L labels, -1 for those they lack.
            targets: `(B,)`, the classes that the classifier is to see; without them, or where it is -1, it is
                to see any but the image's own.
            progress: called after each iteration with its number and the three losses, on the CPU, of the
                images still attacked, `(3, b)` in the order of LOSS_TERMS.
            masks: `(B, 1, H, W)` in [0, 1]; where one is 0 its picture may not change.
        Raises:
            NonFiniteLossError: a loss became NaN or infinite.
        """
        return self.attack(self.invert(images, labels, targets, masks), progress)

    def attack(
        self, inversion: Inversion, progress: Callable[[int, torch.Tensor], None] | None = None
    ) -> AttackResult:
        """Optimises the start latent so that the classifier fails and the attention maps stay; see
        `__call__`.
        """
        with (
            frozen(self.unet, self.vae, *self.classifiers),
            self.controller.attached(self.unet, self.branches),
        ):
            reference = self.reference_run(inversion)
            composition, unperturbed = self.compose(inversion, reference)
            found, history, norms = self.optimise_latents(inversion, reference, composition, progress)
            return AttackResult(
                found.adversarial,
                composition(unperturbed) if composition.base is None else None,
                self.make_record(history, norms, inversion, reference, found),
                found.steps,
                found.reached if self.options.stop_margin is not None else None,
                found.pictures_at,
            )

    # ------------------------------------------------------------ the steps, in the order of the method

    def reference_run(self, inversion: Inversion) -> Reference:
        """The unperturbed run from z_N: its latents, its self-attention maps where they fit, and what a
        timestep of the perturbed run will keep.
        """
        latents, before, maps, averages, squares = inversion.latents, [], [], [], []
        for i in range(self.num_timesteps):
            before.append(latents)
            # the first timestep builds the graph that each perturbed timestep will build, only to see how
            # large it is
            with (
                torch.set_grad_enabled(i == 0),
                self.controller.collecting() as step_maps,
                bytes_saved(self.unet) as saved,
            ):
                latents = self.guided_step(latents.clone().requires_grad_(i == 0), i, inversion).detach()
            step_maps = {layer: attention.detach() for layer, attention in step_maps.items()}
            if i == 0:
                graph_bytes, map_bytes = (
                    sum(saved),
                    sum(m.nbytes for layer, m in step_maps.items() if not layer.is_cross),
                )
                fits = self.num_timesteps * map_bytes <= REFERENCE_SHARE * free_memory(latents.device)
            averages.append(self.average_maps(step_maps, inversion))
            maps.append({layer: attention for layer, attention in step_maps.items() if not layer.is_cross})
            grids = {layer.name: math.isqrt(attention.shape[2]) for layer, attention in maps[-1].items()}
            squares.append(torch.stack([m.square().mean((1, 2, 3)) for m in maps[-1].values()]))
            if not fits:
                maps[-1] = {}
        class_attention, self_attention = (torch.stack(steps).mean(0) for steps in zip(*averages))
        return Reference(
            before,
            maps if fits else None,
            latents,
            class_attention,
            self_attention,
            grids,
            graph_bytes + map_bytes,
            torch.stack(squares),
        )

    @torch.no_grad()
    def reference_maps(self, reference: Reference, i: int, inversion: Inversion) -> Maps:
        """The unperturbed run's self-attention maps at the i-th attacked timestep, kept or computed anew."""
        if reference.maps is not None:
            return reference.maps[i]
        with self.controller.collecting() as maps:
            self.guided_step(reference.latents[i], i, inversion)
        return {layer: attention for layer, attention in maps.items() if not layer.is_cross}

    @torch.no_grad()
    def compose(self, inversion: Inversion, reference: Reference) -> tuple[Composition, torch.Tensor]:
        """How decoded latents become pictures, and what the decoder gives of the unperturbed run."""
        options, images = self.options, inversion.images
        unperturbed = self.decode(reference.end)
        mask, limits = inversion.masks, None
        if mask is None and (options.is_apply_mask or options.is_hard_mask):
            mask = attention_mask(reference.class_attention, inversion.class_tokens, images.shape[-2:])
        if mask is not None and options.is_hard_mask:
            mask = (mask > 0.5).to(mask)
        if options.contrast_limit is not None:
            limits = change_limits(images, options.contrast_limit)
        base = unperturbed if options.composition == "residual" else None
        return Composition(images, base, limits, mask), unperturbed

    def optimise_latents(
        self,
        inversion: Inversion,
        reference: Reference,
        composition: Composition,
        progress: Callable[[int, torch.Tensor], None] | None = None,
    ) -> tuple[Found, dict[str, torch.Tensor], torch.Tensor]:
        """The latent attack from z_N: what is found; what the iterations leave for the record, by the names
        of AttackRecord; and `gradient_norms` in `measured_iterations`, `(M, 3, B)`.

        An iteration looks at the picture of the latents as they are and then moves them, so that the picture
        after K iterations is looked at in a last pass, from which nothing is learnt.
        """
        options, images, checkpointing = self.options, inversion.images, self.is_checkpointed(reference)
        going = self.begin(inversion, reference, composition)
        found = Found.nothing(images, reference.class_attention, reference.self_attention)
        history, absent = History(options.iterations, len(images)), torch.full((3, len(images)), torch.nan)
        norms = dict.fromkeys(self.measured_iterations, absent)
        for iteration in range(1, options.iterations + 1):
            passed = self.forward(going, checkpointing)
            weights = self.controller.weights()
            terms = passed.losses.terms.detach()
            read = torch.cat([terms, (going.factors * terms).sum(0)[None]]).cpu()
            raise_if_not_finite(read, iteration, going.rows)  # before a gradient can spoil the weights
            stay = ~self.judge(passed, going, found, iteration - 1)
            measured = self.descend(passed, going, iteration) if stay.any() else None
            if measured is not None:
                norms[iteration] = absent.to(measured.dtype, copy=True)
                norms[iteration][:, going.rows.cpu()] = measured.cpu()
            said = verdict(passed.losses, going.factors, going.inversion.labels, going.inversion.targets)
            history.append(going.rows, said | {"weights": weights})
            if progress is not None:
                progress(iteration, read[:-1])
            if not stay.any():
                break
            if not stay.all():
                going.keep(stay)
                self.controller.keep(stay.nonzero().view(-1))
        else:
            with torch.no_grad():
                self.judge(self.forward(going, learns=False), going, found, options.iterations)
        for step in options.judge_at:  # of images that all ended before
            found.pictures_at.setdefault(step, found.adversarial.clone())
        return found, history.stacked(), torch.stack([norms[k] for k in self.measured_iterations])

    def begin(self, inversion: Inversion, reference: Reference, composition: Composition) -> Going:
        """The state of the attack before its first iteration."""
        options, images = self.options, inversion.images
        self.controller.begin(len(images))
        for classifier in (*self.attacked, *self.classifiers):
            if isinstance(classifier, Defended):
                classifier.restart()
        if options.latent_optimizer == "adamw":
            optimizer = AdamW(inversion.latents, options.latent_lr)
        else:
            radius = options.allowed_change.radius(images, images)
            optimizer = Momentum(inversion.latents, radius, options.iterations, images, reference.end)
        rows, factors = torch.arange(len(images)), factors_at_start(inversion.targets, options)
        return Going(rows.to(images.device), inversion, reference, composition, factors, optimizer)

    def is_checkpointed(self, reference: Reference) -> bool:
        """Whether the graph of one timestep at a time is alive."""
        if self.checkpointing is not None:
            return self.checkpointing
        return self.num_timesteps * reference.graph_bytes > GRAPH_SHARE * free_memory(reference.end.device)

    @torch.no_grad()
    def judge(self, passed: Pass, going: Going, found: Found, step: int) -> torch.Tensor:
        """Keeps the pictures after so many steps, as far as they are within the budget; which images end with
        them, `(b,)`: those beyond the budget, and those that reach the margin, by as small a part of their
        change as still does.
        """
        ended, places, clean = ~passed.fits, going.rows[passed.fits], going.inversion.images
        if self.options.stop_margin is not None:

            def reaches(images: torch.Tensor) -> torch.Tensor:
                return self.margins(images, going.inversion) >= self.options.stop_margin

            reached = passed.fits & reaches(passed.adversarial)
            found.reached[going.rows] = reached
            if reached.any():
                least = least_change(clean, passed.adversarial, reaches)
                passed.adversarial = torch.where(reached.view(-1, 1, 1, 1), least, passed.adversarial)
            ended |= reached
        for name in ("adversarial", "class_attention", "self_attention"):
            getattr(found, name)[places] = getattr(passed, name)[passed.fits]
        found.steps[places] = step
        if step in self.options.judge_at:
            found.pictures_at[step] = found.adversarial.clone()
        return ended

    def margins(self, images: torch.Tensor, inversion: Inversion) -> torch.Tensor:
        """By how much every classifier is wrong about images `(b, 3, H, W)` once they are written, `(b,)`."""
        written = rounded(images, truncated=self.inversion == "diffattack")
        logits = torch.stack([classifier(written) for classifier in self.classifiers])
        return margin(logits.float(), inversion.labels, inversion.targets).amin(0)

    def descend(self, passed: Pass, going: Going, iteration: int) -> torch.Tensor | None:
        """One step down the gradient; the norms `(3, b)` of the terms' gradients if they are measured."""
        losses, latents, measured = passed.losses, going.optimizer.latents, None
        if iteration in self.measured_iterations:
            if self.controller.follows_gradients:
                self.controller.balance(timestep_gradient_norms(losses, latents))
            going.factors, measured = measure_gradients(
                losses, going.factors, latents, self.options.structure_share
            )
        else:
            (going.factors * losses.terms).sum(0).sum().backward()
        if going.optimizer.keeps_within:
            clean = going.inversion.images
            going.optimizer.radius = self.options.allowed_change.radius(clean, clean + passed.change)
        going.optimizer.step(passed.change)
        self.controller.update(losses.timestep_losses.detach(), going.factors[1])
        return measured

    def forward(self, going: Going, checkpointing: bool = False, learns: bool = True) -> Pass:
        """From the start latents through all timesteps and the decoder to pictures, and to the three terms of
        the loss if something is to be learnt.
        """
        inversion, latents, steps = going.inversion, going.optimizer.latents, []
        budget = self.options.allowed_change
        for i in range(self.num_timesteps):
            arguments = (latents, i, inversion, going.reference)
            latents, *step = (
                checkpoint(self.timestep, *arguments, use_reentrant=False, preserve_rng_state=False)
                if checkpointing
                else self.timestep(*arguments)
            )
            steps.append(step)
        layer_losses, class_attention, self_attention = map(torch.stack, zip(*steps))
        class_attention, self_attention = class_attention.mean(0), self_attention.mean(0)
        image = going.composition(self.decode(latents))
        change = image.detach() - inversion.images
        fits = torch.ones(len(image), dtype=torch.bool, device=image.device)
        if budget is not None:
            if going.optimizer.keeps_within:
                image = budget.hold(inversion.images, image)
            else:
                fits = budget.fits(inversion.images, image.detach())
        losses = None
        if learns:
            logits = torch.stack([classifier(image) for classifier in self.attacked]).to(self.dtype)
            temperature = self.options.logit_temperature or 1.0  # None where no preset has decided
            losses = Losses(
                attack=cross_entropy(logits, inversion.labels, inversion.targets, temperature),
                self_attention=self.controller.weighted_sum(layer_losses.sum(-1)),
                cross_attention=masked_variance(class_attention, inversion.class_tokens),
                layer_losses=layer_losses,
                logits=logits,
                distance=norm(image.detach() - inversion.images),
            )
        return Pass(losses, change, image.detach(), fits, class_attention.detach(), self_attention)

    def timestep(
        self, latents: torch.Tensor, i: int, inversion: Inversion, reference: Reference
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The i-th attacked timestep: next latents; self-attention losses `(B, layers)`; cross-attention `(B,
        grid, grid, tokens)`; and, without a gradient, self-attention `(B, h, w, h * w)`.
        """
        reference_maps = self.reference_maps(reference, i, inversion)
        with self.controller.collecting() as maps:
            latents = self.guided_step(latents, i, inversion)
        losses = self_attention_losses(maps, reference_maps, self.options.layer_norm == "relative")
        return latents, losses, *self.average_maps(maps, inversion)

    def average_maps(self, maps: Maps, inversion: Inversion) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one timestep, the cross-attention `(B, grid, grid, tokens)`, and without a gradient the
        self-attention `(B, h, w, h * w)` of the layers with twice that grid.
        """
        grid = inversion.images.shape[-1] // 32
        seen = {layer: attention.detach() for layer, attention in maps.items()}
        return average_attention(maps, grid, is_cross=True), average_attention(seen, 2 * grid, is_cross=False)

    def make_record(
        self,
        history: dict[str, torch.Tensor],
        gradient_norms: torch.Tensor,
        inversion: Inversion,
        reference: Reference,
        found: Found,
    ) -> AttackRecord:
        """What each iteration left, and the attention of the attacked run beside the reference's."""
        counts = inversion.class_tokens.sum(1).tolist()
        tokenizer = self.pipeline.tokenizer
        ids = [
            tokenizer(prompt, add_special_tokens=False).input_ids[:count]
            for prompt, count in zip(self.prompts(inversion.labels), counts)
        ]
        prompt = slice(1, 1 + max(counts))  # between BOS and EOS
        return AttackRecord(
            timesteps=self.timesteps.clone(),
            layers=list(reference.grids),
            grids=list(reference.grids.values()),
            gradient_iterations=self.measured_iterations,
            gradient_norms=gradient_norms,
            reference_squares=reference.squares.cpu(),
            class_tokens=[[tokenizer.decode([token]).strip() for token in tokens] for tokens in ids],
            class_attention=torch.stack([reference.class_attention, found.class_attention])[..., prompt]
            .permute(0, 4, 2, 3, 1)
            .float()
            .cpu(),
            components=principal_components(
                reference.self_attention.cpu(), found.self_attention.cpu()
            ).float(),
            **history,
        )
