"""Tries a classifier before it is used, on two pictures that nobody took, and tells whether it is the one
that it was: its weights, and its answer to these pictures. Not the text of a file, in which a comment may
change; nor its name, behind which weights may be replaced.
"""

import hashlib

import torch
import torch.nn.functional as F

from diffattack.classifiers.loading import Called, weights_of
from diffattack.common.errors import InputError, one_line

# Largest differences, as parts of the largest logit, that are arithmetic's: between batches of other sizes,
# and between machines or numbers of threads.
OTHER_SIZE, TOLERANCE = 1e-2, 1e-3
FAR = 50  # a logit so far below the largest has no probability, such as that of a class that is masked
ORDER, DARK = [1, 0, 1, 1, 0], [0, 2, 3]  # in which two images are given, and where the dark one stands
NUMBERS = 8  # that an answer is kept as


def one_by_one(classifier: torch.nn.Module) -> torch.nn.Module:
    """A classifier of a single image as one of any number."""
    return Called(classifier, lambda network, images: torch.cat([network(one) for one in images.split(1)]))


def fixed_images(side: int) -> torch.Tensor:
    """Two images `(2, 3, side, side)` in [0, 1], always the same: noise, and a smooth dark one, so that what
    normalises over a batch is moved by the second.
    """
    random = torch.Generator().manual_seed(0)
    noise, coarse = torch.rand(1, 3, side, side, generator=random), torch.rand(1, 3, 4, 4, generator=random)
    smooth = F.interpolate(0.4 * coarse, (side, side), mode="bilinear", align_corners=False)
    return torch.cat([noise, smooth])


def answer(classifier: torch.nn.Module, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Logits, with what the network draws of torch's random numbers always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return classifier(images)


def checked(name: str, classifier: torch.nn.Module, side: int, attacked: bool) -> tuple[torch.nn.Module, int]:
    """A classifier, asked one image at a time where it takes no more, and how many outputs it has.

    Raises:
        InputError: it fails on images of that side, returns something else than finite logits, has no
            gradient where it is attacked, or says of an image in a batch what it does not say of it alone,
            unless it draws random numbers, of which `warnings_about_outputs` tells.
    """
    images, who = fixed_images(side)[ORDER].requires_grad_(attacked), f"classifier {name!r}"
    try:
        together, alone = answers_of(classifier, images)
    except Exception:  # networks raise whatever their code makes them
        classifier = one_by_one(classifier)
        try:
            together, alone = answers_of(classifier, images)
        except Exception as error:
            raise InputError(
                f"{who} fails on images {tuple(images.shape)} in [0, 1] ({one_line(error)}); it must take "
                f"any number of that size in float32: convert or resize in it, or give its own side as --res"
            ) from None
    check_logits(who, together, len(images))
    check_logits(who, alone, 1)
    if not together.isfinite().all():
        raise InputError(f"{who} returns numbers that are not finite; expected finite logits")
    if attacked and gradient_of(together, images) is None:
        raise InputError(
            f"{who} has no gradient at the image, so that it cannot be attacked: look for "
            f"torch.no_grad, inference_mode, detach or NumPy inside it"
        )
    with torch.no_grad():
        change = change_of(alone.expand(len(DARK), -1), together[DARK])
        # where it is not random besides, which is asked where it matters
        depends = change > OTHER_SIZE >= change_of(together, answer(classifier, images, seed=1))
    if depends:
        raise InputError(
            f"{who} says something else of an image with others beside it than without, by "
            f"{100 * change:.2g} % of its largest logit; put it into eval mode, before it is exported, too, "
            f"with nothing inside that normalises over the batch"
        )
    return classifier, together.shape[1]


def answers_of(classifier: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of images together, with a graph, and of the first of them alone."""
    together = answer(classifier, images)
    with torch.no_grad():
        return together, answer(classifier, images[:1])


def gradient_of(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor | None:
    """At the images; None where no graph leads there."""
    return torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] if logits.requires_grad else None


def check_logits(who: str, outputs: object, images: int) -> None:
    """Raises InputError where a classifier returned something else than logits of so many images."""
    is_float = isinstance(outputs, torch.Tensor) and outputs.is_floating_point()
    if not is_float or outputs.ndim != 2 or len(outputs) != images:
        wanted = f"float logits ({images}, classes), and them alone"
        raise InputError(f"{who} returns {shown(outputs)}; expected {wanted}")


def shown(value: object) -> str:
    """What an object is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"an object of type {type(value).__name__}"


def comparable(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(B, classes)` as numbers `(B, 2 classes)` that tell what an answer is: below the largest, which
    is what a softmax takes of them, and as they are, which a sigmoid does; either no further than `FAR`, so
    that neither a masked class nor what is added to all of them hides the others.
    """
    below = logits - logits.amax(-1, keepdim=True)
    return torch.cat([below.clamp(min=-FAR), logits.clamp(-FAR, FAR)], -1)


def change_of(expected: torch.Tensor, found: torch.Tensor) -> float:
    """How far logits `(B, classes)` are from others, as a part of the largest."""
    expected, found = comparable(expected), comparable(found)
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


# ---------------------------------------------------------------- what makes it the one that it was


@torch.no_grad()
def identity_of(classifier: torch.nn.Module, side: int, is_embedded: bool) -> dict:
    """As JSON holds it: `weights`, a digest; and `answer`, the logits of `fixed_images` as sums with fixed
    random signs, None where it is another each time.

    Args:
        classifier: as it is used, its outputs in order.
        is_embedded: of weights that come in a package, and are changed here before they are used, so that
            they end in other last digits elsewhere.
    """
    images, random = fixed_images(side), torch.Generator().manual_seed(0)
    logits, again = answer(classifier, images), answer(classifier, images)
    signs = torch.randint(0, 2, (NUMBERS, 2 * logits.numel()), generator=random).double() * 2 - 1
    numbers = [float(f"{sum_:.7g}") for sum_ in (signs @ comparable(logits.double()).flatten()).tolist()]
    is_same = change_of(logits, again) <= TOLERANCE
    return {
        "weights": "" if is_embedded else weights_digest(classifier),
        "answer": numbers if is_same else None,
    }


def weights_digest(classifier: torch.nn.Module) -> str:
    """A digest of all its weights; a gigabyte takes about a second."""
    digest = hashlib.sha256()
    for tensor in weights_of(classifier):
        tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def difference(known: dict | None, found: dict) -> str | None:
    """What of an identity is other than was known, None where nothing is."""
    if known is None:
        return "it is not known any more"
    if known.get("diffusion") != found.get("diffusion"):
        return "the diffusion model that its defence runs is another"
    if known["weights"] != found["weights"]:
        return "its weights are others"
    before, now = known["answer"] or [], found["answer"] or []  # of random ones nothing more is known
    largest = max(map(abs, (*before, *now)), default=0)
    same = len(before) == len(now) and all(abs(a - b) <= TOLERANCE * largest for a, b in zip(before, now))
    return None if same else "it answers otherwise with the same weights"


def check_unchanged(name: str, known: dict, found: dict) -> None:
    """Raises InputError where a classifier that is loaded again in a run is another than before."""
    change = difference(known, found)
    if change:
        raise InputError(
            f"the classifier {name} has changed since this run began ({change}); it must be the same each "
            f"time that it is loaded, so leave its files alone meanwhile, and seed what it draws"
        )
