"""When a result is not to be trusted: each check gives lines that say what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.images import to_tensor
from evaluation.predictions import Predictions, correct

COLLAPSED_BELOW = 1.5  # effective number of timesteps
SHOWN = 20  # images that are named in a warning


@torch.no_grad()
def warnings_about_outputs(
    name: str, classifier: torch.nn.Module, images: np.ndarray, device: torch.device
) -> list[str]:
    """Outputs that are probabilities, and answers that change."""
    x = to_tensor(images[:4]).to(device)
    first, second = classifier(x), classifier(x)
    warnings = []
    if (first >= 0).all() and torch.allclose(first.sum(-1), torch.ones_like(first[:, 0]), atol=1e-3):
        warnings.append(
            f"{name} returns probabilities; cross-entropy needs logits, and its gradients vanish where they "
            f"saturate: take the softmax off its end"
        )
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        warnings.append(
            f"{name} answers differently when asked twice, so that success may be luck: put it into eval "
            f"mode and switch off its randomness"
        )
    return warnings


def has_gradient(
    classifier: torch.nn.Module, clean: np.ndarray, labels: np.ndarray, device: torch.device
) -> bool:
    """Whether the classifier's loss has a gradient at a picture `(H, W, 3)`; labels `(L,)`, -1 for none."""
    x = to_tensor(clean).to(device).requires_grad_()
    classes = torch.as_tensor(labels, device=device).reshape(-1)
    (gradient,) = torch.autograd.grad(-classifier(x).log_softmax(-1)[0, classes[classes >= 0]].mean(), x)
    return bool(gradient.any())


def warnings_about_gradients(name: str, has_gradients: Sequence[bool]) -> list[str]:
    """Images at which the classifier's loss has no gradient, so that no attack by gradients can move."""
    dead = [str(k + 1) for k, has_one in enumerate(has_gradients) if not has_one]
    shown = ", ".join(dead[:SHOWN]) + f" and {len(dead) - SHOWN} more" * (len(dead) > SHOWN)
    return (
        [
            f"{name} has a gradient of exactly zero at image {shown}; that it is not fooled says "
            f"nothing about its robustness: "
            "look for steps without a gradient, or try --logit_temperature 10 where it is too sure of itself"
        ]
        if dead
        else []
    )


def warnings_about_labels(name: str, predictions: Predictions, labels: np.ndarray, classes: int) -> list[str]:
    """A clean accuracy that guessing explains."""
    from scipy.stats import binomtest

    count = int(correct(predictions, labels).sum())
    guessed = binomtest(count, len(labels), 1 / classes, alternative="greater").pvalue > 0.05
    if count == len(labels) or not guessed:
        return []
    shifted = {
        shift: int(correct(predictions, np.where(labels >= 0, labels + shift, -1)).sum()) for shift in (-1, 1)
    }
    shift, found = max(shifted.items(), key=lambda item: item[1])
    advice = (
        f"labels {'one higher' if shift > 0 else 'one lower'} would give {found}/{len(labels)}, so shift them"
        if found > count and classes > 2  # of two, the other is always one higher or lower
        else "look at a few images beside their labels"
    )
    return [
        f"{name} has only {count}/{len(labels)} of the clean images right, which guessing explains; labels "
        f"count from --label_base: {advice}"
    ]


def warnings_about_rounding(
    names: Sequence[str], fooled_as_tensor: Sequence[bool], fooled_as_file: Sequence[bool]
) -> list[str]:
    """Images that fooled the surrogate as float tensors and no longer do as 8-bit files."""
    lost = [
        name for name, tensor, file in zip(names, fooled_as_tensor, fooled_as_file) if tensor and not file
    ]
    return (
        [
            f"success was lost in rounding to 8 bits, and does not count: {', '.join(lost[:SHOWN])}"
            f"{f' and {len(lost) - SHOWN} more' * (len(lost) > SHOWN)}; more --iterations give it a margin"
        ]
        if lost
        else []
    )


def warnings_about_transfer(surrogates: Sequence[str], transfer: Sequence[str]) -> list[str]:
    """A surrogate that is asked to be a transfer classifier, too."""
    return [
        f"{name} is a surrogate and so left out of the transfer classifiers: take it out of --transfer_models"
        for name in surrogates
        if name in transfer
    ]
