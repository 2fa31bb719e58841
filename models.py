"""The diffusion model of a run: the device and precision that it takes, and how a checkpoint is loaded."""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from options import InputError

if TYPE_CHECKING:  # diffusers takes seconds to import, and bad input is answered without it
    from diffusers import StableDiffusionPipeline


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"--device {name} is not available on this machine; use --device auto or --device cpu"
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of the diffusion model."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and half) else torch.float32


def set_up(device: torch.device) -> None:
    """What makes the device fast: memory that is kept on a CPU, TF32 on CUDA; and, there, the same algorithms
    in every run.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep what is freed: returned to the kernel, every large tensor costs page
    faults again.

    It does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def load_pipeline(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The checkpoint from a folder, a single file or the hub; safetensors only.

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
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    if folder or file:  # a download wants its progress bar, reading a file does not
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    try:
        if file:
            pipeline = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, **unused)
        else:
            with warnings.catch_warnings():
                # of the hub's client, about how diffusers calls it
                warnings.simplefilter("ignore", UserWarning)
                kind = StableDiffusionPipeline.load_config(path)["_class_name"]
            if kind != "StableDiffusionPipeline":
                raise InputError(
                    f"--pretrained_diffusion_path: {path!r} is a {kind}; expected a Stable Diffusion 1.x or "
                    f"2.x checkpoint, a StableDiffusionPipeline (SDXL has two text encoders, which this "
                    f"attack does not know)"
                )
            pipeline = StableDiffusionPipeline.from_pretrained(
                path, dtype=dtype, use_safetensors=True, variant=variant_of(path), **unused
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        where = (
            "cannot be loaded" if folder or file else "is no folder here, and the model hub did not give it"
        )
        raise InputError(
            f"--pretrained_diffusion_path: {path!r} {where} ({reason}); give the path of a folder that "
            f"holds the checkpoint in diffusers format with safetensors weights"
        ) from None
    if device.type == "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def variant_of(path: str) -> str | None:
    """The variant "fp16" for a folder that holds the UNet's weights in that variant alone."""
    weights = [file.name for file in (Path(path) / "unet").glob("*.safetensors")]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def process_device(name: str) -> str:
    """The device of one of several processes: its own GPU, unless the flag names a device without a number of
    its own.
    """
    # the first to finish waits for the last
    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available(), timeout=timedelta(weeks=8))
    return str(state.device) if name in ("auto", "cuda") else name


def peak_memory() -> int:
    """Of this process, in bytes."""
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
