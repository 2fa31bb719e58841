"""Loads the diffusion model of a run: a folder in diffusers format, a single file, or a hub id; and a LoRA,
low-rank changes of its layers in one file, that is added to its weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffattack.common.checkpoints import (
    check_loaded,
    check_weights,
    names_in,
    require,
    stay_offline_if_out_of_reach,
)
from diffattack.common.errors import InputError, note, one_line
from diffattack.diffusion.checks import PARTS, check_pipeline

# by network: its blocks of one kind share code, and each shape of each of them is compiled by itself
VARIANTS = 128

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

    Raises:
        InputError: there is none, or it cannot be used.
    """
    place = Path(path)
    is_file = place.suffix == ".safetensors" and place.is_file()
    is_here = is_file or (place / "model_index.json").is_file()
    if not is_here and (place.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.safetensors)", path)):
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} is no folder with a model_index.json, no .safetensors "
            f"file and no hub id"
        )
    quiet(with_downloads=not is_here)
    try:
        if not is_here:
            stay_offline_if_out_of_reach()
        pipeline = from_single_file(path, dtype) if is_file else from_parts(path, dtype)
        if prediction_type is not None:
            scheduler = pipeline.scheduler
            pipeline.scheduler = scheduler.from_config(scheduler.config, prediction_type=prediction_type)
        if lora is not None:
            fuse_lora(pipeline, lora)
        if device.type == "cpu":
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        check_pipeline(pipeline.to(device))
    except InputError:
        raise
    # whatever a damaged file, another kind of model or a configuration of other numbers is stumbled over
    except Exception as error:
        where = "cannot be loaded" if is_here else "is no folder here, and the hub did not give it"
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} {where} ({one_line(error, 200)}); give a folder in "
            f"diffusers format with safetensors weights, of Stable Diffusion 1.x or 2.x with one text encoder"
        ) from None
    return pipeline


def compile_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """Has the UNet's blocks and the decoder compiled; see `compile_blocks`."""
    unet = pipeline.unet
    compile_blocks([*unet.down_blocks, unet.mid_block, *unet.up_blocks, pipeline.vae.decoder])


def compile_blocks(blocks: Sequence[torch.nn.Module]) -> None:
    """Has each block compiled when it is first called in a `stance` "default". Whole networks are not
    compiled: on a CPU, what torch 2.13 then made of the small model's UNet had gradients that were off by up
    to a third.

    Raises:
        InputError: there is no compiler.
    """
    try:
        # something small, with a gradient, as what is compiled later has
        given = torch.ones(64, device=next(blocks[0].parameters()).device, requires_grad=True)
        torch.compile(lambda values: (values.sin() + 1).square())(given).sum().backward()
    except Exception as error:  # of whatever kind the compilers' own are
        torch._dynamo.reset()
        raise InputError(
            f"--compile: torch.compile cannot be used here ({one_line(error, 160)}); install a C++ compiler, "
            f"for CUDA with Triton, or leave --compile out"
        ) from None
    # of a graph that goes back more than once, as where gradients are measured
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(dynamic=False)
    torch.compiler.set_stance("force_eager")


def stance(network: torch.nn.Module, name: str) -> AbstractContextManager:
    """Inside it what is compiled of the network is called so ("default") or as it was written
    ("force_eager"), as elsewhere: it spares compiling for what is called a few times.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance(name) if is_compiled else nullcontext()


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

    names_in(Path(path))
    pipeline = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, **UNUSED)
    for part in PARTS:
        absent = [name for name, value in getattr(pipeline, part).named_parameters() if value.is_meta]
        check_loaded({"missing_keys": absent}, part)
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
    require(kind == "StableDiffusionPipeline", f"it is a {kind}")
    parts = {}
    for part, kinds in PARTS.items():
        library, kind = index[part]
        require(kind in kinds, f"its {part} is a {kind}; expected {' or '.join(kinds)}")
        network = getattr(transformers if library == "transformers" else diffusers, kind)
        how = dict(subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True)
        variant = check_weights(path, STEMS[part], part)
        parts[part], info = network.from_pretrained(path, variant=variant, **how)
        check_loaded(info, part)
    return diffusers.StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **parts, **UNUSED)


def loaded_files(folder: Path) -> list[Path]:
    """The files of a folder in diffusers format that are the checkpoint: what is read of it, and weights of
    other variants beside them, but no pickles, and nothing that is hidden.
    """
    parts = (*PARTS, "scheduler", "tokenizer")
    files = [path for part in parts for path in sorted((folder / part).glob("[!.]*"))]
    kinds = (".json", ".txt", ".safetensors")
    return [folder / "model_index.json", *(path for path in files if path.suffix in kinds)]


# ---------------------------------------------------------------- a LoRA in its weights

# how the names of both matrices of a layer end, in the forms that diffusers knows
DOWN, UP = r"(lora_A|down)(\.default)?\.weight$", r"(lora_B|up)(\.default)?\.weight$"


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
    return Lora(Path(match[1]), float(match[2])) if match else Lora(Path(text))


def fuse_lora(pipeline: StableDiffusionPipeline, lora: Lora) -> None:
    """Adds a LoRA to the weights of the UNet and the text encoder, by diffusers' own loader; what remains are
    plain layers, so that their attention is recorded as without it. Layers that are none of the model's,
    which the loader leaves out, are said.

    Raises:
        InputError: the file is none that fits.
    """
    shown = f"--lora: {str(lora.path)!r}"
    try:
        names = names_in(lora.path)
        layers, ups = (sum(bool(re.search(end, name)) for name in names) for end in (DOWN, UP))
        require(layers == ups, f"it has a part of a LoRA: {layers} matrices down and {ups} up")
        pipeline.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, local_files_only=True)
        modules = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
        fitting = sum(len(getattr(module, "lora_A", ())) > 0 for module in modules)
        require(fitting > 0, "none of its layers is this model's")
        pipeline.fuse_lora(lora_scale=lora.scale, safe_fusing=True)  # which refuses what is not finite
        pipeline.unload_lora_weights()
    except Exception as error:  # whatever a file of another model makes the loaders stumble over
        raise InputError(
            f"{shown} cannot be added to the diffusion model ({one_line(error)}); give a LoRA that was made "
            f"for this model, in safetensors as diffusers or kohya's scripts write it"
        ) from None
    if fitting < layers:
        note(f"{shown}: {layers - fitting} of its {layers} layers are none of this model's and left out")
