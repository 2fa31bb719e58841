"""Curves compared at equal visibility, against values worked out by hand, and a sweep as a command."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import MAIN, classifier_result, done, flags, pictures, run, succeed
from test_compare import COMPARE

from diffattack.evaluation.curves import compare_curves, transfer_scores
from diffattack.evaluation.metrics import Quality
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.statistics import Estimate, difference_at_equal_visibility


def column(*values: float) -> np.ndarray:
    """Of one image at several values of the flag."""
    return np.array(values, float)[:, None]


def test_curves_differ_by_their_distance_where_both_reach():
    first = column(1, 2, 4), column(0.1, 0.2, 0.4)
    second = column(5, 1.5, 3), column(0.8, 0.45, 0.6)  # 0.3 higher at every visibility, in another order
    (difference,) = difference_at_equal_visibility((first[0], second[0]), (first[1], second[1]))
    assert difference == pytest.approx(0.3)
    flat, step = (column(0, 10), column(0, 0)), (column(4, 5, 6), column(0, 1, 1))
    (difference,) = difference_at_equal_visibility((flat[0], step[0]), (flat[1], step[1]))
    assert difference == pytest.approx((0.5 * 1 + 1 * 1) / 2)  # over [4, 6] alone
    apart = difference_at_equal_visibility((column(1, 2), column(3, 4)), (column(0, 0), column(1, 1)))
    assert np.isnan(apart).all()


def random_curve(gain: float, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    visibility = np.linspace(5, 15, 4)[:, None] + random.uniform(-1, 1, (4, 22))
    score = visibility / 20 + gain + random.normal(0, 0.02, (4, 22))
    return {"L2": visibility, "SSIM": visibility / 15 - 2, "success": score}


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    pairs = compare_curves({"a": random_curve(0, 0), "b": random_curve(0, 1), "c": random_curve(0.1, 2)})
    by_pair = {(*pair["modes"], pair["visibility"]): pair for pair in pairs}
    assert len(by_pair) == len(pairs) == 6
    for visibility in ("L2", "SSIM"):
        assert by_pair["a", "b", visibility]["p_holm"] > 0.05
        found = by_pair["a", "c", visibility]
        assert found["p_holm"] < 0.01 and found["images"] == 22
        assert found["difference"].value == pytest.approx(0.1, abs=0.02)
    first, second = random_curve(0, 0), random_curve(0, 1)
    second["L2"][:, 3] += 100  # which the first does not reach
    second["success"][:, 4] = np.nan  # of an image that no classifier had right
    kept = {pair["visibility"]: pair["images"] for pair in compare_curves({"a": first, "b": second})}
    assert kept["L2"] == kept["SSIM"] - 1 == 20


def test_scores_count_the_classifiers_that_were_right_before():
    surrogate = classifier_result([1, 2, 3], [1, 2, 3], [5, 5, 5])
    first = classifier_result([1, 2, 3], [1, 2, 0], [5, 2, 0])
    second = classifier_result([1, 2, 3], [1, 0, 0], [1, 5, 5])
    quality = {"L2": Quality(Estimate(1, 1, 1), None, np.ones(3))}
    scores = transfer_scores(Evaluation([surrogate, first, second], quality, []))
    np.testing.assert_allclose(scores["transfer success"], [0.5, 0, math.nan])
    np.testing.assert_allclose(scores["confidence left in the true class"], [0.1, 0.1, math.nan])


def test_a_sweep_in_shards_goes_on_and_writes_what_single_runs_write(data, tmp_path):
    out, few = tmp_path / "sweep", ("--limit", "2")
    extra = ["--modes", "uniform,minimax", "--sweep", "structure_share=0,1", "--figures", "pooled", *few]
    command = [*COMPARE, *flags(data, out, *extra, "--transfer_models", "efficientnet_lite1")]
    part = run([*command, "--shard", "1/2"])
    assert part.returncode == 0 and "still to be attacked: 1 images" in part.stdout, part.stderr
    folders = [out / name for name in ("structure_share_0/uniform", "structure_share_1/minimax")]
    assert all(done(folder) == ["0001"] for folder in folders)
    merged = run([*command, "--merge"])  # compares those that are done, and attacks nothing
    assert merged.returncode == 0 and all(done(folder) == ["0001"] for folder in folders), merged.stderr
    assert len(json.loads((out / "sweep.json").read_text())["images"]) == 1
    whole = run(command)
    assert whole.returncode == 0 and "At equal visibility" in whole.stdout, whole.stderr
    assert not (out / "structure_share_0/minimax").exists()  # the same attack as uniform
    own = flags(data, tmp_path / "alone", "--weight_mode", "minimax", "--structure_share", "1", *few)
    succeed([*MAIN, *own])
    assert pictures(folders[1]) == pictures(tmp_path / "alone")  # byte for byte
    weights = [np.load(folder / "0001_record.npz")["weights"] for folder in (folders[1], tmp_path / "alone")]
    assert np.array_equal(*weights) and weights[0].shape == (3, 2) and not (weights[0][-1] == 0.5).all()

    results = json.loads((out / "sweep.json").read_text())
    assert results["flag"] == "structure_share"
    assert results["figures"]["uniform"][0] == results["figures"]["minimax"][0]
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == 2 * 3 and {row["structure_share"] for row in rows} == {"0", "1"}
    for name in ("sweep.md", "sweep.tex", "timestep_analysis/sweep.png", "structure_share_1/comparison.md"):
        assert (out / name).stat().st_size > 500
