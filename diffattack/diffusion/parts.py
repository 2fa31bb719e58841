"""Whether the parts of a checkpoint fit together and are of a kind that can be attacked with, by their
configurations and before any weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diffattack.common.errors import CheckpointError, note, one_line

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
