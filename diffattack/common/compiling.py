"""torch.compile where a compiler is there, for those passes that are repeated often enough."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from diffattack.common.errors import InputError, one_line

# by network: its blocks of one kind share code, and each shape of each of them is compiled by itself
VARIANTS = 128


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
