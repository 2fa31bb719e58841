"""A LoRA that is added to the weights of a diffusion model: low-rank changes of its layers, in one file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffattack.common.checkpoints import check_safetensors
from diffattack.common.errors import CheckpointError, InputError, note, one_line

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# what tensors of other kinds of changes are called
OTHERS = {"hada_w": "LoHa", "lokr_w": "LoKr", "dora_scale": "DoRA", "oft_blocks": "OFT", "lora_te2_": "SDXL"}
# how the names of both matrices of a layer end, in the forms that diffusers knows
DOWN, UP = r"(lora_A|down)(\.default)?\.weight$", r"(lora_B|up)(\.default)?\.weight$"
OTHERS |= {"text_encoder_2.": "SDXL", "transformer.": "SD3 or Flux", "lora_transformer": "SD3 or Flux"}


@dataclass(frozen=True)
class Lora:
    """A file, and how much of it is added."""

    path: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def parse_lora(text: str) -> Lora:
    """What `--lora` says: FILE, or FILE:SCALE.

    Raises:
        ValueError: the scale is no number.
    """
    match = re.fullmatch(r"(.+\.safetensors):(.+)", text)
    if not match:
        return Lora(Path(text))
    scale = float(match[2])
    if not math.isfinite(scale):
        raise ValueError(f"{match[2]} is no number")
    return Lora(Path(match[1]), scale)


def fuse_lora(pipeline: StableDiffusionPipeline, lora: Lora) -> None:
    """Adds a LoRA to the weights of the UNet and the text encoder, by diffusers' own loader; what remains are
    plain layers, so that their attention is recorded as without it.

    Raises:
        InputError: the file is none that fits.
    """
    shown = f"--lora: {str(lora.path)!r}"
    if not lora.path.is_file():
        raise InputError(f"{shown}: there is no such file; give a .safetensors file")
    try:
        check_safetensors(lora.path)
        names = names_in(lora.path)
    except CheckpointError as error:
        raise InputError(f"{shown}: {error}; only safetensors are loaded") from None
    other = next((kind for part, kind in OTHERS.items() if any(part in name for name in names)), None)
    if other:
        raise InputError(f"{shown} is of {other}; expected a LoRA for Stable Diffusion 1.x or 2.x")
    if not any("lora" in name for name in names):
        raise InputError(f"{shown} has no LoRA in it, but tensors such as {min(names)[:60]!r}")
    layers, ups = (sum(bool(re.search(end, name)) for name in names) for end in (DOWN, UP))
    if layers != ups:
        raise InputError(f"{shown} is incomplete: {layers} matrices down and {ups} up; give a whole one")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"{shown} needs the package peft ({one_line(error)}); pip install peft") from None
    try:
        pipeline.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, local_files_only=True)
        if not any(pipeline.get_list_adapters().values()):
            raise ValueError("it has no layer of this model under a name that diffusers knows")
        check_layers(pipeline, shown, layers)
        pipeline.fuse_lora(lora_scale=lora.scale)
        pipeline.unload_lora_weights()
    except InputError:
        raise
    except Exception as error:  # whatever a file of another model makes the loaders stumble over
        sizes = re.search(
            r"size mismatch for (\S+?): .*?(\[[\d, ]+\]).*?(\[[\d, ]+\])", " ".join(str(error).split())
        )
        reason = f"{sizes[1].split('.')[0]}...: {sizes[2]} for {sizes[3]}" if sizes else one_line(error, 120)
        raise InputError(
            f"{shown} does not fit the diffusion model ({reason}); give a LoRA that was made for this model"
        ) from None


def check_layers(pipeline: StableDiffusionPipeline, shown: str, layers: int) -> None:
    """Says how many of the layers of a LoRA, which has been loaded, are none of the model's, which the loader
    leaves out, and whether it changes anything.

    Raises:
        InputError: a layer holds numbers that are not finite.
    """
    modules = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
    added = [module for module in modules if len(getattr(module, "lora_A", ())) > 0]
    for module in added:
        for values in (*module.lora_A.parameters(), *module.lora_B.parameters()):
            if not values.isfinite().all():
                raise InputError(f"{shown} holds numbers that are not finite; give another file")
    if len(added) < layers:
        note(
            f"{shown}: {layers - len(added)} of its {layers} layers are none of this model's and left out; "
            f"it may have been made for another model"
        )
    if not any(values.any() for module in added for values in module.lora_B.parameters()):
        note(f"{shown} changes nothing: all that it would add is zero")


def names_in(path: Path) -> set[str]:
    """The tensors of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return set(header) - {"__metadata__"}
