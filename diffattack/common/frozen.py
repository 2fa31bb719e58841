"""Networks whose weights do not move: nothing is computed or kept for a gradient on them.

with frozen(unet, vae, classifier):
    loss(unet(latents, t, embeddings).sample).backward()        # on the latents alone
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F


@contextmanager
def frozen(*networks: torch.nn.Module) -> Iterator[None]:
    """No parameter gradients, eval mode, and convolutions that keep no input; all of it is put back
    afterwards, also after an error.
    """
    modules = [module for network in networks for module in network.modules()]
    training = [(module, module.training) for module in modules]
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    convolutions = [module for module in modules if keeps_its_input(module)]
    try:
        for network in networks:
            network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in convolutions:
            module._conv_forward = functools.partial(convolve, module)
        yield
    finally:
        for module in convolutions:
            module.__dict__.pop("_conv_forward", None)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, was_training in training:
            module.training = was_training


def keeps_its_input(module: torch.nn.Module) -> bool:
    """Whether it is a plain 2D convolution; what a compiler makes of one is left to the compiler."""
    return (
        isinstance(module, torch.nn.Conv2d)
        and type(module)._conv_forward is torch.nn.Conv2d._conv_forward
        and "_conv_forward" not in vars(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def convolve(
    module: torch.nn.Conv2d, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of a module with fixed weights; images `(B, C, H, W)`."""
    arguments = (module.stride, module.padding, module.dilation, module.groups)
    if not images.requires_grad or torch.compiler.is_compiling():
        return F.conv2d(images, weight, bias, *arguments)
    return FixedConvolution.apply(images, weight, bias, *arguments)


class FixedConvolution(torch.autograd.Function):
    """A convolution with a gradient on its input alone, for which that input need not be kept: torch's own
    keeps it for the gradient on the weights, also where nobody asks for that.
    """

    @staticmethod
    def forward(ctx, images, weight, bias, *arguments):
        ctx.save_for_backward(weight)
        ctx.layout, ctx.arguments = (images.shape, images.stride()), arguments
        return F.conv2d(images, weight, bias, *arguments)

    @staticmethod
    def backward(ctx, gradient):
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.arguments
        # of the input, shape and layout alone are looked at
        images = torch.empty_strided(*ctx.layout, dtype=gradient.dtype, device=gradient.device)
        more = (stride, padding, dilation, False, [0, 0], groups, (True, False, False))
        gradient, _, _ = torch.ops.aten.convolution_backward(gradient, images, weight, None, *more)
        return gradient, None, None, None, None, None, None
