"""Whether a checkpoint can be attacked with: whether its parts fit together and are of a kind that is known,
by their configurations and before any weights are read; its numbers; and what its UNet predicts, found out by
asking it, since single files do not say it, and a model that is read wrongly makes noise of every image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffattack.common.device import stance
from diffattack.common.errors import CheckpointError, InputError, note, one_line
from diffattack.diffusion.inversion import PREDICTION_TYPES, LatentDiffusion

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
# what UNets with other numbers of input channels than latents have are for
EXTRA_CHANNELS = {
    5: "is of a model that is given depth, too (depth2img)",
    8: "is of a model that is given a second picture, too (InstructPix2Pix, or an upscaler)",
    9: "is of an inpainting model, which is given a mask and a masked picture, too",
    7: "is of an upscaler, which is given a small picture, too",
}


def configuration(folder: Path, part: str) -> dict:
    """The config.json of a part.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / part / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{part}: its config.json cannot be read ({one_line(error, 80)})") from None
    return content


def check_parts(folder: Path, index: Mapping) -> None:
    """Looks at the configurations of a folder in diffusers format.

    Raises:
        CheckpointError: a part is missing, of a kind that is not known here, or does not fit the others.
    """
    for part in ("transformer", "text_encoder_2", "prior", "controlnet"):
        entry = index.get(part)
        if isinstance(entry, list) and entry and entry[0]:
            raise CheckpointError(
                f"it has a {part} ({entry[-1]}), which Stable Diffusion 1.x and 2.x do not have; give one of "
                f"these"
            )
    scheduler = index.get("scheduler")
    if isinstance(scheduler, list) and scheduler and scheduler[-1] in ("LCMScheduler", "TCDScheduler"):
        raise CheckpointError(
            f"its scheduler is a {scheduler[-1]}, of a model that jumps where DDIM steps; give the model "
            f"that it was distilled from"
        )
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        if (folder / name).is_file():
            what = f"{name} in {str(folder)!r} is no part of the model, and not loaded"
            note(f"{what}; --lora FILE adds a LoRA")
    unet, vae, text = (configuration(folder, part) for part in ("unet", "vae", "text_encoder"))
    check_unet(unet)
    latents = vae.get("latent_channels")
    inputs, outputs = unet.get("in_channels"), unet.get("out_channels")
    if inputs != latents and inputs in EXTRA_CHANNELS and latents == 4:
        raise CheckpointError(
            f"unet: with {inputs} input channels it {EXTRA_CHANNELS[inputs]}; give the model without that, "
            f"whose UNet has {latents}"
        )
    if inputs != latents or outputs != latents:
        raise CheckpointError(
            f"unet: it takes {inputs} channels and gives {outputs}, and the latents of this vae have "
            f"{latents}; give the two of one model"
        )
    width, hidden = unet.get("cross_attention_dim"), text.get("hidden_size")
    if isinstance(width, int) and hidden is not None and width != hidden:
        raise CheckpointError(
            f"text_encoder: its embeddings are {hidden} wide, and the unet takes {width}; Stable Diffusion "
            f"1.x goes with 768, 2.x with 1024: give the two of one model"
        )


def check_unet(unet: Mapping) -> None:
    """Raises CheckpointError for a UNet that needs to be given more than latents, a timestep and a prompt."""
    needs = {
        "addition_embed_type": "further embeddings (as SDXL and its refiner do)",
        "class_embed_type": "the noise level or class of another picture (as unCLIP and upscalers do)",
        "num_class_embeds": "the noise level or class of another picture (as unCLIP and upscalers do)",
        "encoder_hid_dim_type": "embeddings of pictures (as IP-Adapter and Kandinsky do)",
    }
    for key, needed in needs.items():
        if unet.get(key) is not None:
            raise CheckpointError(
                f"unet: it needs {needed}, which this attack does not give ({key} is {unet[key]!r}); give a "
                f"Stable Diffusion 1.x or 2.x model"
            )
    if unet.get("time_cond_proj_dim") is not None:
        raise CheckpointError(
            f"unet: it is of a latent-consistency model, which is told the guidance beside the timestep "
            f"(time_cond_proj_dim is {unet['time_cond_proj_dim']}) and jumps where DDIM steps; give the "
            f"model that it was distilled from"
        )


# ---------------------------------------------------------------- what has been loaded


def check_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """Numbers of a checkpoint that would only show as nonsense, or as a traceback in the middle of a run.

    Raises:
        CheckpointError: one is none that can be meant.
    """
    for part in PARTS:
        for name, values in getattr(pipeline, part).named_parameters():
            if not values.isfinite().all():
                raise CheckpointError(f"{part}: {name} holds numbers that are not finite")
    for part in ("unet", "vae"):
        for name, value in getattr(pipeline, part).config.items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, int) and number < 0 for number in numbers):
                raise CheckpointError(f"{part}: its {name} is {value}; expected no negative numbers")
    factor = pipeline.vae.config.scaling_factor
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise CheckpointError(f"vae: its scaling_factor is {factor!r}; expected a number above 0")
    tokenizer, config = pipeline.tokenizer, pipeline.text_encoder.config
    longest = min(tokenizer.model_max_length, config.max_position_embeddings)
    if longest < 3:
        raise CheckpointError(f"tokenizer: a prompt has {longest} tokens; expected at least 3")
    tokenizer.model_max_length = longest  # a tokenizer need not know how many the encoder has places for
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"tokenizer: it has a token {largest}, but the text encoder knows {config.vocab_size}"
        )
    if len(tokenizer) < config.vocab_size:  # as one has whose files are missing: every word is unknown to it
        raise CheckpointError(
            f"tokenizer: it knows {len(tokenizer)} of the {config.vocab_size} tokens of the text encoder; "
            f"its vocab.json and merges.txt, or tokenizer.json, are missing or of another model"
        )
    check_scheduler(pipeline.scheduler)


def check_scheduler(scheduler: object) -> None:
    """Raises CheckpointError for a noise schedule that DDIM steps cannot follow."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise CheckpointError(
            f"scheduler: its prediction_type is {prediction!r}; expected {', '.join(PREDICTION_TYPES)}"
        )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise CheckpointError(f"scheduler: a {type(scheduler).__name__} has no alphas; expected DDIM or PNDM")
    # the very last may leave nothing of the image, and is never attacked
    inside = alphas.isfinite().all() and alphas[:-1].min() > 0 and 0 <= alphas[-1] and alphas.max() <= 1
    if not inside or (alphas.diff() > 0).any():
        raise CheckpointError("scheduler: its betas do not make noise that grows from 0 to 1")


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
    with stance(model.unet, "force_eager"):
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
