"""What an attack costs: how often networks are asked, and how much memory it takes at most.

with measured({"surrogate": [classifier], "UNet": [unet]}, device) as cost:
    ...
cost.counts             # {"surrogate": 31, "surrogate, backward": 30, "UNet": 91}, of images and not calls
cost.peak_memory        # bytes
"""

from __future__ import annotations

import ctypes
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

BACKWARD = ", backward"


@dataclass
class Cost:
    """Of one or several images."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)  # of images that networks were asked about, by name
    peak_memory: int = 0  # bytes

    def __add__(self, other: Cost) -> Cost:
        """With another one that follows."""
        peak = max(self.peak_memory, other.peak_memory)
        return Cost(self.seconds + other.seconds, self.counts + other.counts, peak)

    def shared_by(self, images: int, processes: int = 1) -> Cost:
        """Of one of so many images, which as many processes attack beside each other."""
        counts = Counter({name: count / images for name, count in self.counts.items()})
        return Cost(self.seconds / images / processes, counts, self.peak_memory)

    def as_row(self) -> dict:
        """For results.json."""
        return {"seconds": self.seconds, "evaluations": dict(self.counts), "peak_memory": self.peak_memory}


@contextmanager
def measured(
    networks: Mapping[str, Sequence[torch.nn.Module]],
    device: torch.device,
    afresh: bool = False,
    unused: int = 0,
) -> Iterator[Cost]:
    """Counts forward passes of networks by name, and backward passes through them, one for each image of a
    batch; a pass that checkpointing computes anew counts again.

    Args:
        afresh: leave out what this process took before the block, which costs some page faults. Otherwise
            the peak is that of the process so far.
        unused: bytes that do not count.
    """
    cost, handles = Cost(), []
    for name, each in networks.items():
        handles += [network.register_forward_hook(counter(cost.counts, name)) for network in each]
    if afresh:
        forget_peak(device)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - started
        cost.peak_memory = memory_peak(device) - unused
        for handle in handles:
            handle.remove()


def counter(counts: Counter[str], name: str) -> Callable[..., None]:
    """A forward hook that counts under this name."""

    def count(network: torch.nn.Module, inputs: tuple, output: object) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [getattr(output, "sample", output)]
        tensor = next((one for one in outputs if isinstance(one, torch.Tensor)), None)
        if tensor is None:
            return
        counts[name] += len(tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: counts.update({name + BACKWARD: len(gradient)}))

    return count


def forget_peak(device: torch.device) -> None:
    """The next `memory_peak` is of what comes after this. Only Linux can forget a process's own peak; freed
    memory that the allocator has kept is given back first, for it would count.
    """
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak(device: torch.device) -> int:
    """Bytes of tensors on a GPU; else of this process, those of now where no peak is told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else psutil.Process().memory_info().rss


def bytes_of(networks: Sequence[torch.nn.Module]) -> int:
    """What the weights of networks take."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())
