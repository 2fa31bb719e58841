"""What an attack costs: its time, how often networks are asked, and how much memory it takes at most.

with measured({"surrogate": [classifier], "UNet": [unet]}, device) as cost:
    ...
cost.counts              # {"surrogate": 31, "surrogate, backward": 30, "UNet": 91}, of images and not calls
cost.seconds, cost.peak_memory      # of bytes on a GPU those of the block, else those of the process so far
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from diffattack.common.device import peak_memory

BACKWARD = ", backward"


@dataclass
class Cost:
    """Of the work inside a block of `measured`."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)  # of images that networks were asked about
    peak_memory: int = 0  # bytes

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
    pairs = [(name, network) for name, each in networks.items() for network in each]
    handles = [network.register_forward_hook(counter(cost, name)) for name, network in pairs]
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


def counter(cost: Cost, name: str):
    """A forward hook that counts under this name."""

    def count(network: torch.nn.Module, inputs: tuple, output: object) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [getattr(output, "sample", output)]
        tensor = next((one for one in outputs if isinstance(one, torch.Tensor)), None)
        if tensor is None:
            return
        cost.counts[name] += len(tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: cost.counts.update({name + BACKWARD: len(gradient)}))

    return count
