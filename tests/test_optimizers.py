"""What moves latents, against a plain loop over images, and on a decoder whose steps are known."""

import pytest
import torch

from diffattack.diffusion.optimizers import AdamW, Momentum

RANDOM = torch.Generator().manual_seed(0)
START = torch.randn(3, 4, 8, 8, generator=RANDOM, dtype=torch.float64)
AIM = torch.randn(3, 4, 8, 8, generator=RANDOM, dtype=torch.float64)
GAIN = torch.tensor([2.0, 0.5, 10.0], dtype=torch.float64)  # of a decoder that is a change of scale
RADIUS = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)


def momentum(rows=slice(None), iterations=10) -> Momentum:
    """With a first guess of the gain that is right: the picture is as large as it."""
    start = START[rows]
    pictures = GAIN[rows].view(-1, 1, 1, 1) * start
    return Momentum(start, RADIUS[rows], iterations, pictures, start)


def walk(optimizer, rows=slice(None), steps=10, shown=lambda change: change):
    """Towards AIM; returns how far the picture is after each step, `(steps, B)`, but for what limits leave
    of a change.
    """
    distances = []
    for _ in range(steps):
        change = GAIN[rows].view(-1, 1, 1, 1) * (optimizer.latents.detach() - START[rows])
        ((optimizer.latents - AIM[rows]) ** 3).abs().sum().backward()
        optimizer.step(shown(change))
        change = GAIN[rows].view(-1, 1, 1, 1) * (optimizer.latents.detach() - START[rows])
        distances.append(change.flatten(1).norm(dim=1))
    return torch.stack(distances)


def test_momentum_agrees_with_a_plain_loop():
    optimizer = momentum()
    walk(optimizer, steps=4)
    for k in range(3):
        z, g = START[k].clone(), torch.zeros_like(START[k])
        for _ in range(4):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(((z - AIM[k]) ** 3).abs().sum(), z)
            with torch.no_grad():
                g = g + gradient / gradient.abs().mean()
                z = START[k] + min(1, RADIUS[k] / (GAIN[k] * (z - START[k])).norm()) * (z - START[k])
                z = z - 2 * RADIUS[k] / 10 / GAIN[k] * g / g.norm()
        assert torch.allclose(optimizer.latents[k], z, rtol=1e-9)


def test_pictures_grow_by_twice_the_budget_over_the_iterations_and_stay_near_it():
    distances = walk(momentum(), steps=10) / RADIUS
    assert distances[0].tolist() == pytest.approx([0.2] * 3)
    assert (distances[:5].diff(dim=0) > 0.15).all()  # almost straight on
    assert (distances <= 1.2 + 1e-9).all() and (distances[5:] > 0.9).all()


def test_a_wrong_guess_of_the_gain_is_mended_by_the_first_step():
    optimizer = momentum()
    optimizer.gain = optimizer.gain * torch.tensor([3.0, 0.5, 1.0])
    distances = walk(optimizer, steps=3) / RADIUS
    assert distances[0].tolist() == pytest.approx([0.2 / 3, 0.4, 0.2])
    assert torch.allclose(optimizer.gain, GAIN, rtol=1e-6)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_images_go_on_by_themselves(kind):
    make = momentum if kind == "momentum" else lambda rows: AdamW(START[rows], 0.01)
    together, alone = make(slice(None)), make(slice(2, 3))
    walk(together, steps=3)
    together.keep(torch.tensor([0, 2]))
    walk(together, rows=[0, 2], steps=3)
    walk(alone, rows=slice(2, 3), steps=6)
    assert torch.allclose(together.latents[1:], alone.latents, rtol=1e-12)


def test_latents_are_not_driven_on_where_limits_hold_the_picture_back():
    """The picture stays far below its radius, whatever the latents do."""

    def held(change):
        return 0.01 * change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1)

    travelled = walk(momentum(iterations=30), steps=30, shown=held)[-1] / GAIN
    assert (travelled <= 30 * (10 * 2 * RADIUS / 30 / GAIN) * 1.01).all()  # of the largest steps there may be


def test_a_flat_picture_can_be_attacked():
    flat = torch.full((1, 4, 8, 8), 0.5, dtype=torch.float64)
    optimizer = Momentum(START[:1], RADIUS[:1], 10, flat, START[:1])
    (optimizer.latents**3).abs().sum().backward()
    optimizer.step(torch.zeros_like(flat))
    assert optimizer.latents.isfinite().all()
