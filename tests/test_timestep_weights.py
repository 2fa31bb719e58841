import math

import numpy as np
import pytest
import torch

from timestep_weights import (
    SCHEDULES,
    TimestepWeightNetwork,
    effective_timesteps,
    parse_schedule,
    schedule_weights,
)


def test_five_timesteps_keep_the_published_weights():
    assert schedule_weights(SCHEDULES["learned"], 5).tolist() == pytest.approx(
        [0.064, 0.103, 0.158, 0.269, 0.406]
    )
    assert schedule_weights(SCHEDULES["increasing"], 5).tolist() == pytest.approx(
        [0.05, 0.08, 0.13, 0.24, 0.50]
    )


def test_other_lengths_are_interpolated_over_relative_position():
    # at nine timesteps every second one falls on a given weight, the others half-way between two
    given = [0.05, 0.08, 0.13, 0.24, 0.50]
    nine = [0.05, 0.065, 0.08, 0.105, 0.13, 0.185, 0.24, 0.37, 0.50]
    assert schedule_weights(given, 9).tolist() == pytest.approx([w / sum(nine) for w in nine])
    assert schedule_weights([1, 3], 3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert schedule_weights([1, 2, 3, 4, 5], 2).tolist() == pytest.approx([1 / 6, 5 / 6])
    assert schedule_weights(given, 1).tolist() == [1.0]


def test_numbers_are_normalised():
    assert schedule_weights(parse_schedule("1,1,2,2,4"), 5).tolist() == pytest.approx(
        [0.1, 0.1, 0.2, 0.2, 0.4]
    )


@pytest.mark.parametrize("text", ["rising", "0.1,,0.2", "1;2", ""])
def test_unknown_schedules_are_refused(text):
    with pytest.raises(ValueError, match="unknown schedule"):
        parse_schedule(text)


@pytest.mark.parametrize(
    "schedule", [[0.5, -0.1, 0.6, 0, 0], [math.nan] * 5, [math.inf, 1, 1, 1, 1], [0.0] * 5, [1.0]]
)
def test_unusable_schedules_are_refused(schedule):
    with pytest.raises(ValueError):
        schedule_weights(schedule, 5)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_network_starts_at_increasing(n):
    assert torch.allclose(TimestepWeightNetwork(n)(), schedule_weights(SCHEDULES["increasing"], n))


@pytest.mark.parametrize("smallest", range(5))
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


def test_effective_timesteps_is_the_exponential_of_the_entropy():
    assert effective_timesteps(torch.full((5,), 0.2)) == pytest.approx(5)
    assert effective_timesteps(torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(1)
    assert effective_timesteps(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(2)
    weights = np.array(SCHEDULES["learned"])
    assert effective_timesteps(torch.tensor(weights)) == pytest.approx(
        np.exp(-(weights * np.log(weights)).sum())
    )
