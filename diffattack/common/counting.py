"""What an attack costs: how often networks are asked, and how much memory it takes at most.

with measured({"surrogate": [classifier], "UNet": [unet]}, device) as costs:
    ...
costs.counts             # {"surrogate": 31, "surrogate, backward": 30, "UNet": 91}, of images and not calls
costs.peak_memory        # bytes
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffattack.common.device import peak_memory

BACKWARD = ", backward"


@dataclass(frozen=True)
class Cost:
    """Of one or several images."""

    seconds: float
    counts: Mapping[str, float]  # of evaluations, by name
    peak_memory: int  # bytes

    def shared_by(self, images: int, processes: int = 1) -> Cost:
        """Of one of so many images, which as many processes attack beside each other."""
        counts = {name: count / images for name, count in self.counts.items()}
        return Cost(self.seconds / images / processes, counts, self.peak_memory)

    def and_then(self, other: Cost) -> Cost:
        """With another one that follows."""
        counts = {
            name: self.counts.get(name, 0) + other.counts.get(name, 0)
            for name in (*self.counts, *other.counts)
        }
        peak = max(self.peak_memory, other.peak_memory)
        return Cost(self.seconds + other.seconds, counts, peak)

    def as_row(self) -> dict:
        """For results.json."""
        return {"seconds": self.seconds, "evaluations": dict(self.counts), "peak_memory": self.peak_memory}


@dataclass
class Costs:
    """Of the work inside a block of `measured`."""

    counts: Counter[str] = field(default_factory=Counter)  # of images that networks were asked about
    peak_memory: int = 0  # bytes; known at the block's end


@contextmanager
def measured(
    networks: Mapping[str, Sequence[torch.nn.Module]], device: torch.device, afresh: bool = False
) -> Iterator[Costs]:
    """Counts forward passes of networks by name, and backward passes through them, one for each image of a
    batch; a pass that checkpointing computes anew counts again.

    Args:
        afresh: leave out what this process took before the block, which costs some page faults. Otherwise
            the peak is that of the process so far.
    """
    costs, handles = Costs(), []
    for name, each in networks.items():
        for network in each:
            handles.append(network.register_forward_hook(counter(costs, name)))
    if afresh:
        forget_peak(device)
    try:
        yield costs
    finally:
        costs.peak_memory = memory_peak(device)
        for handle in handles:
            handle.remove()


def counter(costs: Costs, name: str):
    """A forward hook that counts under this name."""

    def count(network: torch.nn.Module, inputs: tuple, output: object) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [getattr(output, "sample", output)]
        tensor = next((one for one in outputs if isinstance(one, torch.Tensor)), None)
        if tensor is None:
            return
        costs.counts[name] += len(tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: costs.counts.update({name + BACKWARD: len(gradient)}))

    return count


# ---------------------------------------------------------------- memory


def forget_peak(device: torch.device) -> None:
    """The next `memory_peak` is of what comes after this. Only Linux can forget a process's own peak; freed
    memory that the allocator has kept is given back first, for it would count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def memory_peak(device: torch.device) -> int:
    """Bytes of tensors on a GPU; else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else peak_memory()


def bytes_of(networks: Sequence[torch.nn.Module]) -> int:
    """What the weights of networks take."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())
