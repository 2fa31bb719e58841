"""Attacks on pixels whose change is limited at each place, with the gradient through the limit."""

from __future__ import annotations

import torch

from diffattack.diffusion.composition import Composition

SUMS = ("add", "__add__", "__radd__")


class CleanPictures(torch.Tensor):
    """Clean pictures `(B, 3, H, W)` to which an attack adds a change: where the change has a gradient, the
    sum is the limited picture, `clean + J tanh(change / J)`; all else is as with any tensor.

    Attacks of libraries look at transformed copies of the sum (resized and padded, scaled, warped, mixed),
    about which a limit behind the transformation, at the classifier's door, would know nothing: the limit has
    to come between the sum and what is done to it.
    """

    composition: Composition
    sums: list[torch.Tensor]  # the last of the pictures that were looked at or returned

    @classmethod
    def of(cls, composition: Composition) -> CleanPictures:
        """The clean pictures of a composition."""
        clean = composition.clean.clone().as_subclass(cls)
        clean.composition, clean.sums = composition, []
        return clean

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") in SUMS and len(args) == 2 and result.requires_grad:
                clean = next(one for one in args if isinstance(one, cls))
                if result.shape == clean.shape:
                    result = Limit.apply(result, clean.composition)
                    clean.sums[:] = [result.detach()]
            return result


class Limit(torch.autograd.Function):
    """A composition through which a gradient can come more than once, as through the sum that it stands for:
    some attacks look at several copies of one sum, one after the other.
    """

    @staticmethod
    def forward(context, images: torch.Tensor, composition: Composition) -> torch.Tensor:
        context.images, context.composition = images, composition
        return composition(images)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.enable_grad():
            images = context.images.detach().requires_grad_()
            picture = context.composition(images)
        return torch.autograd.grad(picture, images, gradient)[0], None
