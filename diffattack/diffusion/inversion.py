"""A Stable Diffusion model as the attack uses it: encoding, DDIM steps, inversion, null-text optimisation.

from diffattack.diffusion.inversion import LatentDiffusion
model = LatentDiffusion(pipeline)
inversion = model.invert(images, labels)          # (B, 3, H, W) in [0, 1] and (B,)
model.reconstruct(inversion)                      # the images again, (B, 3, H, W) in [0, 1]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffattack.common.errors import InputError, note
from diffattack.common.frozen import frozen, recompute
from diffattack.data.classes import IMAGENET_CLASSES

if TYPE_CHECKING:  # diffusers takes seconds to import, and main.py answers bad input without it
    from diffusers import StableDiffusionPipeline


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# DDIM steps between noise and image of a purification: of a defence, which no flag of the attack may change
PURIFICATION_STEPS = 20


@dataclass
class Inversion:
    """Where the attack starts: everything about the images that does not depend on the attack or its
    weights.
    """

    images: torch.Tensor  # (B, 3, H, W) in [0, 1]
    labels: torch.Tensor  # (B, L), each image's own; -1 where it has fewer than another
    targets: torch.Tensor  # (B,), of a targeted attack; -1 where there is none
    latents: torch.Tensor  # z_N, (B, C, h, w)
    class_embeddings: torch.Tensor  # (B, tokens, width)
    null_embeddings: list[torch.Tensor]  # one (B, tokens, width) a timestep; none without guidance
    class_tokens: torch.Tensor  # (B, tokens), true between BOS and EOS
    masks: torch.Tensor | None = None  # (B, 1, H, W) in [0, 1], the user's own; 0: may not change


class LatentDiffusion:
    """The last N = T - S of T DDIM steps of a Stable Diffusion model, forwards and backwards.

    Args:
        pipeline: any Stable Diffusion 1.x or 2.x pipeline; it decides device and dtype. In half precision the
            networks alone run in it; latents are float32.
        class_names: the prompt of each label.
        diffusion_steps: T, DDIM steps from noise to image.
        start_step: S.
        guidance: classifier-free guidance scale; at 1 the guided prediction is the conditional one, so that
            the unconditional branch is left out everywhere and there is nothing to optimise in it.
        inversion: exact or diffattack, see `ddim_inversion`.
    Raises:
        InputError: a scheduler that does not fit these steps.
    """

    null_text_lr = 1e-1
    encode_seed = 8888

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        class_names: Sequence[str] = IMAGENET_CLASSES,
        *,
        diffusion_steps: int = 20,
        start_step: int = 15,
        guidance: float = 2.5,
        inversion: str = "exact",
    ):
        from diffusers import DDIMScheduler

        self.pipeline, self.class_names = pipeline, class_names
        self.guidance, self.inversion = guidance, inversion
        self.branches = 1 if guidance == 1 else 2  # of the UNet in a step
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.unet_dtype = pipeline.unet.dtype  # asked once: diffusers walks through all parameters for it
        self.dtype = torch.promote_types(self.unet_dtype, torch.float32)  # of everything but the networks

        config = pipeline.scheduler.config
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
        self.scheduler.set_timesteps(diffusion_steps)
        self.timesteps = self.scheduler.timesteps[start_step:]  # attacked, early (noisiest) to late
        self.num_timesteps = len(self.timesteps)
        attacked = self.timesteps.tolist()
        # the timestep after each, whatever the scheduler's spacing; -1 is the image
        self.following = dict(zip(attacked, [*attacked[1:], -1]))
        trained = len(self.scheduler.alphas_cumprod)
        if min(attacked) < 0 or max(attacked) >= trained:
            raise InputError(
                f"the scheduler's timesteps {attacked} go beyond the {trained} that it was trained with"
            )

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def invert(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> Inversion:
        """Encodes the images and inverts them: with guidance by the unconditional branch, and then optimises
        the null-text embeddings that lead back to them; without it by the conditional branch.
        """
        networks = (self.unet, self.vae, self.pipeline.text_encoder)
        with frozen(*networks):
            images, labels = images.to(self.device, self.dtype), labels.view(len(images), -1).to(self.device)
            targets = labels.new_full((len(images),), -1) if targets is None else targets.to(self.device)
            prompts = self.prompts(labels)
            self.say_cut(prompts)
            class_embeddings, class_tokens = self.embed(prompts)
            if self.branches == 1:
                trajectory, null_embeddings = self.ddim_inversion(self.encode(images), class_embeddings), []
            else:
                null_embeddings, _ = self.embed([""] * len(images))
                trajectory = self.ddim_inversion(self.encode(images), null_embeddings)
                null_embeddings = self.optimise_null_text(trajectory, class_embeddings, null_embeddings)
        masks, latents = None if masks is None else masks.to(images), trajectory[-1]
        prompts = class_embeddings, null_embeddings, class_tokens
        return Inversion(images, labels, targets, latents, *prompts, masks)

    def reconstruct(self, inversion: Inversion) -> torch.Tensor:
        """What the diffusion model makes of the images without any attack: `(B, 3, H, W)` around [0, 1]."""
        latents = inversion.latents
        with torch.no_grad(), frozen(self.unet, self.vae):
            for i in range(self.num_timesteps):
                latents = self.guided_step(latents, i, inversion)
            return self.decode(latents)

    def say_cut(self, prompts: Sequence[str]) -> None:
        """Says of which prompts the text encoder does not take the end."""
        tokenizer = self.pipeline.tokenizer
        longest = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        for prompt, words in zip(prompts, self.words(prompts)):
            if len(words) > longest:
                note(
                    f"the class name {prompt[:40]!r} has {len(words)} tokens and the text encoder takes "
                    f"{longest}; a shorter name in --captions is taken whole"
                )

    def prompts(self, labels: torch.Tensor) -> list[str]:
        """The caption of each image's class, or of all its classes."""
        return [", ".join(self.class_names[label] for label in row if label >= 0) for row in labels.tolist()]

    def words(self, prompts: Iterable[str]) -> list[list[str]]:
        """Each prompt by its tokens, without BOS and EOS, however many they are."""
        tokenizer, how = (
            self.pipeline.tokenizer,
            dict(add_special_tokens=False, truncation=False, verbose=False),
        )
        each = [tokenizer(prompt, **how).input_ids for prompt in prompts]
        return [[tokenizer.decode([token]).strip() for token in tokens] for tokens in each]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text embeddings `(B, tokens, width)`, and which of the tokens are the prompt's own, `(B, tokens)`:
        those between BOS and EOS.
        """
        tokenizer, text_encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        longest = tokenizer.model_max_length
        padded = dict(padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        tokens, position = tokenizer(prompts, **padded), torch.arange(longest)
        last = tokens.attention_mask.sum(1, keepdim=True) - 1
        is_prompt = (position > 0) & (position < last)
        embeddings = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
        return embeddings.to(self.dtype), is_prompt.to(text_encoder.device)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to scaled latents `(B, C, h, w)`: a sample of the posterior, every
        image with the same noise; with a graph where the images have one.

        An autoencoder without a posterior, as AutoencoderDC and AutoencoderTiny are, gives the latents
        themselves.
        """
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            encoded = self.vae.encode((2 * images - 1).to(self.vae.dtype))
            if "latent_dist" not in encoded:
                return self.vae.config.scaling_factor * encoded[0].to(images)
            mean, std = encoded.latent_dist.mean.to(images), encoded.latent_dist.std.to(images)
            noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(self.encode_seed))
            return self.vae.config.scaling_factor * (mean + std * noise.to(images))

    @torch.no_grad()
    def ddim_inversion(self, latents: torch.Tensor, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """The latents z_0 .. z_N after 0 .. N inversion steps, with the branch of these embeddings alone.

        exact: each step undoes one of the attack's, from t - 1000/T to t with the noise predicted at t, so
        that z_N has the noise of the first attacked timestep (as in Mokady et al., arXiv 2211.09794).
        diffattack: as the original does it, from t to t + 1000/T with z_0 taken for the latent at the last
        timestep, so that z_N has the noise of a timestep earlier than the one at which the attack starts from
        it, which leaves every picture with less contrast.
        """
        trajectory = [latents]
        stride = self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        for t in self.timesteps.flip(0).tolist():
            start, end = (self.following[t], t) if self.inversion == "exact" else (t, t + stride)
            latents = self.ddim_step(latents, self.predict(latents, t, embeddings), t, start, end)
            trajectory.append(latents)
        return trajectory

    def optimise_null_text(
        self, trajectory: list[torch.Tensor], class_embeddings: torch.Tensor, null_embeddings: torch.Tensor
    ) -> list[torch.Tensor]:
        """One null embedding a timestep, with which guided steps lead back along the inversion (Mokady et
        al., arXiv 2211.09794).

        Embedding and optimiser state are carried over from timestep to timestep, with 10 + 2 i optimisation
        steps at the i-th. The conditional prediction depends on none of it and is computed once a timestep.
        """
        latents, embeddings = trajectory[-1], null_embeddings.clone().requires_grad_()
        optimizer = torch.optim.AdamW([embeddings], lr=self.null_text_lr)
        optimised = []
        for i, t in enumerate(self.timesteps.tolist()):
            target = trajectory[self.num_timesteps - 1 - i]
            with torch.no_grad():
                conditional = self.predict(latents, t, class_embeddings)
            step = functools.partial(self.null_text_step, latents, t, conditional)
            for _ in range(10 + 2 * i):
                loss = (step(embeddings) - target).square().mean((1, 2, 3)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            optimised.append(embeddings.detach().clone())
            with torch.no_grad():
                latents = step(optimised[-1])
        return optimised

    def null_text_step(
        self, latents: torch.Tensor, t: int, conditional: torch.Tensor, null_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """One guided DDIM step from `(B, C, h, w)`, given the conditional prediction."""
        unconditional = self.predict(latents, t, null_embeddings)
        return self.ddim_step(latents, self.guide(unconditional, conditional), t)

    def autoencoded(self, images: torch.Tensor) -> torch.Tensor:
        """What the autoencoder alone makes of images `(B, 3, H, W)` in [0, 1]."""
        return self.anew(self.decode, self.anew(self.encode, images))

    def purified(
        self, images: torch.Tensor, timestep: int, noise: Callable[[torch.Size], torch.Tensor]
    ) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1], noised to a timestep of training and denoised without a prompt, in
        DDIM steps (Nie et al., arXiv 2205.07460); with the exact gradient through all of them.

        Args:
            noise: from a shape to the noise of all images, `(C, h, w)`.
        """
        latents = self.anew(self.encode, images)
        embeddings = self.embed([""])[0].expand(len(latents), -1, -1)
        stride = self.scheduler.config.num_train_timesteps // PURIFICATION_STEPS
        alpha, sigma = self.signal_and_noise(timestep)
        latents = alpha * latents + sigma * noise(latents.shape[1:]).to(latents)
        for t in range(timestep, -1, -stride):
            latents = self.anew(self.plain_step, latents, t, max(t - stride, -1), embeddings)
        return self.anew(self.decode, latents)

    def plain_step(self, latents: torch.Tensor, t: int, end: int, embeddings: torch.Tensor) -> torch.Tensor:
        """One DDIM step without guidance, `(B, C, h, w)` to the same."""
        return self.ddim_step(latents, self.predict(latents, t, embeddings), t, t, end)

    def anew(self, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
        """What a function of the networks makes of its arguments, the first of them a tensor. Where that has
        a graph, the function's own is not kept, so that memory grows with the number of such calls by their
        arguments alone.
        """

        def with_fixed_weights(*arguments: object) -> torch.Tensor:
            with frozen(self.unet, self.vae):  # in here, so that it is so in the backward pass, too
                return function(*arguments)

        with torch.set_grad_enabled(arguments[0].requires_grad and torch.is_grad_enabled()):
            return recompute(with_fixed_weights, *arguments)

    def guided_step(self, latents: torch.Tensor, i: int, inversion: Inversion) -> torch.Tensor:
        """One DDIM step at the i-th attacked timestep with classifier-free guidance, `(B, C, h, w)` to the
        same.
        """
        t = self.timesteps[i].item()
        if self.branches == 1:
            return self.plain_step(latents, t, self.following[t], inversion.class_embeddings)
        embeddings = torch.cat([inversion.null_embeddings[i], inversion.class_embeddings])
        unconditional, conditional = self.predict(torch.cat([latents, latents]), t, embeddings).chunk(2)
        return self.ddim_step(latents, self.guide(unconditional, conditional), t)

    def predict(self, latents: torch.Tensor, t: int, embeddings: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction, computed in its own precision and returned in that of the latents."""
        return self.unet(latents.to(self.unet_dtype), t, embeddings.to(self.unet_dtype)).sample.to(latents)

    def guide(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        return unconditional + self.guidance * (conditional - unconditional)

    def ddim_step(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        t: int,
        start: int | None = None,
        end: int | None = None,
    ) -> torch.Tensor:
        """The deterministic DDIM step, forwards or backwards (Song et al., arXiv 2010.02502, eq. 12), by the
        UNet's prediction at timestep t: of the latents at `start`, by default t, to `end`, the one after t.
        """
        noise = self.predicted_noise(latents, prediction, t)
        alpha, sigma = self.signal_and_noise(t if start is None else start)
        clean = (latents - sigma * noise) / alpha
        alpha, sigma = self.signal_and_noise(self.following[t] if end is None else end)
        return alpha * clean + sigma * noise

    def predicted_noise(self, latents: torch.Tensor, prediction: torch.Tensor, t: int) -> torch.Tensor:
        """The noise that the UNet's prediction at timestep t stands for, by what the UNet predicts: that
        noise, the clean latents, or the velocity between both (Salimans and Ho, arXiv 2202.00512).
        """
        alpha, sigma = self.signal_and_noise(t)
        if self.scheduler.config.prediction_type == "v_prediction":
            return alpha * prediction + sigma * latents
        if self.scheduler.config.prediction_type == "sample":
            return (latents - alpha * prediction) / sigma
        return prediction

    def signal_and_noise(self, t: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t); before the first training step, those of the scheduler's final
        alpha.
        """
        scheduler = self.scheduler
        alpha = (scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod).item()
        return alpha**0.5, (1 - alpha) ** 0.5

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents `(B, C, h, w)` to images `(B, 3, H, W)` around [0, 1], not clamped."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(scaled).sample.to(latents) / 2 + 0.5
