"""What is worked out of a UNet's attention maps: the structure losses, and what record and masks show.

losses = self_attention_losses(maps, reference_maps)  # (B, layers)
average_attention(maps, 7, is_cross=True)             # (B, 7, 7, tokens)
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from diffattack.common.device import bytes_saved, free_memory
from diffattack.diffusion.inversion import Inversion, LatentDiffusion
from diffattack.diffusion.pipeline import stance

# Of the memory that is free: the maps of the unperturbed run are kept where they take at most this share,
# else computed anew at each timestep; and the graphs of all timesteps are alive at once where all that the
# attack keeps is estimated at no more than the second, else one at a time.
REFERENCE_SHARE, GRAPH_SHARE = 0.25, 0.6


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the UNet, named by its path; `place` is "down", "mid" or "up"."""

    name: str
    place: str
    is_cross: bool


Maps = dict[AttentionLayer, torch.Tensor]  # each (B, heads, queries, keys), rows sum to 1


@dataclass
class Reference:
    """The unperturbed run from z_N, which the structure losses compare with."""

    latents: list[torch.Tensor]  # (B, C, h, w) before each timestep
    maps: list[Maps] | None  # self-attention by timestep; None where they do not fit into memory
    end: torch.Tensor  # (B, C, h, w) after the last timestep
    class_attention: torch.Tensor  # (B, grid, grid, tokens), averaged over timesteps
    self_attention: torch.Tensor  # (B, h, w, h * w), averaged over timesteps
    # the side of the map of each self-attention layer, in the order in which the UNet runs them
    grids: dict[str, int]
    graph_bytes: int  # what one timestep of the perturbed run keeps for its backward pass, of an image
    squares: torch.Tensor  # (B, N, layers), mean square of each self-attention map
    looked_at: frozenset[AttentionLayer]  # those whose maps the attack needs

    def graphs_fit(self) -> bool:
        """Whether the graphs of all timesteps may be alive at once."""
        needed = len(self.end) * len(self.latents) * self.graph_bytes
        return needed <= GRAPH_SHARE * free_memory(self.end.device)


def reference_run(
    model: LatentDiffusion, collecting: Callable[..., AbstractContextManager[Maps]], inversion: Inversion
) -> Reference:
    """The unperturbed run from z_N: its latents, its self-attention maps where they fit, and what a timestep
    of the perturbed run will keep.

    Args:
        collecting: a controller's, which is attached to the model's UNet.
    """
    latents, side = inversion.latents, inversion.images.shape[-1]
    before, maps, averages, squares = [], [], [], []
    looked_at = None  # all, until it is seen how large they are
    for i in range(model.num_timesteps):
        before.append(latents)
        # the first timestep builds a graph, with all maps, only to see how large those of the perturbed run
        # will be at most
        with torch.set_grad_enabled(i == 0), collecting(looked_at) as seen, bytes_saved(model.unet) as saved:
            latents = model.guided_step(latents.clone().requires_grad_(i == 0), i, inversion).detach()
        seen = {layer: attention.detach() for layer, attention in seen.items()}
        own = self_attention(seen)
        if i == 0:
            looked_at = frozenset([*own, *layers_of_grid(seen, side // 32, is_cross=True)])
            graph_bytes, map_bytes = sum(saved), sum(attention.nbytes for attention in own.values())
            fits = model.num_timesteps * map_bytes <= REFERENCE_SHARE * free_memory(latents.device)
        maps.append(own if fits else {})
        averages.append(average_maps(seen, side))
        squares.append(torch.stack([attention.square().mean((1, 2, 3)) for attention in own.values()], 1))
    cross, mean_of_own = (torch.stack(steps).mean(0) for steps in zip(*averages))
    return Reference(
        before,
        maps if fits else None,
        latents,
        cross,
        mean_of_own,
        {layer.name: math.isqrt(attention.shape[2]) for layer, attention in own.items()},
        graph_bytes // len(latents),
        torch.stack(squares, 1),
        looked_at,
    )


@torch.no_grad()
def maps_of(
    reference: Reference,
    model: LatentDiffusion,
    collecting: Callable[..., AbstractContextManager[Maps]],
    inversion: Inversion,
    i: int,
) -> Maps:
    """The unperturbed run's self-attention maps at the i-th attacked timestep, kept or computed anew."""
    if reference.maps is not None:
        return reference.maps[i]
    with stance(model.unet, "force_eager"), collecting(reference.looked_at) as maps:
        model.guided_step(reference.latents[i], i, inversion)
    return self_attention(maps)


def self_attention(maps: Maps) -> Maps:
    """The self-attention among them."""
    return {layer: attention for layer, attention in maps.items() if not layer.is_cross}


class MeanSquare(torch.autograd.Function):
    """The mean squared difference of maps `(B, ...)` to fixed ones, `(B,)`. For the way back autograd would
    keep the difference, which is as large as either, and both are kept anyway.
    """

    @staticmethod
    def forward(ctx, maps, fixed):
        ctx.save_for_backward(maps, fixed)
        return (maps - fixed).square_().flatten(1).mean(1)

    @staticmethod
    def backward(ctx, gradient):
        maps, fixed = ctx.saved_tensors
        factor = gradient.view(-1, *[1] * (maps.ndim - 1)) * (2 / maps[0].numel())
        return (maps - fixed).mul_(factor), None


def self_attention_losses(maps: Maps, reference: Maps, relative: bool = False) -> torch.Tensor:
    """MSE between the self-attention maps of a perturbed and an unperturbed step, by layer; `L_i` is the sum
    over layers.

    Rows of a map over n places sum to one, so that its mean squared change falls like 1 / n^2 and the loss is
    made in the coarse layers.

    Args:
        relative: divides each layer's by the mean square of its unperturbed map.
    Returns:
        `(B, layers)`, layers in the order in which the UNet runs them.
    """
    losses = []
    for layer, attention in maps.items():
        if not layer.is_cross:
            loss = MeanSquare.apply(attention, reference[layer])
            losses.append(loss / reference[layer].square().mean((1, 2, 3)) if relative else loss)
    return torch.stack(losses, dim=1)


def layers_of_grid(maps: Maps, grid: int, is_cross: bool) -> list[AttentionLayer]:
    """The down and up layers of cross- or self-attention whose map is `grid` x `grid`; where there is none of
    that size, those of the nearest.
    """
    sides = {
        layer: math.isqrt(attention.shape[2])
        for layer, attention in maps.items()
        if layer.is_cross == is_cross and layer.place != "mid"
    }
    nearest = min(set(sides.values()), key=lambda side: (abs(math.log(side / grid)), side))
    return [layer for layer, side in sides.items() if side == nearest]


def average_attention(maps: Maps, grid: int, is_cross: bool) -> torch.Tensor:
    """Cross- or self-attention averaged over heads and over `layers_of_grid`.

    Returns:
        `(B, grid, grid, keys)`; the keys are the prompt's tokens, or the map's own positions.
    """
    average = torch.stack([maps[layer].mean(1) for layer in layers_of_grid(maps, grid, is_cross)]).mean(0)
    side = math.isqrt(average.shape[1])
    return average.unflatten(1, (side, side))


def average_maps(maps: Maps, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one timestep at images of that side, the cross-attention `(B, grid, grid, tokens)` of a 32nd of it,
    and without a gradient the self-attention `(B, h, w, h * w)` of a 16th of it.
    """
    cross = average_attention(maps, side // 32, is_cross=True)
    return cross, average_attention(maps, side // 16, is_cross=False).detach()


def principal_components(before: torch.Tensor, after: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Two self-attention maps `(B, h, w, keys)`, seen along the first principal components of the first; `(2,
    count, h, w, B)`.

    Both are taken along the same axes, so that what differs between the two pictures differs between the
    maps. An axis has no sign of its own; it is turned so that its largest entry is positive.
    """
    mean = before.mean((1, 2), keepdim=True)
    centred = (before - mean).flatten(1, 2)  # (B, queries, keys)
    vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred).eigenvectors
    axes = vectors[..., -count:].flip(-1)  # (B, keys, count)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    components = [(attention - mean) @ axes[:, None] for attention in (before, after)]
    return torch.stack(components).permute(0, 4, 2, 3, 1)


def masked_variance(attention: torch.Tensor, class_tokens: torch.Tensor) -> torch.Tensor:
    """Unbiased variance of each image's attention `(B, h, w, tokens)` over all positions and its class tokens
    `(B, tokens)`; `(B,)`.
    """
    mask = class_tokens[:, None, None, :].expand_as(attention).to(attention)
    count = mask.sum((1, 2, 3))
    mean = (attention * mask).sum((1, 2, 3)) / count
    return ((attention - mean[:, None, None, None]).square() * mask).sum((1, 2, 3)) / (count - 1)
