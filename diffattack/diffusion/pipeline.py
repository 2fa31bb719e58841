"""Loads the diffusion model of a run: a folder in diffusers format, a single file, or a hub id."""

from __future__ import annotations

import math
import re
import warnings
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
from diffattack.common.compiling import check_compiler, compile_blocks
from diffattack.common.environment import mend_torchvision
from diffattack.common.errors import CheckpointError, InputError, one_line
from diffattack.diffusion.inversion import PREDICTION_TYPES
from diffattack.diffusion.lora import Lora, fuse_lora
from diffattack.diffusion.parts import check_parts

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
    mend_torchvision()
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
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}


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
