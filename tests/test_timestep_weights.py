"""Schedules, and weights that move, against their closed forms."""

import math

import pytest
import torch

from timestep_weights import (
    ADAPTIVE_RULES,
    SCHEDULES,
    Pace,
    TimestepWeightNetwork,
    balanced_weights,
    minimax_step,
    parse_schedule,
    relative_losses,
    schedule_weights,
    uncertainty_step,
)


def test_five_timesteps_keep_the_published_weights_and_numbers_are_normalised():
    for name, expected in (
        ("learned", [0.064, 0.103, 0.158, 0.269, 0.406]),
        ("increasing", [0.05, 0.08, 0.13, 0.24, 0.50]),
        ("1,1,2,2,4", [0.1, 0.1, 0.2, 0.2, 0.4]),
    ):
        assert schedule_weights(parse_schedule(name), 5).tolist() == pytest.approx(expected)


def test_other_lengths_are_interpolated_over_relative_position():
    # at nine timesteps every second one falls on a given weight, the others half-way between two
    given = [0.05, 0.08, 0.13, 0.24, 0.50]
    nine = [0.05, 0.065, 0.08, 0.105, 0.13, 0.185, 0.24, 0.37, 0.50]
    assert schedule_weights(given, 9).tolist() == pytest.approx([w / sum(nine) for w in nine])
    assert schedule_weights([1, 3], 3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert schedule_weights([1, 2, 3, 4, 5], 2).tolist() == pytest.approx([1 / 6, 5 / 6])
    assert schedule_weights(given, 1).tolist() == [1.0]


def test_unusable_schedules_are_refused():
    for text in ("rising", "0.1,,0.2"):
        with pytest.raises(ValueError, match="unknown schedule"):
            parse_schedule(text)
    for schedule in ([0.5, -0.1, 0.6, 0, 0], [math.nan] * 5, [0.0] * 5, [1.0]):
        with pytest.raises(ValueError):
            schedule_weights(schedule, 5)


LOSSES = torch.tensor([[0.4, 2.0], [0.7, 1.5], [0.9, 0.5], [1.2, 0.6], [1.8, 0.4]], dtype=torch.float64)


def descended(losses: torch.Tensor, iterations: int, rate: float) -> TimestepWeightNetwork:
    """A network that so many steps of Adam have moved on these losses."""
    torch.manual_seed(0)
    network = TimestepWeightNetwork(5)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for _ in range(iterations):
        optimizer.zero_grad()
        (network() @ losses).backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("n", [1, 5, 12])
def test_network_starts_at_increasing(n):
    assert torch.allclose(TimestepWeightNetwork(n)(), schedule_weights(SCHEDULES["increasing"], n))


@pytest.mark.parametrize("iterations", [6, 15])
def test_weights_move_as_far_in_an_image_of_any_number_of_iterations(iterations):
    ours, study = Pace.of(iterations, None, 1.0, None), Pace.of(30, None, 1.0, None)
    assert study == Pace(step=0.1, pull=1.0, learning_rate=1e-4)
    moved = []
    for pace, steps in ((ours, iterations), (study, 30)):
        network = descended(LOSSES[:, 0], steps, pace.learning_rate)
        change = (network().log() - network.start).detach()
        moved.append(change - change[0])
    # but for what the layers below the last learn meanwhile
    assert (moved[0] - moved[1]).norm() < 0.07 * moved[1].norm()
    # ascent without a pull moves logits by the sum of its steps
    logits = [torch.zeros(5, 2), torch.zeros(5, 2)]
    for k, (pace, steps) in enumerate(((ours, iterations), (study, 30))):
        for _ in range(steps):
            logits[k] = minimax_step(logits[k], LOSSES, Pace(pace.step, pull=0))
    assert torch.allclose(*logits) and torch.allclose(logits[0], 3 * LOSSES)
    assert Pace.of(iterations, 0.3, 2.0, 0.05) == Pace(0.3, 2.0, 0.05)  # given numbers stay as they are


def weights_after(rule, losses: torch.Tensor, pace: Pace, steps: int = 4000) -> torch.Tensor:
    logits = torch.zeros_like(losses)
    for _ in range(steps):
        logits = rule(logits, losses, pace)
    return logits.softmax(0)


@pytest.mark.parametrize("pull", [0, 0.3, 4.0, 1e6])
def test_minimax_ends_where_ascent_and_pull_balance(pull):
    """`sum_i w_i l_i - pull * KL(w || uniform)` is largest at softmax(l / pull); without a pull all weight
    goes to the largest loss.
    """
    expected = (LOSSES / pull).softmax(0) if pull else (LOSSES == LOSSES.amax(0)).double()
    assert torch.allclose(weights_after(minimax_step, LOSSES, Pace(0.1, pull)), expected)


def test_uncertainty_ends_at_the_closed_form():
    """`exp(-s) l + s` is smallest at s = log l, so that each timestep contributes as much."""
    weights = weights_after(uncertainty_step, LOSSES, Pace(0.1))
    assert torch.allclose(weights, (1 / LOSSES) / (1 / LOSSES).sum(0))


@pytest.mark.parametrize("name", ADAPTIVE_RULES)
def test_adaptive_weights_survive_losses_of_zero(name):
    nothing = relative_losses(torch.zeros(5, 2, dtype=torch.float64))
    assert torch.equal(nothing, torch.ones_like(nothing))
    some = relative_losses(torch.tensor([[0.0], [0.0], [1e-30], [2e-30], [0.0]], dtype=torch.float64))
    assert some[:, 0].tolist() == pytest.approx([0, 0, 5 / 3, 10 / 3, 0])
    weights = weights_after(ADAPTIVE_RULES[name], some, Pace(), steps=30)
    assert weights.isfinite().all() and torch.allclose(weights.sum(0), torch.tensor(1.0).double())


def test_balanced_weights_make_gradients_equally_long():
    norms = torch.tensor([[1e-5, 0.0], [4e-5, 0.0], [2e-5, 0.0]], dtype=torch.float64)
    weights = balanced_weights(norms)
    assert torch.allclose(weights.sum(0), torch.ones(2).double())
    assert torch.allclose((weights * norms)[:, 0], torch.tensor(1e-5 * 4 / 7, dtype=torch.float64))
    assert torch.allclose(weights[:, 1], torch.tensor(1 / 3, dtype=torch.float64))  # nothing is known
    assert balanced_weights(torch.tensor([[0.0], [1.0]]))[0] > 0.999  # and finite
