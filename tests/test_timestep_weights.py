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
    for text in ("rising", "0.1,,0.2", ""):
        with pytest.raises(ValueError, match="unknown schedule"):
            parse_schedule(text)
    for schedule in ([0.5, -0.1, 0.6, 0, 0], [math.nan] * 5, [0.0] * 5, [1.0]):
        with pytest.raises(ValueError):
            schedule_weights(schedule, 5)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_network_starts_at_increasing(n):
    assert torch.allclose(TimestepWeightNetwork(n)(), schedule_weights(SCHEDULES["increasing"], n))


@pytest.mark.parametrize("smallest", [0, 2])
def test_network_can_move_all_weight_to_any_timestep(smallest):
    torch.manual_seed(0)
    network = TimestepWeightNetwork(5)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = torch.ones(5)
    losses[smallest] = 0.1
    for _ in range(100):
        optimizer.zero_grad()
        (network() @ losses.double()).backward()
        optimizer.step()
    assert network()[smallest] > 0.95


def moved_by(pace: Pace, iterations: int) -> torch.Tensor:
    """The logits' change in an image of constant losses, that of the first timestep taken off."""
    torch.manual_seed(0)
    network = TimestepWeightNetwork(5)
    optimizer = torch.optim.Adam(network.parameters(), lr=pace.learning_rate)
    for _ in range(iterations):
        (network() @ LOSSES[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (network().log() - network.start).detach()
    return moved - moved[0]


@pytest.mark.parametrize("iterations", [6, 15])
def test_weights_move_as_far_in_an_image_of_any_number_of_iterations(iterations):
    ours, study = Pace.of(iterations, None, 1.0, None), Pace.of(30, None, 1.0, None)
    assert study == Pace(step=0.1, pull=1.0, learning_rate=1e-4)
    # but for what the layers below the last learn meanwhile
    difference = moved_by(ours, iterations) - moved_by(study, 30)
    assert difference.norm() < 0.07 * moved_by(study, 30).norm()
    # ascent without a pull moves logits by the sum of its steps
    logits = [torch.zeros(5, 2), torch.zeros(5, 2)]
    for k, (pace, steps) in enumerate(((ours, iterations), (study, 30))):
        for _ in range(steps):
            logits[k] = minimax_step(logits[k], LOSSES, Pace(pace.step, pull=0))
    assert torch.allclose(*logits) and torch.allclose(logits[0], 3 * LOSSES)
    assert Pace.of(iterations, 0.3, 2.0, 0.05) == Pace(0.3, 2.0, 0.05)  # given numbers stay as they are


def test_the_first_steps_of_the_network_are_those_of_adam():
    """The output's weights and bias start at zero, so that the first step, of the rate along the gradient's
    signs (Kingma and Ba, 2015), moves the logits by it times the sum of features whose sign the loss gives.
    """
    torch.manual_seed(3)
    network, rate = TimestepWeightNetwork(5), 1e-3
    with torch.no_grad():
        features = torch.nn.functional.softsign(network.hidden(network.embedding.weight)).double()
    weights, losses = network.start.exp(), LOSSES[:, 0]
    slope = weights * (losses - weights @ losses)  # of the loss in the logits
    expected = network.start - rate * features @ torch.sign(slope @ features)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    (network() @ losses).backward()
    optimizer.step()
    assert torch.allclose(network().detach(), expected.softmax(0), rtol=1e-4)


LOSSES = torch.tensor([[0.4, 2.0], [0.7, 1.5], [0.9, 0.5], [1.2, 0.6], [1.8, 0.4]], dtype=torch.float64)


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


def test_minimax_is_exponentiated_gradient_ascent():
    """Written out as products of weights: each is raised to a power below one, which is the pull, multiplied
    by the exponential of its loss, and normalised.
    """
    step, pull = 0.3, 0.7
    logits, weights = torch.zeros(5, 1), [0.2] * 5
    for k in range(6):
        losses = [1.0 + math.sin(i + k) / 2 for i in range(5)]
        logits = minimax_step(logits, torch.tensor(losses)[:, None], Pace(step, pull))
        power = 1 / (1 + step * pull)
        moved = [(w * math.exp(step * loss)) ** power for w, loss in zip(weights, losses)]
        weights = [w / sum(moved) for w in moved]
    assert logits.softmax(0)[:, 0].tolist() == pytest.approx(weights, rel=1e-5)


def test_uncertainty_ends_at_the_closed_form():
    """`exp(-s) l + s` is smallest at s = log l, so that each timestep contributes as much."""
    weights = weights_after(uncertainty_step, LOSSES, Pace(0.1))
    assert torch.allclose(weights, (1 / LOSSES) / (1 / LOSSES).sum(0))


def test_uncertainty_is_descent_on_its_published_objective():
    s = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(5, 1, dtype=torch.float64)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(((-s).exp() * LOSSES[:, 0] + s).sum(), s)
        s = (s - 0.1 * gradient).detach().requires_grad_()
        logits = uncertainty_step(logits, LOSSES[:, :1], Pace(0.1))
    assert torch.allclose(logits[:, 0], -s)


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
