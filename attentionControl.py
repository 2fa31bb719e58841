"""Records the attention maps of a diffusers UNet and weights the structure losses that are made of them.

    controller = AttentionControlEdit(num_timesteps, weights)
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
    """Records attention maps, and weighs their change by weights that never move: `L_self = sum_i N w_i L_i`,
    so that uniform weights, the default, are the loss of the original DiffAttack, which has none.

    Args:
        num_timesteps: N.
        weights: `(N,)`, summing to 1, early to late.
    """

    # whether `balance` wants to be called
    follows_gradients = False

    def __init__(self, num_timesteps: int, weights: torch.Tensor | None = None):
        self.num_timesteps = num_timesteps
        uniform = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        self._weights = uniform if weights is None else weights
        self._maps: Maps | None = None
        self._layers: Collection[AttentionLayer] | None = None

    def weights(self) -> torch.Tensor:
        """The weights in force, which sum to 1 over N: `(N,)`, or `(N, B)` where each image has its own."""
        return self._weights

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        """`sum_i N w_i L_i` of losses `(N, B)`; returns `(B,)`."""
        return weighted_sum(self.weights(), losses)

    def begin(self, images: int) -> None:
        """Called before the first iteration of the attack on a batch of so many images."""

    def keep(self, rows: torch.Tensor) -> None:
        """Called when the attack goes on with those images of the batch alone that `rows` `(B,)` marks."""

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

    def begin(self, images: int) -> None:
        self._logits = torch.zeros(self.num_timesteps, images, dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        return self._logits.softmax(0)

    def keep(self, rows: torch.Tensor) -> None:
        self._logits = self._logits[:, rows]

    def update(self, losses: torch.Tensor, factors: torch.Tensor) -> None:
        self._logits = self.rule(self._logits, relative_losses(losses.cpu().double()), self.pace)


class AttentionControlEditBalanced(AttentionControlEdit):
    """Weights that start uniform at each image and then make the gradients of its timesteps equally long; see
    `balanced_weights`.
    """

    follows_gradients = True

    def begin(self, images: int) -> None:
        shape = (self.num_timesteps, images)
        self._weights = torch.full(shape, 1 / self.num_timesteps, dtype=torch.float64)

    def keep(self, rows: torch.Tensor) -> None:
        self._weights = self._weights[:, rows]

    def balance(self, gradient_norms: torch.Tensor, rows: torch.Tensor) -> None:
        balanced = balanced_weights(gradient_norms.cpu().double())
        self._weights = torch.where(rows.cpu(), balanced, self._weights)


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
        for parameter in network.parameters():  # what Adam would begin with in its first step
            means = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **means}

    def weights(self) -> torch.Tensor:
        with torch.no_grad():
            return self.network()

    def update(self, losses: torch.Tensor, factors: torch.Tensor) -> None:
        """One step of gradient descent on the attack's loss, of which nothing but the weighted sum depends on
        the network.
        """
        if self.detached:
            return
        (factors * weighted_sum(self.network(), losses)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> torch.Tensor:
        """The network's parameters, and what Adam keeps of each."""
        return torch.cat([tensor.detach().flatten().double() for tensor in self._moving()])

    @torch.no_grad()
    def load_state(self, state: torch.Tensor) -> None:
        moving = self._moving()
        for tensor, values in zip(moving, state.split([tensor.numel() for tensor in moving])):
            tensor.copy_(values.view_as(tensor))

    def _moving(self) -> list[torch.Tensor]:
        kept = [tensor for each in self.optimizer.state.values() for tensor in each.values()]
        return [*self.network.parameters(), *kept]


def weighted_sum(weights: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """`sum_i N w_i L_i` of weights `(N,)`, or `(N, B)`, and losses `(N, B)`; returns `(B,)`."""
    if weights.ndim == 2:
        return (len(weights) * weights.to(losses) * losses).sum(0)
    return ((len(weights) * weights).to(losses)[:, None] * losses).sum(0)


def _layer(processor_name: str) -> AttentionLayer:
    name = processor_name.removesuffix(".processor")
    return AttentionLayer(name, place=name.split("_")[0], is_cross=name.endswith("attn2"))


def make_controller(
    mode: str, schedule: Sequence[float], num_timesteps: int, seed: int, pace: Pace
) -> AttentionControlEdit:
    """The attention controller of one of WEIGHT_MODES."""
    if mode in ADAPTIVE_RULES:
        return AttentionControlEditAdaptive(num_timesteps, ADAPTIVE_RULES[mode], pace)
    if mode == "balanced":
        return AttentionControlEditBalanced(num_timesteps)
    if mode in ("uniform", "fixed"):
        weights = schedule_weights(schedule, num_timesteps) if mode == "fixed" else None
        return AttentionControlEdit(num_timesteps, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TimestepWeightNetwork(num_timesteps)
    return AttentionControlEditLearnable(network, pace.learning_rate, mode == "learnable_detached")
