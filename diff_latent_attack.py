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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from attentionControl import make_controller
from diffattack.classifiers.defences import at_a_stop, defend, under_attack
from diffattack.common.compiling import stance
from diffattack.common.devices import bytes_saved, free_memory
from diffattack.common.errors import InputError
from diffattack.common.frozen import frozen
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.history import AttackResult, joined_results
from diffattack.data.images import rounded
from diffattack.diffusion.attention import (
    Maps,
    Reference,
    average_maps,
    layers_of_grid,
    masked_variance,
    self_attention_losses,
)
from diffattack.diffusion.composition import Composition, attention_mask, change_limits
from diffattack.diffusion.course import Course, Going, result_of
from diffattack.diffusion.inversion import Inversion, LatentDiffusion
from diffattack.diffusion.latent_optimizers import AdamW, Momentum, norm
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
        self.head = options.classifier_head
        # what the gradient goes through; what judges is without these defences
        self.attacked = [
            defend(classifier, options.attack_through, self, options.draws, self.head)
            for classifier in self.classifiers
        ]
        self.checkpointing = checkpointing
        self.controller = make_controller(
            options.weight_mode,
            options.schedule,
            self.num_timesteps,
            options.seed,
            options.pace,
        )
        # whether images can end before others
        self.ends_early = options.stop_margin is not None or (
            options.budget is not None and options.latent_optimizer == "adamw"
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
        coming, results = [None, inversion], {}
        for ended in self.attack_in_turn(lambda room: coming.pop(), len(inversion.images), progress):
            results |= ended
        return joined_results([results[place] for place in range(len(results))])

    def attack_in_turn(
        self,
        newcomers: Callable[[int], Inversion | None],
        size: int,
        progress: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Iterator[dict[int, AttackResult]]:
        """Attacks images as they come: those that have ended leave, and others take their places, as soon as
        half of the places are free.

        Args:
            newcomers: called with how many places are free; returns the inversion of at least one image and
                of no more than that, or None when there are none left.
            size: how many are attacked at once.
            progress: as in `__call__`, with the number of the pass.
        Yields:
            the results of images that end together, by the order in which they came.
        """
        going, came, passes, more = None, 0, 0, True
        with (
            frozen(self.unet, self.vae, *self.classifiers),
            self.controller.attached(self.unet, self.branches),
            stance(self.unet, "force_eager"),
        ):
            while True:
                room = size if going is None else size - len(going.courses)
                if more and 2 * room >= size:
                    inversion = newcomers(room)
                    more = inversion is not None
                    if more:
                        going = self.take_in(going, inversion, came, size)
                        came += len(inversion.images)
                if going is None:
                    return
                passes += 1
                ended = self.advance(going, passes, progress)
                results = [result_of(course, going, self) for course, end in zip(going.courses, ended) if end]
                if results:
                    yield dict(results)
                if ended.all():
                    going = None
                elif ended.any():
                    stay = (~ended).nonzero().view(-1)
                    going.keep(stay)
                    self.controller.keep(stay)

    # ------------------------------------------------------------ the steps, in the order of the method

    def reference_run(self, inversion: Inversion) -> Reference:
        """The unperturbed run from z_N: its latents, its self-attention maps where they fit, and what a
        timestep of the perturbed run will keep.
        """
        images, latents, before, maps, averages, squares = inversion.images, inversion.latents, [], [], [], []
        looked_at = None  # all, until it is seen how large they are
        for i in range(self.num_timesteps):
            before.append(latents)
            # the first timestep builds a graph, with all maps, only to see how large those of the perturbed
            # run will be at most
            with (
                torch.set_grad_enabled(i == 0),
                self.controller.collecting(looked_at) as step_maps,
                bytes_saved(self.unet) as saved,
            ):
                latents = self.guided_step(latents.clone().requires_grad_(i == 0), i, inversion).detach()
            step_maps = {layer: attention.detach() for layer, attention in step_maps.items()}
            if i == 0:
                own = [layer for layer in step_maps if not layer.is_cross]
                looked_at = frozenset(own + layers_of_grid(step_maps, images.shape[-1] // 32, is_cross=True))
                graph_bytes, map_bytes = sum(saved), sum(step_maps[layer].nbytes for layer in own)
                fits = self.num_timesteps * map_bytes <= REFERENCE_SHARE * free_memory(latents.device)
            averages.append(average_maps(step_maps, images.shape[-1]))
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
            graph_bytes // len(latents),
            torch.stack(squares),
            looked_at,
        )

    @torch.no_grad()
    def reference_maps(self, reference: Reference, i: int, inversion: Inversion) -> Maps:
        """The unperturbed run's self-attention maps at the i-th attacked timestep, kept or computed anew."""
        if reference.maps is not None:
            return reference.maps[i]
        with stance(self.unet, "force_eager"), self.controller.collecting(reference.looked_at) as maps:
            self.guided_step(reference.latents[i], i, inversion)
        return {layer: attention for layer, attention in maps.items() if not layer.is_cross}

    @torch.no_grad()
    def compose(self, inversion: Inversion, reference: Reference) -> tuple[Composition, torch.Tensor]:
        """How decoded latents become pictures, and what the decoder gives of the unperturbed run."""
        options, images, mask = self.options, inversion.images, inversion.masks
        unperturbed = self.decode(reference.end)
        if mask is None and (options.is_apply_mask or options.is_hard_mask):
            mask = attention_mask(reference.class_attention, inversion.class_tokens, images.shape[-2:])
        if mask is not None and options.is_hard_mask:
            mask = (mask > 0.5).to(mask)
        limits = None if options.contrast_limit is None else change_limits(images, options.contrast_limit)
        base = unperturbed if options.composition == "residual" else None
        return Composition(images, base, limits, mask), unperturbed

    def take_in(self, going: Going | None, inversion: Inversion, first: int, size: int = 1) -> Going:
        """These images before their first iteration, behind those that are attacked already, of which there
        are to be so many at once; the first of them came at this place.
        """
        options, images = self.options, inversion.images
        (self.controller.begin if going is None else self.controller.join)(len(images))
        reference = self.reference_run(inversion)
        composition, unperturbed = self.compose(inversion, reference)
        reconstructed = composition(unperturbed) if composition.base is None else [None] * len(images)
        if options.latent_optimizer == "adamw":
            optimizer = AdamW(inversion.latents, options.latent_lr)
        else:
            radius = options.allowed_change.radius(images, images)
            optimizer = Momentum(inversion.latents, radius, options.iterations, images, reference.end)
        of_each = zip(images, reference.class_attention, reference.self_attention, reconstructed)
        courses = [Course(first + k, *parts) for k, parts in enumerate(of_each)]
        factors = factors_at_start(inversion.targets, options)
        newcomers = Going(courses, inversion, reference, composition, factors, optimizer)
        if going is None:
            newcomers.checkpointing = self.is_checkpointed(reference, size)
            return newcomers
        going.join(newcomers)
        return going

    def advance(
        self, going: Going, passes: int, progress: Callable[[int, torch.Tensor], None] | None
    ) -> torch.Tensor:
        """Looks at the pictures of the latents as they are, and then moves these; the picture after K
        iterations is looked at in a last pass, which learns nothing. Returns which images end, `(b,)`.
        """
        last = torch.tensor([number == self.options.iterations for number in going.iterations])
        if last.all():
            with torch.no_grad():
                self.judge(self.forward(going, learns=False), going)
            return last
        with stance(self.unet, "default"):
            passed = self.forward(going)
            terms = passed.losses.terms.detach()
            read = torch.cat([terms, (going.factors * terms).sum(0)[None]]).cpu()
            read[:, last] = 0.0  # of interest in what is learnt from alone
            raise_if_not_finite(read, going.courses)  # before a gradient can spoil the weights
            ended = self.judge(passed, going).cpu() | last
            weights = self.controller.weights()
            measured = torch.tensor([n + 1 in self.measured_iterations for n in going.iterations]) & ~ended
            norms = None if ended.all() else self.descend(passed, going, measured.to(terms.device))
        labels, targets = going.inversion.labels, going.inversion.targets
        said = verdict(passed.losses, going.factors, labels, targets, self.head)
        going.note(said | {"weights": weights}, norms, measured, ~last)
        if progress is not None:
            progress(passes, read[:-1])
        return ended

    def is_checkpointed(self, reference: Reference, size: int) -> bool:
        """Whether the graph of one timestep at a time is to be alive."""
        if self.checkpointing is not None:
            return self.checkpointing
        needed = size * self.num_timesteps * reference.graph_bytes
        return needed > GRAPH_SHARE * free_memory(reference.end.device)

    @torch.no_grad()
    def judge(self, passed: Pass, going: Going) -> torch.Tensor:
        """Keeps the pictures of the latents as they are, as far as they are within the budget; which images
        end with them, `(b,)`: those beyond the budget, and those that reach the margin, by as small a part of
        their change as still does.
        """
        ended, clean = ~passed.fits, going.inversion.images
        if self.options.stop_margin is not None:

            def reaches(images: torch.Tensor) -> torch.Tensor:
                return self.margins(images, going.inversion) >= self.options.stop_margin

            reached = passed.fits & reaches(passed.adversarial)
            for course, value in zip(going.courses, reached.tolist()):
                course.reached = value
            if reached.any():
                least = least_change(clean, passed.adversarial, reaches)
                passed.adversarial = torch.where(reached.view(-1, 1, 1, 1), least, passed.adversarial)
            ended = ended | reached
        for row, (course, fits) in enumerate(zip(going.courses, passed.fits.tolist())):
            if fits:
                for name in ("adversarial", "class_attention", "self_attention"):
                    setattr(course, name, getattr(passed, name)[row])
                course.steps = course.iterations
            if course.iterations in self.options.judge_at:
                course.pictures_at[course.iterations] = course.adversarial
        return ended

    def margins(self, images: torch.Tensor, inversion: Inversion) -> torch.Tensor:
        """By how much every classifier is wrong about images `(b, 3, H, W)` once they are written, `(b,)`."""
        written = rounded(images, truncated=self.inversion == "diffattack")
        logits = torch.stack([at_a_stop(classifier, written) for classifier in self.classifiers])
        return self.head.margin(logits.float(), inversion.labels, inversion.targets).amin(0)

    def descend(self, passed: Pass, going: Going, measured: torch.Tensor) -> torch.Tensor | None:
        """One step down the gradient; the norms `(3, b)` of the terms' gradients, if those of any image are
        wanted, which `measured` `(b,)` marks.
        """
        losses, latents, norms = passed.losses, going.optimizer.latents, None
        if measured.any():
            if self.controller.follows_gradients:
                self.controller.balance(timestep_gradient_norms(losses, latents), measured)
            going.factors, norms = measure_gradients(
                losses, going.factors, latents, self.options.structure_share, measured
            )
        else:
            (going.factors * losses.terms).sum(0).sum().backward()
        if going.optimizer.keeps_within:
            clean = going.inversion.images
            going.optimizer.radius = self.options.allowed_change.radius(clean, clean + passed.change)
        going.optimizer.step(passed.change)
        self.controller.update(losses.timestep_losses.detach(), going.factors[1])
        return norms

    def forward(self, going: Going, learns: bool = True) -> Pass:
        """From the start latents through all timesteps and the decoder to pictures, and to the three terms of
        the loss if something is to be learnt.
        """
        inversion, latents, steps = going.inversion, going.optimizer.latents, []
        budget, begun, anew = self.options.allowed_change, going.begun, going.checkpointing and learns
        for i in range(self.num_timesteps):
            latents, *step = computed(self.timestep, latents, i, inversion, going.reference, anew=anew)
            steps.append(step)
        layer_losses, class_attention, self_attention = map(torch.stack, zip(*steps))
        layer_losses = layer_losses * begun[:, None]
        class_attention, self_attention = class_attention.mean(0), self_attention.mean(0)
        image = computed(self.picture, latents, going.composition, begun, anew=anew)
        change = image.detach() - inversion.images
        fits = torch.ones(len(image), dtype=torch.bool, device=image.device)
        if budget is not None:
            if going.optimizer.keeps_within:
                image = budget.hold(inversion.images, image)
            else:
                fits = budget.fits(inversion.images, image.detach())
        losses = None
        if learns:
            seen = [under_attack(classifier, image, going.iterations) for classifier in self.attacked]
            logits = torch.stack(seen).to(self.dtype)
            temperature = self.options.logit_temperature or 1.0  # None where no preset has decided
            losses = Losses(
                attack=self.head.cross_entropy(logits, inversion.labels, inversion.targets, temperature),
                self_attention=self.controller.weighted_sum(layer_losses.sum(-1)),
                cross_attention=masked_variance(class_attention, inversion.class_tokens),
                layer_losses=layer_losses,
                logits=logits,
                distance=norm(image.detach() - inversion.images),
            )
        return Pass(losses, change, image.detach(), fits, class_attention.detach(), self_attention)

    def picture(self, latents: torch.Tensor, composition: Composition, begun: torch.Tensor) -> torch.Tensor:
        """Of the latents after all timesteps, `(b, 3, H, W)` in [0, 1]."""
        return composition(self.decode(latents), begun)

    def timestep(
        self, latents: torch.Tensor, i: int, inversion: Inversion, reference: Reference
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The i-th attacked timestep: next latents; self-attention losses `(B, layers)`; cross-attention `(B,
        grid, grid, tokens)`; and, without a gradient, self-attention `(B, h, w, h * w)`.
        """
        reference_maps = self.reference_maps(reference, i, inversion)
        with self.controller.collecting(reference.looked_at) as maps:
            latents = self.guided_step(latents, i, inversion)
        losses = self_attention_losses(maps, reference_maps, self.options.layer_norm == "relative")
        return latents, losses, *average_maps(maps, inversion.images.shape[-1])


def computed(function: Callable, *arguments, anew: bool) -> object:
    """What it returns; `anew` keeps no graph of it, and computes it once more in the backward pass."""
    if anew:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
