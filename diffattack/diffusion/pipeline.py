"""Loads the diffusion model of a run: a folder in diffusers format, a single file, or a hub id; and a LoRA,
low-rank changes of its layers in one file, that is added to its weights.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffattack.common.checkpoints import (
    check_loaded,
    check_safetensors,
    check_weights,
    stay_offline_if_out_of_reach,
    weight_files,
)
from diffattack.common.device import check_compiler, compile_blocks
from diffattack.common.errors import CheckpointError, InputError, note, one_line
from diffattack.diffusion.checks import PARTS, check_parts, check_pipeline

if TYPE_CHECKING:  # diffusers takes seconds to import, and bad input is answered without it
    from diffusers import StableDiffusionPipeline


def load_pipeline(
    path: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    lora: Lora | None = None,
    prediction_type: str | None = None,
) -> StableDiffusionPipeline:
    """The checkpoint from a folder, a single file or the hub, with a LoRA in its weights; safetensors only.
    What its UNet predicts is what its scheduler says, unless it is given.

    On a CPU the networks are laid out channels-last: on two cores an iteration on the small model then took
    1.39 s instead of 1.54.
    """
    folder, file = Path(path).is_dir(), path.endswith(".safetensors")
    if folder and not (Path(path) / "model_index.json").is_file():
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} has no model_index.json; give a Stable Diffusion folder "
            f"in diffusers format, or a .safetensors file"
        )
    if file and not Path(path).is_file():
        raise InputError(
            f"--pretrained_diffusion_path: there is no file {path!r}; give a Stable Diffusion folder in "
            f"diffusers format, or a .safetensors file"
        )
    if not folder and not file and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(
            f"--pretrained_diffusion_path: there is no folder {path!r}; give a Stable Diffusion folder in "
            f"diffusers format, or a hub id such as Manojb/stable-diffusion-2-base"
        )
    quiet(with_downloads=not folder and not file)
    if not folder and not file:
        stay_offline_if_out_of_reach()
    try:
        pipeline = from_single_file(path, dtype) if file else from_parts(path, dtype)
        if prediction_type is not None:
            scheduler = pipeline.scheduler
            pipeline.scheduler = scheduler.from_config(scheduler.config, prediction_type=prediction_type)
        check_pipeline(pipeline)
        if lora is not None:
            fuse_lora(pipeline, lora)
    except InputError:
        raise
    # whatever a damaged file or a configuration of other numbers makes the loaders stumble over
    except Exception as error:
        where = (
            "cannot be loaded" if folder or file else "is no folder here, and the model hub did not give it"
        )
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} {where} ({one_line(error, 200)}); give the path "
            f"of a folder that holds the checkpoint in diffusers format with safetensors weights"
        ) from None
    if device.type == "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def compile_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """Has the UNet's blocks and the decoder compiled when they are first called.

    Raises:
        InputError: there is no compiler.
    """
    check_compiler(pipeline.device)
    unet = pipeline.unet
    compile_blocks([*unet.down_blocks, unet.mid_block, *unet.up_blocks, pipeline.vae.decoder])


# not part of the attack
UNUSED = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


# how the files of their weights begin
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def quiet(with_downloads: bool) -> None:
    """Silences the libraries; a download keeps its progress bar, reading a file needs none."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    if not with_downloads:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def from_single_file(path: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    check_safetensors(Path(path))
    pipeline = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, **UNUSED)
    for part in PARTS:
        absent = [name for name, value in getattr(pipeline, part).named_parameters() if value.is_meta]
        check_loaded({"missing_keys": absent})
    return pipeline


def from_parts(path: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a folder or of the hub, each network loaded by itself, because only then its loader
    says what of it was not there.
    """
    import diffusers
    import transformers

    with warnings.catch_warnings():
        # of the hub's client, about how diffusers calls it
        warnings.simplefilter("ignore", UserWarning)
        index = diffusers.StableDiffusionPipeline.load_config(path)
    kind = index["_class_name"]
    if kind not in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} is a {kind}; expected a Stable Diffusion 1.x or "
            f"2.x checkpoint, a StableDiffusionPipeline (SDXL has two text encoders, which this "
            f"attack does not know)"
        )
    if Path(path).is_dir():
        check_parts(Path(path), index)
    parts = {}
    for part, kinds in PARTS.items():
        library, kind = index[part]
        if kind not in kinds:
            raise CheckpointError(f"its {part} is a {kind}; expected {' or '.join(kinds)}")
        variant = variant_of(Path(path) / part, STEMS[part])
        if Path(path).is_dir():
            check_weights_of(Path(path), part, variant)
        network = getattr(transformers if library == "transformers" else diffusers, kind)
        parts[part], info = network.from_pretrained(
            path,
            subfolder=part,
            dtype=dtype,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
        )
        try:
            check_loaded(info)
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from None
    return diffusers.StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **parts, **UNUSED)


def check_weights_of(folder: Path, part: str, variant: str | None) -> None:
    """Raises CheckpointError, which names the part, where its weights cannot be loaded."""
    try:
        check_weights(folder / part, STEMS[part], variant)
    except CheckpointError as error:
        raise CheckpointError(f"{part}: {error}") from None


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant "fp16" of a part of which there is no other; of the hub none."""
    try:
        has_plain = bool(weight_files(folder, stem))
    except CheckpointError:  # of an index that is none, which is said where it is read
        has_plain = True
    return "fp16" if not has_plain and weight_files(folder, stem, "fp16") else None


def loaded_files(folder: Path) -> list[Path]:
    """The files of a folder in diffusers format that are read: these are the checkpoint, and no others."""
    tokenizer = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    named = ["model_index.json", "scheduler/scheduler_config.json"]
    named += [f"tokenizer/{name}" for name in (*tokenizer, "special_tokens_map.json", "added_tokens.json")]
    files = [folder / name for name in (*named, *(f"{part}/config.json" for part in PARTS))]
    for part, stem in STEMS.items():
        try:
            files += weight_files(folder / part, stem, variant_of(folder / part, stem))
        except CheckpointError:
            continue  # said where it is loaded
    return [path for path in files if path.is_file()]


# ---------------------------------------------------------------- a LoRA in its weights

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
