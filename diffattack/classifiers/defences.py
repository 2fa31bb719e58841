"""What stands before a classifier: `NAME@DEFENCE`, several in a row as `NAME@resize:0.9@jpeg:75`.

    from diffattack.classifiers.registry import load_classifier
    logits = load_classifier("efficientnet_lite1@jpeg:75")(images)      # images (B, 3, H, W) in [0, 1]

A defence maps images to images; to add one, write such a function and its entry in DEFENCES. One that draws
random numbers is seen through the mean of its classifier's probabilities over several draws. Draws are the
same for every image of a batch, so that images never influence each other, and the same whenever a picture
is judged. An attack goes through all of them: through those without a useful gradient as if they were not
there on the way back (backward-pass differentiable approximation, Athalye et al., ICML 2018), and through new
draws in each iteration.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import set_checkpoint_early_stop

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.common.errors import InputError
from diffattack.common.frozen import recompute
from diffattack.data.contrast import blurred, gaussian_kernel
from diffattack.data.images import to_pixels, to_tensor

if TYPE_CHECKING:
    from diffattack.diffusion.inversion import LatentDiffusion

SEED = 0  # of the draws with which pictures are judged
# of those that an attack sees, and of those by which it ends: other ones, which nobody knows beforehand
ATTACK_SEED, STOP_SEED = 1_000_004, 500_009


def straight_through(images: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """`changed`, with the gradient of `images`."""
    return images + (changed - images).detach()


def jpeg(images: torch.Tensor, random: torch.Generator, quality: float) -> torch.Tensor:
    """Pillow's encoder at a quality."""
    decoded = []
    for image in images.detach():
        file = io.BytesIO()
        Image.fromarray(to_pixels(image)).save(file, "JPEG", quality=int(quality))
        decoded.append(np.array(Image.open(file)))
    return straight_through(images, to_tensor(np.stack(decoded)).to(images))


def bits(images: torch.Tensor, random: torch.Generator, number: float) -> torch.Tensor:
    """Fewer bits a channel (Xu, Evans and Qi, "Feature Squeezing", NDSS 2018)."""
    levels = 2 ** int(number) - 1
    return straight_through(images, (images * levels).round() / levels)


def blur(images: torch.Tensor, random: torch.Generator, sigma: float) -> torch.Tensor:
    """A Gaussian of a standard deviation in pixels, cut off at four of them; edges are mirrored."""
    return blurred(images, gaussian_kernel(sigma))


def median(images: torch.Tensor, random: torch.Generator, side: float) -> torch.Tensor:
    """The median of K x K pixels, each channel by itself (Xu, Evans and Qi, 2018); edges are mirrored."""
    side = int(side)
    padded = F.pad(images.detach(), (side // 2,) * 4, "reflect")
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    return straight_through(images, windows.flatten(-2).median(-1).values)


def resize(images: torch.Tensor, random: torch.Generator, smallest: float) -> torch.Tensor:
    """To a random side between F times its own and its own, and padded with zeros at random places (Xie et
    al., "Mitigating Adversarial Effects Through Randomization", ICLR 2018).
    """

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    full = images.shape[-1]
    least = math.ceil(smallest * full)
    side = least + below(full - least + 1)
    left, top = below(full - side + 1), below(full - side + 1)
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return F.pad(small, (left, full - side - left, top, full - side - top))


def smoothing(images: torch.Tensor, random: torch.Generator, sigma: float) -> torch.Tensor:
    """Gaussian noise; the class most often seen under it is the answer (Cohen, Rosenfeld and Kolter,
    "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019), see `Smoothed`.
    """
    return images + sigma * torch.randn(images.shape[1:], generator=random).to(images)


def denoise(images: torch.Tensor, random: torch.Generator, diffusion: LatentDiffusion) -> torch.Tensor:
    """The diffusion model's autoencoder alone: encoded and decoded."""
    return diffusion.autoencoded(images.to(diffusion.dtype)).clamp(0, 1).to(images)


def diffpure(
    images: torch.Tensor, random: torch.Generator, timestep: float, diffusion: LatentDiffusion
) -> torch.Tensor:
    """Noised to a timestep and denoised by the diffusion model, in DDIM steps of its own stride and without a
    prompt (Nie et al., "Diffusion Models for Adversarial Purification", ICML 2022).
    """
    noise = functools.partial(torch.randn, generator=random)
    return diffusion.purified(images.to(diffusion.dtype), int(timestep), noise).clamp(0, 1).to(images)


# ---------------------------------------------------------------- by name


@dataclass(frozen=True)
class Defence:
    """A function of images `(B, 3, H, W)` in [0, 1] to the same, and what it takes."""

    change: Callable[..., torch.Tensor]
    parameter: str = ""  # its letter, and the numbers it takes
    holds: Callable[[float], bool] = lambda value: True
    # of a random defence, as many as a picture is judged by, and an iteration of an attack looks through
    draws: int = 1
    attack_draws: int = 8
    needs_diffusion: bool = False
    arguments: tuple = ()  # its number and its diffusion model, as far as it has them

    def __call__(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return self.change(images, random, *self.arguments)


DEFENCES: dict[str, Defence] = {
    "jpeg": Defence(jpeg, ":Q (whole, 1 to 100)", lambda q: q == int(q) and 1 <= q <= 100),
    "bits": Defence(bits, ":B (whole, 1 to 8)", lambda b: b == int(b) and 1 <= b <= 8),
    "blur": Defence(blur, ":S (above 0, to 10)", lambda s: 0 < s <= 10),
    "median": Defence(median, ":K (odd, 3 to 15)", lambda k: k % 2 == 1 and 3 <= k <= 15),
    "resize": Defence(resize, ":F (between 0 and 1)", lambda f: 0 < f < 1, draws=10),
    "smoothing": Defence(smoothing, ":SIGMA (above 0, to 2)", lambda s: 0 < s <= 2, draws=100),
    "denoise": Defence(denoise, needs_diffusion=True),
    "diffpure": Defence(
        diffpure, ":T (whole, 1 to 999)", lambda t: t == int(t) and 1 <= t <= 999, 5, 4, needs_diffusion=True
    ),
}


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """A classifier's name without its defences, and the defences, the one that sees the image first in
    front; an `@` inside a path is part of the name.
    """
    name, defences = re.fullmatch(r"(.*?)((?:@[a-z]+(?::[^@/\\]*)?)*)", name, re.DOTALL).groups()
    return name, tuple(defences.split("@")[1:])


def make_defence(text: str, diffusion: LatentDiffusion | None = None) -> Defence:
    """The defence of that name, such as "jpeg:75", with the diffusion model, if it runs one.

    Raises:
        InputError: it is unknown, or its number is none that it takes.
    """
    name, _, number = text.partition(":")
    defence, fits = DEFENCES.get(name), False
    with suppress(ValueError, OverflowError):  # no number, or none that is finite
        fits = defence and (defence.holds(float(number)) if defence.parameter else not number)
    if not fits:
        known = ", ".join(f"{name}{defence.parameter}" for name, defence in DEFENCES.items())
        raise InputError(f"{text!r} is no defence; expected one of {known}")
    arguments = (float(number),) if number else ()
    return replace(defence, arguments=arguments + (diffusion,) * defence.needs_diffusion)


# ---------------------------------------------------------------- in front of a classifier


class Defended(torch.nn.Module):
    """A classifier behind defences, as logits `(B, classes)`: those of the mean of its probabilities over
    draws.

    Args:
        defences: the one that sees the image first in front.
        attack_draws: draws in each iteration of an attack through it.
        head: of the classifier.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        defences: Sequence[Defence],
        attack_draws: int = 1,
        head: Head = SOFTMAX,
    ):
        super().__init__()
        self.classifier, self.defences, self.head = classifier, tuple(defences), head
        self.draws = max(defence.draws for defence in defences)
        self.attack_draws = attack_draws if self.draws > 1 else 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.attacked(images, 0) if images.requires_grad else self.judged(images)

    def judged(self, images: torch.Tensor, first: int = SEED) -> torch.Tensor:
        """As pictures are judged, by draws from the seed `first` on."""
        return self.head.mean_logits(self.seen(images, first))

    def seen(self, images: torch.Tensor, first: int) -> list[torch.Tensor]:
        """The classifier's logits at as many draws as judge a picture."""
        seeds = range(first, first + self.draws)
        return [self.classifier(self.changed(images, seed)) for seed in seeds]

    def attacked(self, images: torch.Tensor, passes: int) -> torch.Tensor:
        """As an attack sees it that has looked at the images so many times before: by draws of this pass
        alone, the same for all images. The graph of the classifier is alive at one draw at a time.
        """
        draws = range(passes * self.attack_draws, (passes + 1) * self.attack_draws)
        seen = [self.changed(images, ATTACK_SEED + number) for number in draws]
        if self.attack_draws == 1:
            return under_attack(self.classifier, seen[0], passes)
        with set_checkpoint_early_stop(False):  # which a program of TorchScript does not bear
            logits = [
                recompute(under_attack, self.classifier, one, number) for one, number in zip(seen, draws)
            ]
        return self.head.mean_logits(logits)

    def changed(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """The images at one draw, as the classifier sees them."""
        random = torch.Generator().manual_seed(seed)
        for defence in self.defences:
            images = defence(images, random)
        return images


def under_attack(classifier: torch.nn.Module, images: torch.Tensor, passes: int) -> torch.Tensor:
    """A classifier's logits in an attack that has looked at the images so many times before; if there are
    random defences before it, they draw the same when this is computed anew.
    """
    is_defended = isinstance(classifier, Defended)
    return classifier.attacked(images, passes) if is_defended else classifier(images)


def at_a_stop(classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A classifier's logits by which an attack ends an image: behind random defences of other draws than
    those that judge the picture.
    """
    return classifier.judged(images, STOP_SEED) if isinstance(classifier, Defended) else classifier(images)


class Smoothed(Defended):
    """A classifier behind `smoothing`: judged by the class most often seen over draws."""

    def judged(self, images: torch.Tensor, first: int = SEED) -> torch.Tensor:
        logits = torch.stack(self.seen(images, first))
        votes = F.one_hot(logits.argmax(-1), logits.shape[-1])
        return (votes.double().mean(0) + 1e-9).log().to(images)


def defend(
    classifier: torch.nn.Module,
    defences: Sequence[str],
    diffusion: LatentDiffusion | None = None,
    attack_draws: int = 1,
    head: Head = SOFTMAX,
) -> torch.nn.Module:
    """The classifier behind these defences, itself where there are none. Smoothing answers with the one
    class that is most often seen, which a sigmoid head does not have: of that it gives mean probabilities.

    Raises:
        InputError: one needs a diffusion model and there is none.
    """
    made = [make_defence(text, diffusion) for text in defences]
    if diffusion is None and any(defence.needs_diffusion for defence in made):
        told = "@".join(defences)
        raise InputError(f"{told} needs a diffusion model; give one as --pretrained_diffusion_path")
    is_smoothed = head.threshold is None and any(defence.change is smoothing for defence in made)
    kind = Smoothed if is_smoothed else Defended
    return kind(classifier, made, attack_draws, head).eval() if made else classifier


def undefended(classifier: torch.nn.Module) -> torch.nn.Module:
    """The network behind its defences."""
    return classifier.classifier if isinstance(classifier, Defended) else classifier


def defences_of(names: Iterable[str]) -> list[Defence]:
    """All defences of the classifiers of these names."""
    return [make_defence(text) for name in names for text in split_name(name)[1]]


def attack_draws(defences: Iterable[str]) -> int:
    """In how many draws an iteration of an attack through these looks at an image, unless told otherwise."""
    known = (DEFENCES.get(text.partition(":")[0], Defence) for text in defences)  # others are refused later
    return min((defence.attack_draws for defence in known), default=Defence.attack_draws)


def is_random(name: str) -> bool:
    """Whether a defence of the classifier of this name draws random numbers."""
    return any(defence.draws > 1 for defence in defences_of([name]))


def needs_diffusion(names: Iterable[str]) -> bool:
    """Whether a defence of one of these classifiers runs the diffusion model."""
    return any(defence.needs_diffusion for defence in defences_of(names))
