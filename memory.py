"""How much memory a computation keeps for its backward pass, and how much is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


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
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available
