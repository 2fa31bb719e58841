"""The device of a run: which one, in which precision, how it is made fast, and how much memory there is."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch

import diffattack.common.torchvision  # noqa: F401
from diffattack.common.errors import InputError, one_line
from diffattack.common.parallel import this_process

# by network: its blocks of one kind share code, and each shape of each of them is compiled by itself
VARIANTS = 128


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
    """Tells glibc's allocator to keep what is freed: returned to the kernel, every large tensor costs page
    faults again. And to keep it in one place, so that what one thread frees another can use.

    It does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, ... of malloc.h
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


SHORT_BELOW = 0.2  # of all memory


def memory_is_short(device: torch.device) -> bool:
    """Whether what is not needed at once had better be freed."""
    if device.type == "cuda":
        return free_memory(device) < SHORT_BELOW * torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().available < SHORT_BELOW * psutil.virtual_memory().total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device, its cache included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU since its statistics were reset; else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- torch.compile


def check_compiler(device: torch.device) -> None:
    """Compiles something small.

    Raises:
        InputError: there is nothing that could.
    """
    try:
        # with a gradient, as what is compiled later has
        given = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda values: (values.sin() + 1).square())(given).sum().backward()
    except Exception as error:  # of whatever kind the compilers' own are
        torch._dynamo.reset()
        raise InputError(
            f"--compile: torch.compile cannot be used here ({one_line(error, 160)}); install a C++ compiler, "
            f"for CUDA with Triton, or leave --compile out"
        ) from None


def compile_blocks(blocks: Iterable[torch.nn.Module]) -> None:
    """Has each block compiled when it is first called. Whole networks are not compiled: on a CPU, what
    torch 2.13 then made of the small model's UNet had gradients that were off by up to a third.
    """
    # of a graph that goes back more than once, as where gradients are measured
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(dynamic=False)


def stance(network: torch.nn.Module, name: str) -> AbstractContextManager:
    """Inside it what is compiled of the network is called so ("default") or as it was written
    ("force_eager"), which spares compiling for what is called a few times.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance(name) if is_compiled else nullcontext()
