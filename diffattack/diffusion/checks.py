"""Whether a checkpoint can be attacked with: whether its parts fit together and are of a kind that is known;
and what its UNet predicts, found out by asking it, since single files do not say it, and a model that is
read wrongly makes noise of every image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffattack.common.checkpoints import require
from diffattack.common.errors import InputError
from diffattack.diffusion.inversion import PREDICTION_TYPES, LatentDiffusion

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
# what a UNet has that is given more, and would run without it
MORE = ("time_cond_proj_dim", "encoder_hid_dim_type")


@torch.no_grad()
def check_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """Looks at what would only show as noise, and tries the networks on latents of 8 x 8, on which those
    stumble that do not fit each other or need more than latents, a timestep and a prompt.

    Raises:
        ValueError, or whatever a network raises.
    """
    check_tokenizer(pipeline.tokenizer, pipeline.text_encoder.config)
    check_scheduler(pipeline.scheduler)
    kind, config = type(pipeline.scheduler).__name__, pipeline.unet.config
    is_plain = kind not in ("LCMScheduler", "TCDScheduler") and not any(map(config.get, MORE))
    require(is_plain, "it is a latent consistency model, or its unet takes more than latents and a prompt")
    model = LatentDiffusion(pipeline)
    latents = torch.ones(1, pipeline.vae.config.latent_channels, 8, 8, device=model.device)
    predicted = latents + model.predict(latents, 1, model.embed(["a"])[0])
    encoded = model.encode(model.decode(predicted))
    require(bool((latents + encoded).isfinite().all()), "what its networks compute is not finite")


def check_tokenizer(tokenizer: object, config: object) -> None:
    """Raises ValueError for a tokenizer that is not the text encoder's; and gives it the longest prompt of
    that, which it need not know.
    """
    longest = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.model_max_length = longest
    # fewer has one whose files are missing: every word is unknown to it
    fits = longest > 2 and max(tokenizer.get_vocab().values()) < config.vocab_size <= len(tokenizer)
    told = f"{len(tokenizer)} tokens, prompts of {longest}, and the text encoder has {config.vocab_size}"
    require(fits, f"tokenizer: its files are missing or of another model: it has {told}")


def check_scheduler(scheduler: object) -> None:
    """Raises ValueError for a noise schedule that DDIM steps cannot follow."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    told = f"scheduler: its prediction_type is {prediction!r}"
    require(prediction in PREDICTION_TYPES, f"{told}; expected {', '.join(PREDICTION_TYPES)}")
    alphas = getattr(scheduler, "alphas_cumprod", torch.zeros(2))
    # the very last may leave nothing of the image, and is never attacked
    inside = alphas[0] <= 1 and alphas[-2] > 0 and alphas[-1] >= 0
    falls = bool(inside and (alphas.diff() <= 0).all())
    require(falls, "scheduler: its betas do not make noise that grows from 0 to 1; expected DDIM's or PNDM's")


# ---------------------------------------------------------------- what the UNet predicts

HALF = 0.3  # of the signal's power that is left where it is asked: there the three differ most
FITS, BETTER = 0.85, 0.7  # relative errors: of one that fits, and of it over that of the one that is said


@torch.no_grad()
def prediction_errors(model: LatentDiffusion, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How far the UNet's output is from each thing that it may predict, relative to that, for noised images.

    With a and s the scales of signal and noise, epsilon is the noise n, v_prediction a n - s z (Salimans and
    Ho, ICLR 2022), and sample the latents z themselves.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        labels: `(B, L)`, -1 where an image has fewer.
    """
    clean = model.encode(images.to(model.unet.device, model.dtype))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    alphas = model.scheduler.alphas_cumprod
    t = int((alphas - HALF).abs().argmin())
    signal, sigma = float(alphas[t] ** 0.5), float((1 - alphas[t]) ** 0.5)
    embeddings, _ = model.embed(model.prompts(labels))
    noised = (signal * clean + sigma * noise).to(model.unet_dtype)
    output = model.unet(noised, t, embeddings.to(model.unet_dtype)).sample.to(clean)
    meant = dict(zip(PREDICTION_TYPES, (noise, signal * noise - sigma * clean, clean)))
    return {name: float((output - target).norm() / target.norm()) for name, target in meant.items()}


def check_prediction_type(model: LatentDiffusion, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises InputError where the UNet predicts something else than its scheduler says."""
    errors, declared = prediction_errors(model, images, labels), model.scheduler.config.prediction_type
    best = min(errors, key=errors.get)
    if best != declared and errors[best] < min(FITS, BETTER * errors[declared]):
        raise InputError(
            f"--pretrained_diffusion_path: its UNet predicts {best} and not {declared} (relative errors on "
            f"the first image {errors[best]:.2f} and {errors[declared]:.2f}); give --prediction_type {best}"
        )
