"""What a run says of how far its weights moved, beside arrays of which that is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffattack.data.summaries import LossSums
from diffattack.evaluation import comparison
from diffattack.evaluation.comparison import lines_about_weights, towards, weight_movement

TIMESTEPS = [201, 101, 1]


def run_of(mode: str, weights: np.ndarray, shares: np.ndarray, structure_share: float | None = None):
    """What is read of a run: weights `(images, K, N)`, losses by timestep `(images, N)`."""
    sums = LossSums(None, by_layer=shares[..., None])
    return SimpleNamespace(
        configuration={"weight_mode": mode, "structure_share": structure_share},
        summary=SimpleNamespace(weights=weights, structure=sums),
        timesteps=TIMESTEPS,
    )


def path(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


NOISE = np.random.default_rng(0).permuted(np.tile([0.9, 1.0, 1.1], (40, 1)), axis=1)
SLOPE = NOISE + [0.0, 0.3, 0.6]


def test_one_network_moves_from_the_first_image_to_after_the_last():
    weights = np.stack(
        [path([0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4]), path(*[[0.4, 0.3, 0.3]] * 3)]
    )
    run = run_of("learnable", np.repeat(weights, 2, axis=0), SLOPE)  # in batches of two
    moved = weight_movement(run, np.array([0.5, 0.25, 0.25]))
    assert moved["start"] == pytest.approx([0.2, 0.3, 0.5]) and moved["end"] == [0.5, 0.25, 0.25]
    assert moved["largest_change"] == pytest.approx(0.3) and moved["steps"] == 3 and towards(moved) == 0
    (line,) = lines_about_weights(moved, run)
    assert line == (
        "mode learnable: in 3 steps the weights moved from 0.200, 0.300, 0.500 to 0.500, 0.250, 0.250, "
        "by 0.3 at most, most towards timestep 0 (t = 201)"
    )
    collapsed = weight_movement(run, np.array([0.98, 0.01, 0.01]))
    assert collapsed["effective"] == pytest.approx(np.exp(-0.98 * np.log(0.98) - 0.02 * np.log(0.01)))
    assert "they have collapsed" in lines_about_weights(collapsed, run)[0]


def test_weights_of_each_image_are_taken_together():
    starts = [1 / 3] * 3, [0.4, 0.3, 0.3]
    weights = np.stack([path(*starts, [0.5, 0.3, 0.2]), path(*starts, [0.3, 0.3, 0.4])])
    run = run_of("minimax", weights, SLOPE)
    moved = weight_movement(run, weights[:, -1].mean(0))
    assert moved["end"] == pytest.approx([0.4, 0.3, 0.3]) and moved["steps"] == 2 and towards(moved) == 0
    assert moved["largest_change"] == pytest.approx((0.5 + 0.4 - 2 / 3) / 2)
    assert "of an image moved" in lines_about_weights(moved, run)[0]


@pytest.mark.parametrize("mode, remedy", [("learnable", "--weight_lr"), ("minimax", "--weight_step")])
def test_weights_that_hardly_move_are_told_what_would_move_them(mode, remedy):
    weights = np.stack([path([0.3, 0.3, 0.4], [0.299, 0.3, 0.401])])
    run = run_of(mode, weights, NOISE)
    said, equal = lines_about_weights(weight_movement(run, weights[0, -1]), run)
    assert "what would move them further" in said and remedy in said
    assert "equal but for noise, as far as 40 images tell (shares 3" in equal
    assert "--structure_share 1" in equal
    assert comparison.lines_about_equal_losses(run_of("minimax", None, SLOPE)) == []


@pytest.mark.parametrize("mode", ["uniform", "fixed", "learnable_detached"])
def test_weights_that_never_move_are_not_said_to_have_moved(mode):
    weights = np.broadcast_to(np.float32([0.2, 0.3, 0.5]), (2, 3, 3))
    run = run_of(mode, weights, NOISE)
    moved = weight_movement(run, np.array([0.2, 0.3, 0.5]))  # in float64, as a controller has them
    assert moved["largest_change"] == moved["steps"] == 0 and towards(moved) is None
    assert not any("moved from" in line for line in lines_about_weights(moved, run))
