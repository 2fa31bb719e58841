"""How a classifier's logits are read: an image shows one class of all (softmax), or any number of classes,
each seen by itself (sigmoid).

    head = Head(threshold=0.5)                  # sigmoid; SOFTMAX has no threshold
    head.fooled(logits, labels, targets)        # (..., B, classes), (B, L), (B,) -> (..., B)

Labels are `(B, L)`, -1 for those that an image lacks; targets `(B,)`, -1 where there is none. All images of a
run are attacked and judged with one head, so that a success means the same of every classifier.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffattack.common.errors import InputError

HEADS = ("softmax", "sigmoid")
THRESHOLD = 0.5  # of a sigmoid head, where none is given


def marked(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels `(B, L)`, -1 for none, as `(B, classes)`, true at each."""
    return (labels[:, :, None] == torch.arange(classes, device=labels.device)).any(1)


def aim(labels: torch.Tensor, targets: torch.Tensor, classes: int) -> torch.Tensor:
    """The classes that an attack moves, `(B, classes)`: an image's target where it has one, else its own."""
    return marked(torch.where(targets[:, None] >= 0, targets[:, None], labels), classes)


@dataclass(frozen=True)
class Head:
    """Softmax without a threshold: the image shows the class of the largest logit. Else sigmoid: it shows
    every class whose probability, the sigmoid of its logit, is above the threshold. Either is right where one
    of the image's classes is shown, and fooled where none is; with a target, where that is.
    """

    threshold: float | None = None

    @property
    def name(self) -> str:
        return HEADS[self.threshold is not None]

    @property
    def edge(self) -> float:
        """The logit at the threshold."""
        return math.log(self.threshold / (1 - self.threshold))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, `(..., classes)`."""
        return logits.softmax(-1) if self.threshold is None else logits.sigmoid()

    def mean_logits(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Those of the mean of the probabilities, of draws `(B, classes)`."""
        if len(logits) == 1:
            return logits[0]
        draws = torch.stack(list(logits))
        if self.threshold is None:
            return draws.log_softmax(-1).logsumexp(0) - math.log(len(draws))
        return F.logsigmoid(draws).logsumexp(0) - F.logsigmoid(-draws).logsumexp(0)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Of each image's classes, or its target, the mean over them and over the classifiers: logits
        `(classifiers, B, classes)` to `(B,)`. Of a sigmoid head it is the binary one of the classes which are
        there: an attack raises it, so that every true class goes below the threshold, or lowers that of the
        target, which is to be seen beside whatever else is seen.
        """
        moved, logits = aim(labels, targets, logits.shape[-1]), logits / temperature
        # not `binary_cross_entropy_with_logits`, whose gradient is exactly zero from a logit of 17 on
        likely = logits.log_softmax(-1) if self.threshold is None else F.logsigmoid(logits)
        return (-likely.masked_fill(~moved, 0.0).sum(-1) / moved.sum(-1)).mean(0)

    def confidence(self, probabilities: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """How sure of some classes, `(B, classes)`, probabilities `(B, classes)` are, `(B,)`: their sum, or
        the largest where each stands by itself.
        """
        of_these = probabilities.masked_fill(~classes, 0.0)
        return of_these.sum(-1) if self.threshold is None else of_these.amax(-1)

    def margin(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """By how much logits `(..., B, classes)` are wrong: the largest of a wrong class, or the threshold's,
        over the largest of a true one; with a target, the target's over the largest of the others, or over
        the threshold's; `(..., B)`.
        """
        moved = aim(labels, targets, logits.shape[-1])
        over = logits.masked_fill(~moved, -torch.inf).amax(-1)
        others = logits.masked_fill(moved, -torch.inf).amax(-1) if self.threshold is None else self.edge
        return torch.where(targets >= 0, over - others, others - over)

    def fooled(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether logits `(..., B, classes)` are wrong by any margin; `(..., B)`."""
        return self.margin(logits, labels, targets) > 0

    def sees(self, predicted: np.ndarray, classes: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Whether answers say one of `classes` `(..., L)`, -1 for none: `(...)`.

        Args:
            predicted: the class of the largest logit, `(...)`.
            confidences: how sure the classifier is of these classes, `(...)`, as `confidence` has it.
        """
        is_largest = (predicted[..., None] == classes).any(-1)
        return is_largest if self.threshold is None else confidences > self.threshold


SOFTMAX = Head()


def head_named(name: str | None, threshold: float | None) -> Head:
    """The head of `--head` and `--threshold`, softmax where neither is given.

    Raises:
        InputError: there is a threshold beside another head than sigmoid.
    """
    if name == "sigmoid":
        return Head(THRESHOLD if threshold is None else threshold)
    if threshold is not None:
        raise InputError(
            f"--threshold is {threshold:g}, and --head softmax takes the largest; give --head sigmoid"
        )
    return SOFTMAX
