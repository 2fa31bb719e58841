"""How a picture is made of what the decoder gives: all of it, or what the attack adds to the clean picture.

limits = change_limits(clean, 0.5)
composition = Composition(clean, decode(unperturbed_end), limits, high_pass=1.5, colour=0.3)
image = composition(decode(latents))         # (B, 3, H, W) in [0, 1], differentiable
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffattack.data.contrast import blurred, gaussian_kernel, local_contrast, luminance

LEVEL, MOST = 1 / 255, 5 / 255  # about the least and the largest limit of a change
AROUND = 4.0  # standard deviation in pixels of the window in which its energy is held


@dataclass(frozen=True)
class Composition:
    """Pictures of decoded latents.

    Without `base` the picture is what the decoder gives. With it, which is what the decoder gives of the
    unperturbed run (or the clean picture, of an attack on pixels), the picture is the clean one plus what the
    attack adds, so that what the autoencoder loses is not seen.
    """

    clean: torch.Tensor  # (B, 3, H, W) in [0, 1]
    base: torch.Tensor | None = None  # (B, 3, H, W) around [0, 1]
    limits: torch.Tensor | None = None  # (B, 1, H, W), of the change from `base`: see `change_limits`
    mask: torch.Tensor | None = None  # (B, 1, H, W) in [0, 1]; where it is 0 the clean picture stays
    # of the change from `base`, too: it loses what a Gaussian of so many pixels keeps of it, and of its
    # colour all but this part
    high_pass: float = 0.0
    colour: float = 1.0

    def __call__(self, decoded: torch.Tensor, unperturbed: bool = False) -> torch.Tensor:
        """`(B, 3, H, W)` around [0, 1] to the same in [0, 1].

        Args:
            unperturbed: that the latents have not moved, so that nothing changes but by rounding, which does
                not count; the gradient is that of what is decoded.
        """
        if self.base is None:
            image = decoded.clamp(0, 1)
            return image if self.mask is None else self.mask * image + (1 - self.mask) * self.clean
        residual = decoded - self.base
        if unperturbed:
            residual = residual - residual.detach()
        if self.high_pass:
            residual = residual - blurred(residual, gaussian_kernel(self.high_pass))
        if self.colour != 1:
            residual = torch.lerp(luminance(residual), residual, self.colour)
        if self.limits is not None:
            energy = blurred(residual.square().mean(1, keepdim=True), gaussian_kernel(AROUND))
            residual = residual / (1 + energy / self.limits.square()).sqrt()
        if self.mask is not None:
            residual = self.mask * residual
        return (self.clean + residual).clamp(0, 1)


def change_limits(clean: torch.Tensor, factor: float) -> torch.Tensor | None:
    """The root mean square that a change of pictures `(B, 3, H, W)` may have around each place, J with
    `1/J^2 = 1/(1/255 + factor * contrast)^2 + 1/(5/255)^2`: `(B, 1, H, W)`. None where the factor is 0.

    An eye misses a change where the picture's luminance has contrast, but not one of any size. What it sees
    is the energy around a place: a change whose mean square is E in a Gaussian window of deviation 4 pixels
    becomes `change / sqrt(1 + E / J^2)`, so that a small one stays and a large one comes to about J.
    """
    if factor == 0:
        return None
    unseen = LEVEL + factor * local_contrast(clean)
    return (unseen**-2 + MOST**-2) ** -0.5


def attention_mask(attention: torch.Tensor, class_tokens: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Where the unperturbed run looks at the true class: attention `(B, grid, grid, tokens)` to the class
    tokens `(B, tokens)` over its maximum, resized to `size`; `(B, 1, H, W)` in [0, 1].
    """
    tokens = class_tokens[:, None, None, :].to(attention)
    attention = (attention * tokens).sum(-1) / tokens.sum(-1)  # (B, grid, grid)
    mask = (attention / attention.amax((1, 2), keepdim=True))[:, None]
    return F.interpolate(mask, size, mode="bilinear").clamp(0, 1)
