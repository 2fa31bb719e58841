"""Whether a checkpoint can be attacked with: whether its parts fit together and are of a kind that is known;
its numbers; and what its UNet predicts, found out by asking it, since single files do not say it, and a model
that is read wrongly makes noise of every image.
"""

from __future__ import annotations

import math
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
# of a UNet that is given more than latents, a timestep and a prompt: further embeddings, the noise level or
# class of another picture, or, as latent consistency models are, the guidance
MORE = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
MORE += ("time_cond_proj_dim",)
EXPECTED = "expected Stable Diffusion 1.x or 2.x, with 4 input channels and one text encoder that fits"


def check_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """Looks at the parts of a checkpoint.

    Raises:
        CheckpointError: one is of a kind that is not known here or does not fit the others, or holds numbers
            that would only show as nonsense, or as a traceback in the middle of a run.
    """
    unet, vae, text = (getattr(pipeline, part).config for part in PARTS)
    kind = type(pipeline.scheduler).__name__
    require(kind not in ("LCMScheduler", "TCDScheduler"), f"its scheduler is a {kind}; {EXPECTED}")
    for key in MORE:
        require(unet.get(key) is None, f"unet: its {key} is {unet.get(key)!r}; {EXPECTED}")
    channels = unet.in_channels, unet.out_channels, vae.latent_channels
    told = "unet: it takes {} channels and gives {}, and the latents of its vae have {}".format(*channels)
    require(len(set(channels)) == 1, f"{told}; {EXPECTED}")
    width, hidden = unet.cross_attention_dim, text.hidden_size
    told = f"text_encoder: its embeddings are {hidden} wide, and the unet takes {width}"
    require(width == hidden, f"{told}; {EXPECTED}")
    for part in PARTS:
        for name, values in getattr(pipeline, part).named_parameters():
            require(bool(values.isfinite().all()), f"{part}: {name} holds numbers that are not finite")
    heads = torch.tensor(unet.attention_head_dim)
    require(bool((heads > 0).all()), f"unet: its attention_head_dim is {unet.attention_head_dim}")
    factor = vae.scaling_factor
    holds = isinstance(factor, (int, float)) and 0 < factor < math.inf
    require(holds, f"vae: its scaling_factor is {factor!r}; expected a number above 0")
    check_tokenizer(pipeline.tokenizer, text)
    check_scheduler(pipeline.scheduler)


def check_tokenizer(tokenizer: object, config: object) -> None:
    """Raises CheckpointError for a tokenizer that is not the text encoder's; and gives it the longest prompt
    of that, which it need not know.
    """
    longest = min(tokenizer.model_max_length, config.max_position_embeddings)
    require(longest >= 3, f"tokenizer: a prompt has {longest} tokens; expected at least 3")
    tokenizer.model_max_length = longest
    largest, places = max(tokenizer.get_vocab().values()), config.vocab_size
    require(largest < places, f"tokenizer: it has a token {largest}, but the text encoder knows {places}")
    # fewer has one whose files are missing: every word is unknown to it
    told = f"tokenizer: it knows {len(tokenizer)} of the {places} tokens of the text encoder"
    require(len(tokenizer) >= places, f"{told}; its files are missing or of another model")


def check_scheduler(scheduler: object) -> None:
    """Raises CheckpointError for a noise schedule that DDIM steps cannot follow."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    told = f"scheduler: its prediction_type is {prediction!r}"
    require(prediction in PREDICTION_TYPES, f"{told}; expected {', '.join(PREDICTION_TYPES)}")
    alphas = getattr(scheduler, "alphas_cumprod", torch.zeros(2))
    # the very last may leave nothing of the image, and is never attacked
    inside = alphas.isfinite().all() and alphas[:-1].min() > 0 and 0 <= alphas[-1] and alphas.max() <= 1
    holds = bool(inside) and not bool((alphas.diff() > 0).any())
    require(holds, "scheduler: its betas do not make noise that grows from 0 to 1; expected DDIM's or PNDM's")


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
