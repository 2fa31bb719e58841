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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attentionControl import (
    Maps,
    average_attention,
    make_controller,
    masked_variance,
    principal_components,
    self_attention_losses,
)
from classifiers.defences import Defended
from common.devices import bytes_saved, free_memory
from data.class_names import IMAGENET_CLASSES
from data.records import AttackRecord
from diffusion.inversion import Inversion, LatentDiffusion, frozen
from losses import (
    Losses,
    fooled,
    marked,
    measure_gradients,
    measured_iterations,
    raise_if_not_finite,
    timestep_gradient_norms,
)
from options import AttackOptions
from timestep_weights import Pace

if TYPE_CHECKING:  # diffusers takes seconds to import, and main.py answers bad input without it
    from diffusers import StableDiffusionPipeline

# Of the memory that is free: the reference maps are kept where they take at most this share of it, else
# computed anew at each timestep; and the graphs of all timesteps are alive at once where all that the attack
# keeps is estimated at no more than the second, else one at a time.
REFERENCE_SHARE, GRAPH_SHARE = 0.25, 0.6


@dataclass
class Reference:
    """The unperturbed run from z_N, which the structure losses compare with."""

    latents: list[torch.Tensor]  # (B, C, h, w) before each timestep
    maps: list[Maps] | None  # self-attention by timestep; None where they do not fit into memory
    end: torch.Tensor  # (B, C, h, w) after the last timestep
    class_attention: torch.Tensor  # (B, grid, grid, tokens), averaged over timesteps
    self_attention: torch.Tensor  # (B, h, w, h * w), averaged over timesteps
    grids: dict[
        str, int
    ]  # the side of the map of each self-attention layer, in the order in which the UNet runs them
    graph_bytes: int  # what one timestep of the perturbed run keeps for its backward pass
    squares: torch.Tensor  # (N, layers, B), mean square of each self-attention map


@dataclass
class AttackResult:
    """What an attack on B images returns."""

    adversarial: torch.Tensor  # (B, 3, H, W) in [0, 1]
    reconstruction: torch.Tensor  # (B, 3, H, W) in [0, 1], what came back without any attack
    record: AttackRecord  # what every iteration cost, and what the attack did to the attention


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

    latent_lr = 1e-2

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
        self.options = options = replace(options or AttackOptions(), **settings)
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
        self.checkpointing = checkpointing
        self.measured_iterations = measured_iterations(options.iterations, options.structure_share)
        self.controller = make_controller(
            options.weight_mode,
            options.schedule,
            options.weight_lr,
            self.num_timesteps,
            options.seed,
            Pace(options.weight_step, options.weight_pull),
        )

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
        progress: Callable[[int, torch.Tensor], None] | None = None,
    ) -> AttackResult:
        """Attacks a batch.

        Args:
            images: `(B, 3, H, W)` in [0, 1]; H = W, a multiple of 32.
            labels: `(B,)`, indices into the classifier's output and into `class_names`; or `(B, L)` where
                images have up to L labels, -1 for those they lack.
            targets: `(B,)`, the classes that the classifier is to see; without them, or where it is -1, it is
                to see any but the image's own.
            progress: called after each iteration with its number and the three losses, `(3, B)` on the CPU,
                in the order of LOSS_TERMS.
        Raises:
            NonFiniteLossError: a loss became NaN or infinite.
        """
        return self.attack(self.invert(images, labels, targets), progress)

    def attack(
        self, inversion: Inversion, progress: Callable[[int, torch.Tensor], None] | None = None
    ) -> AttackResult:
        """Optimises the start latent so that the classifier fails and the attention maps stay; see
        `__call__`.
        """
        with frozen(self.unet, self.vae, *self.classifiers), self.controller.attached(self.unet):
            reference = self.reference_run(inversion)
            mask = self.pseudo_mask(reference.class_attention, inversion)
            with torch.no_grad():
                reconstruction = self.to_image(self.decode(reference.end), inversion.images, mask)
            latents, history, norms = self.optimise_latents(inversion, reference, mask, progress)
            decoded, class_attention, self_attention = self.perturbed_run(latents, inversion)
            return AttackResult(
                self.to_image(decoded, inversion.images, mask),
                reconstruction,
                self.make_record(history, norms, inversion, reference, class_attention, self_attention),
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

    def optimise_latents(
        self,
        inversion: Inversion,
        reference: Reference,
        mask: torch.Tensor | None,
        progress: Callable[[int, torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]], torch.Tensor]:
        """The latent attack by AdamW, from z_N: latents `(B, C, h, w)`, what each iteration leaves for the
        record, by the names of AttackRecord, and `gradient_norms` in `measured_iterations`, `(M, 3, B)`.
        """
        options, checkpointing = self.options, self.checkpointing
        if checkpointing is None:
            checkpointing = self.num_timesteps * reference.graph_bytes > GRAPH_SHARE * free_memory(
                inversion.latents.device
            )
        latents = inversion.latents.clone().requires_grad_()
        optimizer = torch.optim.AdamW([latents], lr=self.latent_lr)
        factors = self.factors_at_start(inversion)
        self.controller.begin(len(latents))
        for classifier in self.classifiers:
            if isinstance(classifier, Defended):
                classifier.restart()
        history, norms = [], []
        for iteration in range(1, options.iterations + 1):
            weights = self.controller.weights()
            losses = self.losses(latents, inversion, reference, mask, checkpointing)
            total = (factors * losses.terms).sum(0)  # (B,)
            read = torch.cat([losses.terms, total[None]]).detach().cpu()  # the one synchronisation
            raise_if_not_finite(read, iteration)  # before a gradient can spoil the weights
            optimizer.zero_grad()
            if iteration in self.measured_iterations:
                if self.controller.follows_gradients:
                    self.controller.balance(timestep_gradient_norms(losses, latents))
                factors, measured = measure_gradients(losses, factors, latents, options.structure_share)
                norms.append(measured)
            else:
                total.sum().backward()
            optimizer.step()
            self.controller.update(losses.timestep_losses.detach(), factors[1])
            history.append(
                {
                    "attack_loss": read[0],
                    "self_attention_loss": read[1],
                    "cross_attention_loss": read[2],
                    "total_loss": (factors * losses.terms).sum(0).detach(),
                    "self_attention_factor": factors[1],
                    "weights": weights,
                    **self.verdict(losses, inversion),
                }
            )
            if progress is not None:
                progress(iteration, read[:-1])
        return latents.detach(), history, torch.stack(norms).cpu()

    def factors_at_start(self, inversion: Inversion) -> torch.Tensor:
        """Of the three terms of each image's loss, `(3, B)`: away from the true class, or towards the target
        where there is one; a factor that depends on gradients is zero until they have been measured.
        """
        options = self.options
        away_or_towards = torch.where(inversion.targets >= 0, 1.0, -1.0)
        structure = options.self_attn_loss_weight if options.structure_share is None else 0.0
        ones = torch.ones_like(away_or_towards)
        return torch.stack(
            [
                options.attack_loss_weight * away_or_towards,
                structure * ones,
                options.cross_attn_loss_weight * ones,
            ]
        )

    @staticmethod
    def verdict(losses: Losses, inversion: Inversion) -> dict[str, torch.Tensor]:
        """What the record keeps of an iteration beside its losses."""
        logits = losses.logits.detach()
        true_classes = marked(inversion.labels, logits.shape[-1])
        return {
            "layer_losses": losses.layer_losses.detach().movedim(1, -1),
            "distance": losses.distance,
            "confidence": (logits.softmax(-1).mean(0) * true_classes).sum(-1),
            "fooled": fooled(logits, inversion.labels, inversion.targets).all(0),
        }

    def losses(
        self,
        latents: torch.Tensor,
        inversion: Inversion,
        reference: Reference,
        mask: torch.Tensor | None = None,
        checkpointing: bool = False,
    ) -> Losses:
        """The three terms of the loss at start latents `(B, C, h, w)`."""
        layer_losses, attention = [], []
        for i in range(self.num_timesteps):
            arguments = (latents, i, inversion, reference)
            latents, losses_i, attention_i = (
                checkpoint(self.timestep, *arguments, use_reentrant=False, preserve_rng_state=False)
                if checkpointing
                else self.timestep(*arguments)
            )
            layer_losses.append(losses_i)
            attention.append(attention_i)
        layer_losses, attention = torch.stack(layer_losses), torch.stack(attention).mean(0)
        image = self.to_image(self.decode(latents), inversion.images, mask)
        logits = torch.stack([classifier(image) for classifier in self.classifiers]).to(self.dtype)
        return Losses(
            attack=self.cross_entropy(logits, inversion),
            self_attention=self.controller.weighted_sum(layer_losses.sum(-1)),
            cross_attention=masked_variance(attention, inversion.class_tokens),
            layer_losses=layer_losses,
            logits=logits,
            distance=(image.detach() - inversion.images).flatten(1).norm(dim=1),
        )

    def cross_entropy(self, logits: torch.Tensor, inversion: Inversion) -> torch.Tensor:
        """Of each image's classes, or its target, the mean over them and over the classifiers: logits
        `(classifiers, B, classes)` to `(B,)`.
        """
        temperature = self.options.logit_temperature or 1.0  # None where no preset has decided
        aim = torch.where(
            inversion.targets[:, None] >= 0, inversion.targets[:, None], inversion.labels
        )  # (B, L)
        aim = marked(aim, logits.shape[-1]).to(logits)
        return -((aim / aim.sum(-1, keepdim=True)) * (logits / temperature).log_softmax(-1)).sum(-1).mean(0)

    def timestep(
        self, latents: torch.Tensor, i: int, inversion: Inversion, reference: Reference
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The i-th attacked timestep: next latents; self-attention losses `(B, layers)`; cross-attention `(B,
        grid, grid, tokens)`.
        """
        reference_maps = self.reference_maps(reference, i, inversion)
        with self.controller.collecting() as maps:
            latents = self.guided_step(latents, i, inversion)
        return (
            latents,
            self_attention_losses(maps, reference_maps, self.options.layer_norm == "relative"),
            average_attention(maps, self.class_grid(inversion), is_cross=True),
        )

    @torch.no_grad()
    def perturbed_run(
        self, latents: torch.Tensor, inversion: Inversion
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`denoise` of the attacked start latents, and `average_maps` averaged over the timesteps."""
        averages = []
        for i in range(self.num_timesteps):
            with self.controller.collecting() as maps:
                latents = self.guided_step(latents, i, inversion)
            averages.append(self.average_maps(maps, inversion))
        return self.decode(latents), *(torch.stack(steps).mean(0) for steps in zip(*averages))

    def to_image(
        self, decoded: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Clamps to [0, 1]; outside the mask, `(B, 1, H, W)`, the original image stays."""
        image = decoded.clamp(0, 1)
        return image if mask is None else mask * image + (1 - mask) * original

    def pseudo_mask(self, attention: torch.Tensor, inversion: Inversion) -> torch.Tensor | None:
        """Where the unperturbed run looks at the true class: attention to its tokens over its maximum,
        resized; `(B, 1, H, W)` in [0, 1], or None where no mask is wanted.
        """
        if not (self.options.is_apply_mask or self.options.is_hard_mask):
            return None
        tokens = inversion.class_tokens[:, None, None, :].to(attention)
        attention = (attention * tokens).sum(-1) / tokens.sum(-1)  # (B, grid, grid)
        mask = (attention / attention.amax((1, 2), keepdim=True))[:, None]
        mask = F.interpolate(mask, inversion.images.shape[-2:], mode="bilinear").clamp(0, 1)
        return (mask > 0.5).to(mask) if self.options.is_hard_mask else mask

    @staticmethod
    def class_grid(inversion: Inversion) -> int:
        return inversion.images.shape[-1] // 32

    def average_maps(self, maps: Maps, inversion: Inversion) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one timestep, the cross-attention `(B, grid, grid, tokens)`, and the self-attention `(B, h, w, h
        * w)` of the layers with twice that grid.
        """
        grid = self.class_grid(inversion)
        return average_attention(maps, grid, is_cross=True), average_attention(maps, 2 * grid, is_cross=False)

    def make_record(
        self,
        history: list[dict[str, torch.Tensor]],
        gradient_norms: torch.Tensor,
        inversion: Inversion,
        reference: Reference,
        class_attention: torch.Tensor,
        self_attention: torch.Tensor,
    ) -> AttackRecord:
        """Stacks what each iteration left, and compares the attention of the attacked run with the
        reference's.
        """
        arrays = {name: torch.stack([entry[name] for entry in history]).cpu() for name in history[0]}
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
            class_attention=torch.stack([reference.class_attention, class_attention])[..., prompt]
            .permute(0, 4, 2, 3, 1)
            .float()
            .cpu(),
            components=principal_components(reference.self_attention.cpu(), self_attention.cpu()).float(),
            **arrays,
        )
