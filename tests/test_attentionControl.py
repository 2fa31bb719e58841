"""What is recorded of attention and made of it, against other ways to compute it."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from attentionControl import AttentionControlEdit
from diffattack.diffusion.attention import (
    AttentionLayer,
    average_attention,
    principal_components,
    self_attention_losses,
)


def test_recording_changes_nothing_and_records_the_conditional_half(checkpoint):
    unet = checkpoint(heads=(1, 2, 4, 2)).unet
    latents, context = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 16, 16).double()
    unet.set_attn_processor(AttnProcessor())
    expected = unet(latents, 51, context).sample
    controller = AttentionControlEdit(5)
    with controller.attached(unet), controller.collecting() as maps:
        output = unet(latents, 51, context).sample
    with controller.attached(unet), controller.collecting() as alone:  # the conditional image as both halves
        unet(latents[1:].expand(2, -1, -1, -1), 51, context[1:].expand(2, -1, -1))
    assert torch.allclose(output, expected, atol=1e-12)
    assert sum(not layer.is_cross for layer in maps) == 10 and sum(layer.is_cross for layer in maps) == 10
    for layer, attention in maps.items():
        assert attention.shape[0] == 1 and torch.allclose(attention.sum(-1), torch.ones(()).double())
        assert torch.allclose(attention, alone[layer], atol=1e-12)


def fake_maps(grid: int, batch: int = 2) -> dict:
    torch.manual_seed(grid)
    maps = {}
    for place, kinds in (("down", (1, 2)), ("mid", (2,)), ("up", (1, 2))):
        for kind in kinds:
            shape = batch, 3, grid**2, 6 if kind == 2 else grid**2
            maps[AttentionLayer(f"{place}.a.attn{kind}", place, kind == 2)] = torch.rand(shape).double()
    return {layer: attention.softmax(-1) for layer, attention in maps.items()}


def test_self_attention_losses_are_mean_squared_errors_by_layer_or_do_not_depend_on_a_maps_size():
    a, b = fake_maps(3), {layer: attention.flip(-1) for layer, attention in fake_maps(3).items()}
    losses, relative = self_attention_losses(a, b), self_attention_losses(a, b, relative=True)
    selfs = [layer for layer in a if not layer.is_cross]
    assert losses.shape == (2, 2)
    for image in range(2):
        for column, layer in enumerate(selfs):
            expected = torch.nn.functional.mse_loss(a[layer][image], b[layer][image])
            assert torch.allclose(losses[image, column], expected)
            assert torch.allclose(relative[image, column], expected / b[layer][image].square().mean())


def test_average_attention_takes_down_and_up_layers_of_one_grid():
    maps = fake_maps(7)
    larger = {AttentionLayer("up.b.attn2", "up", True): torch.rand(2, 3, 196, 6).double()}
    down, up = (maps[AttentionLayer(f"{place}.a.attn2", place, True)].mean(1) for place in ("down", "up"))
    averaged = average_attention(maps | larger, 7, is_cross=True)
    assert torch.allclose(averaged, ((down + up) / 2).view(2, 7, 7, 6))
    nearest = average_attention(maps | larger, 16, is_cross=True)  # there is no map of 16 x 16
    assert nearest.shape == (2, 14, 14, 6)


def test_weighted_sums():
    losses = torch.arange(10.0).view(5, 2)
    assert torch.equal(AttentionControlEdit(5).weighted_sum(losses), torch.tensor([20.0, 25.0]))
    weights = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.4], dtype=torch.float64)
    assert AttentionControlEdit(5, weights).weighted_sum(losses).tolist() == pytest.approx([27, 32])


def test_principal_components_are_those_of_the_unperturbed_map():
    """Against numpy's singular value decomposition; the attacked map is seen along the same axes, from the
    same mean.
    """
    before, after = torch.rand(2, 4, 5, 20, dtype=torch.float64), torch.rand(2, 4, 5, 20, dtype=torch.float64)
    components = principal_components(before, after)
    assert components.shape == (2, 3, 4, 5, 2)
    for k in range(2):
        rows, attacked = (maps[k].reshape(20, 20).numpy() for maps in (before, after))
        axes = np.linalg.svd(rows - rows.mean(0))[2][:3]
        axes *= np.sign(axes[range(3), np.abs(axes).argmax(1)])[:, None]
        for found, maps in zip(components[..., k], (rows, attacked)):
            np.testing.assert_allclose(found.reshape(3, 20), axes @ (maps - rows.mean(0)).T, atol=1e-9)
