"""The device of a run: which one, in which precision, how it is made fast, how much memory there is, and what
work on it costs.

with measured({"surrogate": [classifier], "UNet": [unet]}, device) as cost:
    ...
cost.counts              # {"surrogate": 31, "surrogate, backward": 30, "UNet": 91}, of images and not calls
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch

import diffattack.common.torchvision  # noqa: F401
from diffattack.common.errors import InputError
from diffattack.common.parallel import this_process


def resolve_device(name: str) -> torch.device:
    """Of several processes that a launcher started, each gets its own GPU, unless the flag has a number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    process = this_process()
    if name == "cuda" and process.world_size > 1 and torch.cuda.is_available():
        name = f"cuda:{process.local_rank % torch.cuda.device_count()}"
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
    """Tells glibc's allocator, where there is one, to keep what is freed, since every large tensor that is
    returned to the kernel costs page faults again; and in one place, so that other threads can use it.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, ... of malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


# ---------------------------------------------------------------- memory


@contextmanager
def bytes_saved(network: torch.nn.Module) -> Iterator[list[int]]:
    """The sizes of what autograd keeps of the computation inside this block, the network's parameters apart;
    each piece of memory counted once.
    """
    sizes, seen = [], {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor.detach()  # itself it would hold its own graph, which would then never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device, its cache included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


# ---------------------------------------------------------------- what work costs

BACKWARD = ", backward"


@dataclass
class Cost:
    """Of the work inside a block of `measured`."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)  # of images that networks were asked about
    peak_memory: int = 0  # bytes; of tensors on a GPU, else of the process since it began

    def __add__(self, other: Cost) -> Cost:
        peak = max(self.peak_memory, other.peak_memory)
        return Cost(self.seconds + other.seconds, self.counts + other.counts, peak)

    def of_image(self, images: int, processes: int) -> dict:
        """For results.json: of one of so many images, which as many processes attack beside each other."""
        evaluations = {name: count / images for name, count in self.counts.items()}
        seconds = self.seconds / images / processes
        return {"seconds": seconds, "evaluations": evaluations, "peak_memory": self.peak_memory}


@contextmanager
def measured(networks: Mapping[str, Sequence[torch.nn.Module]], device: torch.device) -> Iterator[Cost]:
    """Counts forward passes of networks by name, and backward passes through them, one for each image of a
    batch; a pass that checkpointing computes anew counts again.
    """
    cost = Cost()

    def count(name: str, network: torch.nn.Module, inputs: tuple, output: object) -> None:
        tensor = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
        cost.counts[name] += len(tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: cost.counts.update({name + BACKWARD: len(gradient)}))

    handles = [
        network.register_forward_hook(partial(count, name))
        for name, each in networks.items()
        for network in each
    ]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - started
        cost.peak_memory = peak_memory(device)
        for handle in handles:
            handle.remove()


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
