"""How far an attack may change each picture, as it is written: a PSNR, an SSIM, or an L2 distance.

budget = parse_budget("psnr=37")
budget.fits(clean, images)           # (B,), images (B, 3, H, W) in [0, 1]
budget.hold(clean, images)           # the same, each within the budget, also in 8 bits
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffattack.data.images import rounded

FIRST_PSNR = 37.0  # of the radius within which pictures are looked for whose SSIM is asked for
HALVINGS = 8


@dataclass(frozen=True)
class Budget:
    """`measure` is one of MEASURES; `value` is the least PSNR in dB, the least SSIM, or the largest L2."""

    measure: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure}={self.value:g}"

    def fits(self, clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Whether each of the images `(B, 3, H, W)` in [0, 1] is within it once it is written; `(B,)`."""
        written = rounded(images)
        if self.measure == "ssim":
            return ssim(clean, written) >= self.value
        distance = (written - clean).flatten(1).double().norm(dim=1)
        # what is printed of a picture is rounded, too, so that one at the very edge is within
        return distance <= self.largest_distance(clean) * (1 + 1e-6)

    def share(self, clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """How much of the budget each of the images `(B, 3, H, W)` uses, `(B,)`, 1 at its edge; it grows in
        proportion to a change (1 - SSIM like its square, and so this is the root).
        """
        if self.measure == "ssim":
            return ((1 - ssim(clean, images)).clamp(min=0) / (1 - self.value)).sqrt()
        return (images - clean).flatten(1).norm(dim=1) / self.largest_distance(clean)

    def largest_distance(self, clean: torch.Tensor) -> float:
        """The L2 of a picture `(B, 3, H, W)` at the edge of a PSNR or an L2; of an SSIM a guess, since that
        depends on the picture.
        """
        if self.measure == "l2":
            return self.value
        decibels = self.value if self.measure == "psnr" else FIRST_PSNR
        return math.sqrt(clean[0].numel()) * 10 ** (-decibels / 20)

    def radius(self, clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The L2 `(B,)` at which pictures that go on in the direction of these would leave it.

        Of an SSIM it is read off the pictures, since 1 - SSIM grows like the square of the distance.
        """
        guess = torch.full((len(clean),), self.largest_distance(clean)).to(clean)
        share = self.share(clean, images)
        known = (share > 0.02) & (self.measure == "ssim")
        return torch.where(known, (images - clean).flatten(1).norm(dim=1) / share, guess)

    def hold(self, clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` with their change scaled back as far as is needed; the factor has no
        gradient.
        """
        return part_of(clean, images, self.factor(clean, images.detach()))

    def factor(self, clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The largest factor `(B,)` up to 1 of the change with which each picture is within it, to a part in
        2^HALVINGS.
        """

        def holds(factor: torch.Tensor) -> torch.Tensor:
            return self.fits(clean, part_of(clean, images, factor))

        fits = self.fits(clean, images)
        inside, outside = fits.to(clean), torch.ones(len(clean)).to(clean)
        if fits.all():
            return inside
        if self.measure != "ssim":  # but for rounding it is known, and that is little unless the budget is
            distance = (images - clean).flatten(1).norm(dim=1)
            outside = torch.where(fits, outside, (self.largest_distance(clean) / distance).clamp(max=1))
            inside = torch.where(~fits & holds(0.9 * outside), 0.9 * outside, inside)
        return halved(inside, outside, holds)


def halved(
    inside: torch.Tensor, outside: torch.Tensor, holds: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Numbers `(B,)` between one of which something holds and one of which it does not, as near to the second
    as still holds, after HALVINGS of what lies between.
    """
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        there = holds(middle)
        inside, outside = torch.where(there, middle, inside), torch.where(there, outside, middle)
    return inside


def least_change(
    clean: torch.Tensor, images: torch.Tensor, reaches: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Images `(B, 3, H, W)` with the smallest part of their change that reaches what all of it reaches.

    Args:
        reaches: whether each of some images does, `(B,)`.
    """
    none, whole = torch.zeros(len(clean)).to(clean), torch.ones(len(clean)).to(clean)
    least = halved(whole, none, lambda factor: reaches(part_of(clean, images, factor)))
    return part_of(clean, images, least)


def part_of(clean: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` with a part `(B,)` of their change."""
    return clean + factor.view(-1, 1, 1, 1) * (images - clean)


MEASURES = {"psnr": math.inf, "ssim": 1, "l2": math.inf}  # with what a value is below; all are above 0


def parse_budget(text: str) -> Budget:
    """From "psnr=37", "ssim=0.98" or "l2=5.5".

    Raises:
        ValueError: the text is none of them.
    """
    measure, _, number = text.strip().partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < MEASURES.get(measure, 0):
        raise ValueError(
            f"{text!r} is no budget; expected psnr=DB such as psnr=37, ssim=S with S above 0 and below 1, or "
            f"l2=D with D above 0"
        )
    return Budget(measure, value)


def ssim(clean: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) by image, `(B,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(
        images.float(), clean.float(), data_range=1.0, reduction="none"
    ).view(-1)
