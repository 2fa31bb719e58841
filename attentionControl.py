"""Records the attention maps of a diffusers UNet and weights the structure losses that are made of them.

    controller = AttentionControlEditFixedWeights(weights)
    with controller.attached(unet):                       # attention processors set, and put back afterwards
        with controller.collecting() as maps:             # of one call: {layer: (B, heads, queries, keys)}
            unet(latents, t, context)
    losses = self_attention_losses(maps, reference_maps)  # (B, layers), of diffusion/attention.py
    loss = controller.weighted_sum(losses_of_all_timesteps)

With guidance the UNet runs on two branches in one batch, first the unconditional and then the
text-conditional half, of which the latter is recorded; without guidance the conditional branch is all there
is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from diffattack.diffusion.attention import AttentionLayer, Maps
from timestep_weights import (
    ADAPTIVE_RULES,
    Pace,
    TimestepWeightNetwork,
    balanced_weights,
    relative_losses,
    schedule_weights,
)

if TYPE_CHECKING:  # diffusers takes seconds to import, and main.py answers bad input without it
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


def split_heads(
    attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> list[torch.Tensor]:
    """Queries, keys and values, each `(B, heads, tokens, head width)`."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    return [
        projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projection, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    ]


def join_heads(attn: Attention, attended: torch.Tensor) -> torch.Tensor:
    """Attended values `(B, heads, tokens, head width)` to the layer's output `(B, tokens, width)`."""
    attended = attended.transpose(1, 2).flatten(2)
    for module in attn.to_out:
        attended = module(attended)
    return attended


class RecordingAttnProcessor:
    """The attention of Vaswani et al. (2017), which also hands the probabilities of the conditional branch to
    a controller.
    """

    def __init__(self, controller: AttentionControlEdit, layer: AttentionLayer, branches: int = 2):
        self.controller, self.layer, self.branches = controller, layer, branches

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(branches * B, queries, width)` to the same shape."""
        projected = split_heads(attn, hidden_states, encoder_hidden_states)
        if not self.controller.collects(self.layer):
            return join_heads(attn, F.scaled_dot_product_attention(*projected, scale=attn.scale))
        *unconditional, conditional = zip(*(states.chunk(self.branches) for states in projected))
        attended = [F.scaled_dot_product_attention(*branch, scale=attn.scale) for branch in unconditional]

        query, key, value = conditional
        scores = query * attn.scale @ key.transpose(-1, -2)  # (B, heads, queries, keys)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        self.controller.collect(self.layer, probabilities)

        attended.append(probabilities.to(value) @ value)
        return join_heads(attn, torch.cat(attended) if len(attended) > 1 else attended[0])


class AttentionControlEdit:
    """Uniform weights, the original DiffAttack: `L_self = sum_i L_i`."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps
        self._maps: Maps | None = None
        self._layers: Collection[AttentionLayer] | None = None

    def weights(self) -> torch.Tensor:
        """The weights in force, which sum to 1 over N: `(N,)`, or `(N, B)` where each image has its own."""
        return torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        """`sum_i c_i L_i` of losses `(N, B)`, with `c_i = 1`; returns `(B,)`."""
        return losses.sum(0)

    def begin(self, images: int) -> None:
        """Called before the first iteration of the attack on a batch of so many images."""

    def keep(self, rows: torch.Tensor) -> None:
        """Called when the attack goes on with those images of the batch alone that `rows` `(B,)` marks."""

    # whether `balance` wants to be called
    follows_gradients = False

    def balance(self, gradient_norms: torch.Tensor, rows: torch.Tensor) -> None:
        """Called where gradients are measured, with the norm of each `L_i`'s gradient on the latent, `(N,
        B)`, of which those of the images marked in `rows` `(B,)` count.
        """

    def update(self, losses: torch.Tensor, factors: torch.Tensor) -> None:
        """Called after each iteration; only weights that move have something to do then.

        Args:
            losses: `(N, B)`, the `L_i` of the iteration, without a gradient.
            factors: `(B,)`, of the weighted sum in the attack's loss.
        """

    def state(self) -> torch.Tensor:
        """All that moves during a run, `(M,)`: a run that goes on from it ends as if it had not been
        interrupted. Here nothing moves.
        """
        return torch.zeros(0)

    def load_state(self, state: torch.Tensor) -> None:
        """Goes on from what `state` returned."""

    @contextmanager
    def attached(self, unet: UNet2DConditionModel, branches: int = 2) -> Iterator[None]:
        """Sets recording processors on every attention layer, and puts back what was there, also after an
        error.
        """
        before = dict(unet.attn_processors)
        unet.set_attn_processor(
            {name: RecordingAttnProcessor(self, _layer(name), branches) for name in before}
        )
        try:
            yield
        finally:
            unet.set_attn_processor(before)

    @contextmanager
    def collecting(self, layers: Collection[AttentionLayer] | None = None) -> Iterator[Maps]:
        """The maps of these layers, or of all, of the UNet calls inside this block; the controller keeps
        nothing of them afterwards.
        """
        self._maps, self._layers = {}, layers
        try:
            yield self._maps
        finally:
            self._maps = None

    def collects(self, layer: AttentionLayer) -> bool:
        """Whether somebody looks at the map of a layer; otherwise its attention need not be spelt out."""
        return self._maps is not None and (self._layers is None or layer in self._layers)

    def collect(self, layer: AttentionLayer, probabilities: torch.Tensor) -> None:
        self._maps[layer] = probabilities


class AttentionControlEditFixedWeights(AttentionControlEdit):
    """Weights that never move: `L_self = sum_i N w_i L_i`, so that uniform weights and no weights are the
    same loss.

    Args:
        weights: `(N,)`, summing to 1, early to late.
    """

    def __init__(self, weights: torch.Tensor):
        super().__init__(len(weights))
        self._weights = weights

    def weights(self) -> torch.Tensor:
        return self._weights

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        return _weighted_sum(self._weights, losses)


class AttentionControlEditAdaptive(AttentionControlEdit):
    """Weights that start uniform at each image and follow its own losses by one of ADAPTIVE_RULES; images of
    a batch do not influence each other.

    Args:
        rule: moves logits `(N, B)` by relative losses `(N, B)`.
    """

    def __init__(
        self,
        num_timesteps: int,
        rule: Callable[[torch.Tensor, torch.Tensor, Pace], torch.Tensor],
        pace: Pace,
    ):
        super().__init__(num_timesteps)
        self.rule, self.pace = rule, pace
        self.begin(1)

    def begin(self, images: int) -> None:
        self._logits = torch.zeros(self.num_timesteps, images, dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        return self._logits.softmax(0)

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        return (self.num_timesteps * self.weights().to(losses) * losses).sum(0)

    def keep(self, rows: torch.Tensor) -> None:
        self._logits = self._logits[:, rows]

    def update(self, losses: torch.Tensor, factors: torch.Tensor) -> None:
        self._logits = self.rule(self._logits, relative_losses(losses.cpu().double()), self.pace)


class AttentionControlEditBalanced(AttentionControlEdit):
    """Weights that start uniform at each image and then make the gradients of its timesteps equally long; see
    `balanced_weights`.
    """

    follows_gradients = True

    def __init__(self, num_timesteps: int):
        super().__init__(num_timesteps)
        self.begin(1)

    def begin(self, images: int) -> None:
        shape = (self.num_timesteps, images)
        self._weights = torch.full(shape, 1 / self.num_timesteps, dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        return self._weights

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        return (self.num_timesteps * self._weights.to(losses) * losses).sum(0)

    def keep(self, rows: torch.Tensor) -> None:
        self._weights = self._weights[:, rows]

    def balance(self, gradient_norms: torch.Tensor, rows: torch.Tensor) -> None:
        self._weights = torch.where(
            rows.cpu(), balanced_weights(gradient_norms.cpu().double()), self._weights
        )


class AttentionControlEditLearnable(AttentionControlEdit):
    """Weights from a network that lives as long as the controller, over all images of a run.

    The loss is linear in the weights, so its gradient pushes them onto the timestep with the smallest `L_i`:
    they collapse. Detached, no gradient reaches the network, and the weights stay where they start.

    Args:
        network: gives the weights.
        learning_rate: of the network's Adam.
        detached: whether the weight is detached in the loss.
    """

    def __init__(self, network: TimestepWeightNetwork, learning_rate: float, detached: bool):
        super().__init__(len(network.start))
        self.network, self.detached = network, detached
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)

    def weights(self) -> torch.Tensor:
        with torch.no_grad():
            return self.network()

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        return _weighted_sum(self.weights(), losses)

    def update(self, losses: torch.Tensor, factors: torch.Tensor) -> None:
        """One step of gradient descent on the attack's loss, of which nothing but the weighted sum depends on
        the network.
        """
        if self.detached:
            return
        (factors * _weighted_sum(self.network(), losses)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> torch.Tensor:
        """The network's parameters and, once it has been updated, what Adam keeps of each."""
        return torch.cat([tensor.detach().flatten().double() for tensor in self._moving()])

    def load_state(self, state: torch.Tensor) -> None:
        self.optimizer.state.clear()
        if len(state) > sum(
            parameter.numel() for parameter in self.network.parameters()
        ):  # Adam makes its state in its first step
            for parameter in self.network.parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        moving = self._moving()
        with torch.no_grad():
            for tensor, values in zip(moving, state.split([tensor.numel() for tensor in moving])):
                tensor.copy_(values.view_as(tensor))

    def _moving(self) -> list[torch.Tensor]:
        parameters = list(self.network.parameters())
        return parameters + [
            self.optimizer.state[p][name]
            for p in parameters
            if p in self.optimizer.state
            for name in ("step", "exp_avg", "exp_avg_sq")
        ]


def _weighted_sum(weights: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    coefficients = (len(weights) * weights).to(losses)  # (N,)
    return (coefficients[:, None] * losses).sum(0)


def _layer(processor_name: str) -> AttentionLayer:
    name = processor_name.removesuffix(".processor")
    return AttentionLayer(name, place=name.split("_")[0], is_cross=name.endswith("attn2"))


def make_controller(
    mode: str,
    schedule: Sequence[float],
    num_timesteps: int,
    seed: int,
    pace: Pace,
) -> AttentionControlEdit:
    """The attention controller of a weight mode."""
    if mode in ADAPTIVE_RULES:
        return AttentionControlEditAdaptive(num_timesteps, ADAPTIVE_RULES[mode], pace)
    if mode == "balanced":
        return AttentionControlEditBalanced(num_timesteps)
    if mode == "uniform":
        return AttentionControlEdit(num_timesteps)
    if mode == "fixed":
        return AttentionControlEditFixedWeights(schedule_weights(schedule, num_timesteps))
    if mode in ("learnable", "learnable_detached"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TimestepWeightNetwork(num_timesteps)
        return AttentionControlEditLearnable(
            network, pace.learning_rate, detached=mode == "learnable_detached"
        )
    raise ValueError(f"unknown weight mode {mode!r}")
