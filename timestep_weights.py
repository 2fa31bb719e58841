"""Timestep weights of the structure-preserving self-attention loss: edit this file to try a schedule of your
own.

    python main.py --weight_mode fixed --weight_schedule increasing
    python main.py --weight_mode fixed --weight_schedule 0.1,0.1,0.2,0.2,0.4

Add an entry to SCHEDULES and its name works as `--weight_schedule`. A schedule lists the attacked timesteps
from early (noisiest) to late (next to the image); it may have any length and sum, since it is stretched and
normalised. Add a function to ADAPTIVE_RULES and its name works as `--weight_mode`, with weights that move
during the attack on each image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

STUDY_ITERATIONS = 30  # on the latent of an image, in the study that this tool extends
STUDY_MODES = ("uniform", "fixed", "learnable", "learnable_detached")

SCHEDULES: dict[str, tuple[float, ...]] = {
    "learned": (0.064, 0.103, 0.158, 0.269, 0.406),  # `increasing` after some 10 images of mode `learnable`
    "increasing": (0.05, 0.08, 0.13, 0.24, 0.50),  # the start of the learnable modes
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),  # the same loss as no weights at all
    "decreasing": (0.50, 0.24, 0.13, 0.08, 0.05),  # `increasing` the other way round, a control
}


# ---------------------------------------------------------------- weights that each image learns for itself


@dataclass(frozen=True)
class Pace:
    """How fast weights move; the defaults are those of the study, in STUDY_ITERATIONS an image."""

    step: float = 0.1  # of an iteration, in the modes of ADAPTIVE_RULES
    pull: float = 1.0  # towards uniform weights, of minimax
    learning_rate: float = 1e-4  # of the weight network's Adam

    @classmethod
    def of(cls, iterations: int, step: float | None, pull: float, learning_rate: float | None) -> "Pace":
        """What is None moves weights as far in an image of so many iterations as in one of the study: a step
        of Adam is as long as its rate whatever the gradient (Kingma and Ba, 2015), and that of a rule as its
        step whatever the losses' scale.
        """
        fewer = STUDY_ITERATIONS / iterations
        return cls(
            cls.step * fewer if step is None else step,
            pull,
            cls.learning_rate * fewer if learning_rate is None else learning_rate,
        )


def minimax_step(logits: torch.Tensor, losses: torch.Tensor, pace: Pace) -> torch.Tensor:
    """The weights ascend on the loss that the latent descends, so that they go to the timesteps whose
    structure suffers most.

    Exponentiated gradient ascent on `sum_i w_i l_i - pull * KL(w || uniform)` with the pull taken implicitly,
    so that no pull is too strong: group distributionally robust optimisation (Sagawa et al.,
    "Distributionally Robust Neural Networks", ICLR 2020) with timesteps for groups. Of constant losses the
    weights end at softmax(l / pull): all on the largest without a pull, uniform under a strong one.

    Args:
        logits: `(N, B)`, whose softmax over N is the weights.
        losses: `(N, B)`, `l_i = L_i / mean L`.
    """
    return (logits + pace.step * losses) / (1 + pace.step * pace.pull)


def uncertainty_step(logits: torch.Tensor, losses: torch.Tensor, pace: Pace) -> torch.Tensor:
    """Every timestep comes to contribute as much as any other.

    Gradient descent on `sum_i exp(-s_i) l_i + s_i` (Kendall, Gal and Cipolla, "Multi-Task Learning Using
    Uncertainty to Weigh Losses", CVPR 2018) with logits `-s_i`, which ends at `w_i ~ 1 / l_i`. The gradient
    is clipped at 1, since a loss that was zero and no longer is would throw the weights away.

    Args, shapes: as of `minimax_step`.
    """
    return logits + pace.step * (1 - logits.exp() * losses).clamp(-1, 1)


ADAPTIVE_RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, Pace], torch.Tensor]] = {
    "minimax": minimax_step,
    "uncertainty": uncertainty_step,
}
WEIGHT_MODES = (*STUDY_MODES, *ADAPTIVE_RULES, "balanced")


def balanced_weights(gradient_norms: torch.Tensor) -> torch.Tensor:
    """Weights `(N, B)` under which every timestep's loss has a gradient of the same norm.

    The optimum of GradNorm (Chen et al., ICML 2018) with equal training rates, in closed form: `w_i ~ 1 /
    |gradient of L_i|`.

    Args:
        gradient_norms: `(N, B)`; where all of an image's are zero its weights are uniform.
    """
    longest = gradient_norms.amax(0, keepdim=True)
    inverse = 1 / torch.where(longest > 0, gradient_norms / longest, 1.0).clamp(min=1e-6)
    return inverse / inverse.sum(0)


def relative_losses(losses: torch.Tensor) -> torch.Tensor:
    """Losses `(N, B)` over their mean over N, which makes a step as long on every model; 1 where all are
    zero, as in the first iteration.
    """
    mean = losses.mean(0, keepdim=True)
    return torch.where(mean > 0, losses / mean.clamp(min=torch.finfo(losses.dtype).tiny), 1.0)


# ---------------------------------------------------------------- schedules


def parse_schedule(text: str) -> tuple[float, ...]:
    """A schedule from its name in SCHEDULES or from comma-separated numbers, such as "0.1,0.1,0.2,0.2,0.4".

    Raises:
        ValueError: the text is neither.
    """
    if text in SCHEDULES:
        return SCHEDULES[text]
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(
            f"unknown schedule {text!r}: expected one of {', '.join(SCHEDULES)} or numbers such as "
            f"0.1,0.1,0.2,0.2,0.4"
        ) from None


def schedule_weights(schedule: Sequence[float], num_timesteps: int) -> torch.Tensor:
    """Weights `(N,)` in float64 that sum to 1: the schedule, interpolated linearly over i / (N - 1),
    normalised.

    Args:
        schedule: non-negative weights, early to late; N of them, or at least two, which are then stretched to
            N.
        num_timesteps: N, the number of attacked timesteps.
    Raises:
        ValueError: a weight is negative or not finite, all are zero, or one weight is given for several
        timesteps.
    """
    weights = np.asarray(schedule, dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"a schedule needs finite, non-negative weights, not {list(schedule)}")
    if weights.size != num_timesteps and weights.size < 2:
        raise ValueError(
            f"a schedule of {weights.size} weights cannot be stretched to {num_timesteps} timesteps: give "
            f"{num_timesteps}, or at least 2"
        )
    if num_timesteps == 1:
        weights = weights[-1:] if weights[-1] > 0 else weights.sum(keepdims=True)
    elif weights.size != num_timesteps:
        weights = np.interp(np.linspace(0, 1, num_timesteps), np.linspace(0, 1, weights.size), weights)
    if weights.sum() == 0:
        raise ValueError(f"the weights of a schedule must not all be zero: {list(schedule)}")
    return torch.from_numpy(weights / weights.sum())


def named_schedules(num_timesteps: int) -> dict[str, np.ndarray]:
    """All of SCHEDULES for N timesteps, each `(N,)` with sum 1, by name."""
    return {name: schedule_weights(schedule, num_timesteps).numpy() for name, schedule in SCHEDULES.items()}


# ---------------------------------------------------------------- weights that one network learns over a run


class TimestepWeightNetwork(torch.nn.Module):
    """A small network whose softmax over the attacked timesteps is the weights of the learnable modes.

    It starts exactly at `start`, because its last layer starts at zero.

    Args:
        num_timesteps: N.
        start: the schedule it starts from.
        width: of the timestep embedding and the hidden layer.
    """

    def __init__(self, num_timesteps: int, start: Sequence[float] = SCHEDULES["increasing"], width: int = 32):
        super().__init__()
        self.register_buffer("start", schedule_weights(start, num_timesteps).log())
        self.embedding = torch.nn.Embedding(num_timesteps, width)
        self.hidden = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self) -> torch.Tensor:
        """Weights `(N,)` that sum to 1."""
        # Not tanh: at high learning rates it saturates, several timesteps get the same features for good, and
        # the weights stop halfway to their collapse.
        logits = self.out(F.softsign(self.hidden(self.embedding.weight))).squeeze(1)  # (N,)
        return (self.start + logits).softmax(0)
