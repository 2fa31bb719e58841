"""When a result is not to be trusted: each check gives lines that say what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.data.images import to_tensor
from diffattack.evaluation.clean_check import SHIFTS, clean_accuracy, shifted
from diffattack.evaluation.predictions import ClassifierResult

SHOWN = 20  # images that are named in a warning
CORNERS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # (8, 3), of the colours


@torch.no_grad()
def warnings_about_outputs(
    name: str,
    classifier: torch.nn.Module,
    images: np.ndarray,
    device: torch.device,
    head: Head = SOFTMAX,
) -> list[str]:
    """Outputs that are probabilities or no numbers, and answers that change."""
    x = to_tensor(images[:4]).to(device)
    first, second = classifier(x), classifier(x)
    if not (first.isfinite().all() and second.isfinite().all()):
        return [f"{name} returns numbers that are not finite for some pictures, which cannot be attacked"]
    warnings = []
    if (first >= 0).all() and torch.allclose(first.sum(-1), torch.ones_like(first[:, 0]), atol=1e-3):
        warnings.append(
            f"{name} returns probabilities; cross-entropy needs logits, and its gradients vanish where they "
            f"saturate: take the softmax off its end"
        )
    elif is_within_0_and_1(classifier, first, x):
        warnings.append(
            f"{name} returns numbers from 0 to 1 alone, as a sigmoid does; the loss needs logits: take the "
            f"sigmoid off its end"
            + (", and give --head sigmoid if an image can show several classes" * (head.threshold is None))
        )
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        warnings.append(
            f"{name} answers differently when asked twice, so that success may be luck: put it into eval "
            f"mode and switch off its randomness"
        )
    return warnings


def is_within_0_and_1(classifier: torch.nn.Module, outputs: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether outputs of images `(B, 3, H, W)` are all from 0 to 1, and those of plain colours, too, since
    few numbers can be so by chance.
    """
    if not ((outputs >= 0) & (outputs <= 1)).all():
        return False
    plain = CORNERS.to(images)[:, :, None, None].expand(-1, -1, *images.shape[-2:])
    of_plain = torch.cat([classifier(colour) for colour in plain.split(1)])
    return bool(((of_plain >= 0) & (of_plain <= 1)).all())


def has_gradient(
    classifier: torch.nn.Module,
    clean: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    head: Head = SOFTMAX,
) -> bool:
    """Whether the classifier's loss has a gradient at a picture `(H, W, 3)`; labels `(L,)`, -1 for none."""
    x = to_tensor(clean).to(device).requires_grad_()
    classes = torch.as_tensor(labels, device=device).reshape(1, -1)
    loss = head.cross_entropy(classifier(x)[None], classes, torch.full_like(classes[:, 0], -1), 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return bool(gradient.any())


def warnings_about_gradients(name: str, has_gradients: Sequence[bool]) -> list[str]:
    """Images at which the classifier's loss has no gradient, so that no attack by gradients can move."""
    dead = [str(k + 1) for k, has_one in enumerate(has_gradients) if not has_one]
    if not dead:
        return []
    return [
        f"{name} has a gradient of exactly zero at image {some_of(dead)}; that it is not fooled says nothing "
        f"about its robustness: look for steps without a gradient, or try --logit_temperature 10 where it is "
        f"too sure of itself"
    ]


def warnings_about_labels(result: ClassifierResult, classes: int) -> list[str]:
    """A clean accuracy that labels one off, or chance, would explain better."""
    labels = [
        tuple(label for label in each if label >= 0)
        for each in result.labels.reshape(len(result.labels), -1).tolist()
    ]
    others = {f"labels one {word}": shifted(labels, shift) for word, shift in SHIFTS.items()}
    places = range(len(labels))
    found = clean_accuracy(
        result.name, result.predictions[:, 0, 0], places, labels, others, classes, result.head
    )
    return [found.doubt] if found.doubt else []


def warnings_about_rounding(rows: Sequence[dict]) -> list[str]:
    """Images that fooled the surrogate as float tensors and no longer do as 8-bit files, by the rows of their
    records.
    """
    lost = [row["file"] for row in rows if row["fooled_as_tensor"] and not row["fooled"]]
    if not lost:
        return []
    return [
        f"success was lost in rounding to 8 bits, and does not count: {some_of(lost)}; more --iterations "
        f"give it a margin"
    ]


def some_of(images: Sequence[str]) -> str:
    """The first SHOWN of images, and how many more there are."""
    return ", ".join(images[:SHOWN]) + f" and {len(images) - SHOWN} more" * (len(images) > SHOWN)


def warnings_about_transfer(surrogates: Sequence[str], transfer: Sequence[str]) -> list[str]:
    """A surrogate that is asked to be a transfer classifier, too."""
    return [
        f"{name} is a surrogate and so left out of the transfer classifiers: take it out of --transfer_models"
        for name in surrogates
        if name in transfer
    ]
