"""Networks whose weights do not move: nothing is computed or kept for a gradient on them; and what is
computed once more on the way back instead of being kept.

with frozen(unet, vae, classifier):
    loss(unet(latents, t, embeddings).sample).backward()        # on the latents alone
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# recompute(function, *arguments): what it returns; its graph is not kept, but computed on the way back
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def frozen(*networks: torch.nn.Module) -> Iterator[None]:
    """No parameter gradients, eval mode, and convolutions that keep no input; all of it is put back
    afterwards, also after an error.
    """
    training = [(module, module.training) for network in networks for module in network.modules()]
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    before = torch.nn.Conv2d._conv_forward
    try:
        for network in networks:
            network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        torch.nn.Conv2d._conv_forward = convolve
        yield
    finally:
        torch.nn.Conv2d._conv_forward = before
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, was_training in training:
            module.training = was_training


TORCHS_OWN = torch.nn.Conv2d._conv_forward


def convolve(
    module: torch.nn.Conv2d, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a convolution computes of images `(B, C, H, W)`; what a compiler makes of one is left to it."""
    is_plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    is_fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if torch.compiler.is_compiling() or not (is_plain and is_fixed and images.requires_grad):
        return TORCHS_OWN(module, images, weight, bias)
    arguments = (module.stride, module.padding, module.dilation, module.groups)
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
