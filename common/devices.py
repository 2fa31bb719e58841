"""The device of a run: which one, in which precision, how it is made fast, and how much memory there is."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState

from common.errors import InputError, RunError, one_line
from common.launched import launched


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
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


PATIENCE, SAID_AFTER = 300, 10  # seconds


def wait_for_the_others(device: torch.device) -> None:
    """Until all processes that a launcher started, on all machines, have come here.

    Nothing else makes one process wait for another: each attacks and judges its own images, and says what it
    has done by the files that it writes. The waiting itself is done by code that no signal ends, so another
    thread does it.

    Raises:
        RunError: they have not come in `PATIENCE` seconds.
    """
    here = launched()
    place = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    if not all(place.values()):
        raise InputError(
            f"the environment says that this is process {here.process} of {here.processes}, but not where "
            f"they meet (MASTER_ADDR, MASTER_PORT), which --overwrite needs; start it by torchrun or "
            f"accelerate launch, or unset RANK and WORLD_SIZE"
        )
    raised: list[BaseException] = []

    def meet() -> None:
        try:
            state = PartialState(cpu=device.type != "cuda", timeout=timedelta(seconds=PATIENCE))
            state.wait_for_everyone()
            state.destroy_process_group()
        except Exception as error:  # whatever torch's back ends raise where others do not come
            raised.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    started, said = time.monotonic(), False
    while thread.is_alive() and time.monotonic() - started < PATIENCE:
        thread.join(0.2)
        if thread.is_alive() and not said and time.monotonic() - started > SAID_AFTER:
            said = True
            print(
                f"process {here.process} of {here.processes} waits for the others at {place['MASTER_ADDR']}:"
                f"{place['MASTER_PORT']}; if there are none, unset RANK and WORLD_SIZE",
                file=sys.stderr,
            )
    if thread.is_alive() or raised:
        reason = one_line(raised[0]) if raised else f"not in {PATIENCE} s"
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


def peak_memory() -> int:
    """Of this process, in bytes."""
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
