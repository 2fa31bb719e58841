"""How a classifier's logits are read: an image shows one class of all (softmax), or any number of classes,
each seen by itself (sigmoid).

    head = Sigmoid(0.5)
    head.fooled(logits, labels, targets)        # (..., B, classes), (B, L), (B,) -> (..., B)

Labels are `(B, L)`, -1 for those that an image lacks; targets `(B,)`, -1 where there is none. All images of a
run are attacked and judged with one head, so that a success means the same of every classifier.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffattack.common.checkpoints import stay_offline_if_out_of_reach
from diffattack.common.errors import InputError, note

HEADS = ("softmax", "sigmoid")
THRESHOLD = 0.5  # of a sigmoid head, where none is given


def marked(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels `(B, L)`, -1 for none, as `(B, classes)`, true at each."""
    return (labels[:, :, None] == torch.arange(classes, device=labels.device)).any(1)


def aim(labels: torch.Tensor, targets: torch.Tensor, classes: int) -> torch.Tensor:
    """The classes that an attack moves, `(B, classes)`: an image's target where it has one, else its own."""
    return marked(torch.where(targets[:, None] >= 0, targets[:, None], labels), classes)


@dataclass(frozen=True)
class Softmax:
    """The image shows the class of the largest logit."""

    name = "softmax"
    threshold = None

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, `(..., classes)`."""
        return logits.softmax(-1)

    def mean_logits(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Those of the mean of the probabilities, of draws `(B, classes)`."""
        if len(logits) == 1:
            return logits[0]
        return torch.stack(list(logits)).log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Of each image's classes, or its target, the mean over them and over the classifiers: logits
        `(classifiers, B, classes)` to `(B,)`.
        """
        moved = aim(labels, targets, logits.shape[-1]).to(logits)
        weights = moved / moved.sum(-1, keepdim=True)
        return -(weights * (logits / temperature).log_softmax(-1)).sum(-1).mean(0)

    def confidence(self, probabilities: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """How sure of some classes, `(B, classes)`, probabilities `(B, classes)` are, `(B,)`: their sum."""
        return (probabilities * classes).sum(-1)

    def fooled(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether logits `(..., B, classes)` are highest at the target, or, without one, at none of the
        labels; `(..., B)`.
        """
        predicted = logits.argmax(-1)
        return torch.where(targets >= 0, predicted == targets, (predicted[..., None] != labels).all(-1))

    def margin(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """By how much logits `(..., B, classes)` are wrong: the largest of a wrong class over the largest of
        a true one; with a target, the target's over the largest of the others; `(..., B)`.
        """
        these = aim(labels, targets, logits.shape[-1])
        inside = logits.masked_fill(~these, -torch.inf).amax(-1)
        outside = logits.masked_fill(these, -torch.inf).amax(-1)
        return torch.where(targets >= 0, inside - outside, outside - inside)

    def sees(self, predicted: np.ndarray, classes: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Whether answers say one of `classes` `(..., L)`, -1 for none: `(...)`.

        Args:
            predicted: the class of the largest logit, `(...)`.
            confidences: how sure the classifier is of these classes, `(...)`, as `confidence` has it.
        """
        return (predicted[..., None] == classes).any(-1)


@dataclass(frozen=True)
class Sigmoid:
    """The image shows every class whose probability, the sigmoid of its logit, is above the threshold. It is
    seen rightly where one of its classes is shown, and fooled where none is; with a target, where that is.
    Methods and shapes are those of Softmax.
    """

    threshold: float = THRESHOLD
    name = "sigmoid"

    @property
    def edge(self) -> float:
        """The logit at the threshold."""
        return math.log(self.threshold / (1 - self.threshold))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def mean_logits(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(logits) == 1:
            return logits[0]
        draws = torch.stack(list(logits))
        return F.logsigmoid(draws).logsumexp(0) - F.logsigmoid(-draws).logsumexp(0)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """The binary cross-entropy of the classes which are there. An attack raises it, so that every true
        class goes below the threshold, or lowers that of the target, which is to be seen beside whatever else
        is seen: with a target, the true classes are left alone.
        """
        moved = aim(labels, targets, logits.shape[-1])
        # not `binary_cross_entropy_with_logits`, whose gradient is exactly zero from a logit of 17 on
        losses = -F.logsigmoid(logits / temperature).masked_fill(~moved, 0.0)
        return (losses.sum(-1) / moved.sum(-1)).mean(0)

    def confidence(self, probabilities: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The largest of theirs, since each stands by itself."""
        return probabilities.masked_fill(~classes, 0.0).amax(-1)

    def fooled(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether the target is above the threshold, or, without one, none of the labels is."""
        return self.margin(logits, labels, targets) > 0

    def margin(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """That of the threshold over the largest of a true class; with a target, the target's over it."""
        moved = aim(labels, targets, logits.shape[-1])
        over = logits.masked_fill(~moved, -torch.inf).amax(-1) - self.edge
        return torch.where(targets >= 0, over, -over)

    def sees(self, predicted: np.ndarray, classes: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        return confidences > self.threshold


Head = Softmax | Sigmoid
SOFTMAX = Softmax()


def head_named(name: str | None, threshold: float | None) -> Head:
    """The head of `--head` and `--threshold`, Softmax where neither is given.

    Raises:
        InputError: there is a threshold beside another head than sigmoid.
    """
    if name == "sigmoid":
        return Sigmoid(THRESHOLD if threshold is None else threshold)
    if threshold is not None:
        raise InputError(
            f"--threshold is {threshold:g}, and --head softmax takes the largest; give --head sigmoid"
        )
    return SOFTMAX


# ---------------------------------------------------------------- what classifiers say of theirs

# what the configuration of a model of transformers calls them
PROBLEMS = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}


def declared_head(name: str) -> str | None:
    """The head that the configuration of a model of transformers, `hf:...`, names; None where it says
    nothing, or cannot be read, which is said where the classifier is loaded.
    """
    source = name.removeprefix("hf:")
    try:
        if not Path(source).is_dir():
            stay_offline_if_out_of_reach()
            from huggingface_hub import hf_hub_download

        file = (
            Path(source, "config.json") if Path(source).is_dir() else hf_hub_download(source, "config.json")
        )
        return PROBLEMS.get(json.loads(Path(file).read_text(encoding="utf-8")).get("problem_type"))
    except (OSError, ValueError, AttributeError):
        return None


def head_of(given: str | None, classifiers: Iterable[str]) -> str:
    """The head of a run: `given` by --head, or what its classifiers say of theirs, or softmax.

    Args:
        classifiers: all that are attacked or judge, without defences.
    Raises:
        InputError: they do not agree, and none is given.
    """
    of_transformers = [name for name in dict.fromkeys(classifiers) if name.startswith("hf:")]
    declared = {name: head for name in of_transformers if (head := declared_head(name))}
    if given is None and len(set(declared.values())) > 1:
        told = " and ".join(f"{name} has a {head} head" for name, head in declared.items())
        raise InputError(f"{told}, and one head judges all of a run; give --head, or other classifiers")
    head = given or next(iter(declared.values()), "softmax")
    for name, own in declared.items():
        if own != head:
            note(f"{name} says that its head is {own}; --head {head} is given, and counts")
        elif given is None and head == "sigmoid":
            note(f"{name} says that images show several classes: --head sigmoid")
    return head
