"""The device of a run: which one, in which precision, how it is made fast, and how much memory there is."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState

from diffattack.common.errors import InputError, RunError, one_line
from diffattack.common.launched import launched

# by network: its blocks of one kind share code, and each shape of each of them is compiled by itself
VARIANTS = 128


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


def process_device(name: str) -> str:
    """The device of one of several processes that a launcher started: its own GPU, unless the flag names a
    device without a number of its own.
    """
    if name not in ("auto", "cuda"):
        return name
    if not torch.cuda.is_available():
        return "cpu" if name == "auto" else name
    return f"cuda:{launched().on_its_machine % torch.cuda.device_count()}"


PATIENCE, SAID_AFTER = 300, 10  # seconds


def check_meeting_place() -> None:
    """Raises InputError where the environment does not say where processes meet."""
    here, (address, port) = launched(), (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port:
        raise InputError(
            f"the environment says that this is process {here.process} of {here.processes}, but not where "
            f"they meet (MASTER_ADDR, MASTER_PORT), which --overwrite needs; start it by torchrun or "
            f"accelerate launch, or unset RANK and WORLD_SIZE"
        )
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"the environment has MASTER_PORT={port}; expected a number from 1 to 65535")


def once_all_have_come(device: torch.device, first: Callable[[], object]) -> None:
    """Does something in the first of the processes that a launcher started, on all machines, once all of them
    have come here; the others wait until it is done.

    Nothing else makes one process wait for another: each attacks and judges its own images, and says what it
    has done by the files that it writes. The waiting itself is done by code that no signal ends, so another
    thread does it.

    Raises:
        InputError: the environment does not say where they meet.
        RunError: they have not come in `PATIENCE` seconds, or the first could not do it.
        Exception: in the first process, what kept it from doing it.
    """
    check_meeting_place()
    here, met = launched(), threading.Event()
    absent: list[Exception] = []
    failed: list[Exception] = []

    def meet() -> None:
        try:
            state = PartialState(cpu=device.type != "cuda", timeout=timedelta(seconds=PATIENCE))
            state.wait_for_everyone()
        except Exception as error:  # whatever torch's back ends raise where others do not come
            absent.append(error)
            return
        met.set()
        try:
            if here.process == 0:
                first()
            state.wait_for_everyone()
            state.destroy_process_group()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    started, said = time.monotonic(), False
    while thread.is_alive() and (met.is_set() or time.monotonic() - started < PATIENCE):
        thread.join(0.2)
        if not met.is_set() and not said and time.monotonic() - started > SAID_AFTER:
            said = True
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(
                f"process {here.process} of {here.processes} waits for the others at {place}; if there are "
                f"none, unset RANK and WORLD_SIZE",
                file=sys.stderr,
            )
    if failed and here.process == 0:
        raise failed[0]
    if failed:
        raise RunError("process 0 has ended before it had started over; what it said tells why")
    if thread.is_alive() or absent:
        reason = one_line(absent[0]) if absent else f"not in {PATIENCE} s"
        raise RunError(
            f"the other processes that WORLD_SIZE={here.processes} speaks of did not come ({reason}); start "
            f"all of them, or unset RANK and WORLD_SIZE"
        )


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
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
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
