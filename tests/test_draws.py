"""Random defences judged by each of several draws: figures against counts by hand, what records keep when the
number of draws rises, and runs.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MAIN, classifier_result, flags, network, succeed

from diffattack.classifiers.defences import SEED, defend, is_random
from diffattack.data.images import Pictures, to_tensor
from diffattack.data.records import json_text
from diffattack.evaluation.comparison import compare_metrics, success_metrics
from diffattack.evaluation.judges import Judged, Judges, judge
from diffattack.evaluation.predictions import DRAWS_LEGEND, ClassifierResult
from diffattack.evaluation.results import Evaluation, evaluation_of

NAME = "net@smoothing:0.9"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
PICTURES = Pictures(PIXELS, 255 - PIXELS, np.array([[0], [1], [2]]))
CPU, NO_TARGETS = torch.device("cpu"), np.full(3, -1)


# ---------------------------------------------------------------- figures

LABELS = [0, 0, 0, 0]
# by draw; the second image is right in one clean draw alone, and the last in none
BEFORE = [[0, 0, 0, 3], [0, 1, 0, 3], [0, 2, 0, 3]]
AFTER = [[1, 0, 0, 0], [0, 0, 4, 5], [0, 0, 5, 5]]


def over(draws: list[ClassifierResult], name: str = "a@resize:0.9") -> ClassifierResult:
    """A classifier whose own answer is that of the first draw."""
    predictions = np.concatenate([draws[0].predictions, *(draw.predictions for draw in draws)], 1)
    return replace(draws[0], name=name, predictions=predictions)


def drawn(after=AFTER) -> ClassifierResult:
    return over([classifier_result(LABELS, b, a) for b, a in zip(BEFORE, after)])


@pytest.mark.parametrize(
    "rule, before, after, success, of_all",
    [
        # right in every draw: images 0 and 2; after it image 1 alone; fooled in any draw: 0 and 2, of 0, 1, 2
        ("worst", 2 / 4, 1 / 4, 2 / 3, 3 / 4),
        ("mean", (1 + 1 / 3 + 1) / 4, (2 / 3 + 1 + 1 / 3 + 1 / 3) / 4, (1 / 3 + 0 + 2 / 3) / 3, 5 / 12),
        # votes before: 0, 0 (the first of equals), 0, 3; after: 0, 0, 0 (first of equals), 5
        ("majority", 3 / 4, 3 / 4, 0, 1 / 4),
    ],
)
def test_rules_are_what_one_counts_by_hand(rule, before, after, success, of_all):
    figures = drawn().figures[rule]
    assert figures["accuracy_before"].value == pytest.approx(before)
    assert figures["accuracy_after"].value == pytest.approx(after)
    assert figures["success"].value == pytest.approx(success)
    assert figures["success_of_all"].value == pytest.approx(of_all)
    assert figures["accuracy_reconstructed"] is figures["success_of_attack_alone"] is None


def test_a_target_and_a_reconstruction_are_judged_draw_by_draw():
    draws = [
        classifier_result([0, 0], [0, 0], after, reconstructed, targets=[7, 7])
        for after, reconstructed in (([7, 1], [0, 0]), ([1, 7], [0, 4]))
    ]
    figures = over(draws).figures["worst"]
    assert figures["success"].count == 2  # each in the draw that says 7
    assert figures["success_of_attack_alone"].count == 1  # the other's reconstruction failed in that draw
    assert figures["accuracy_reconstructed"].count == 1


def judged(draws: int) -> tuple[Judges, Judged]:
    """What is found by so many draws."""
    loaded = {"net": network(5), NAME: defend(network(5), ["smoothing:0.9"])}
    names, features = [str(k) for k in range(5)], "efficientnet_lite2"
    judges = Judges(("net",), (NAME,), names, CPU, features, loaded.__getitem__, draws=draws)
    return judges, judge(judges, PICTURES)


def test_each_draw_is_by_its_own_seed_whatever_else_is_judged_with_it():
    judges, found = judged(2)
    assert judges.draws_of(NAME) == 2 and judges.draws_of("net") == 0
    network_result, result = evaluation_of(found, judges, PICTURES.labels, NO_TARGETS).classifiers
    assert result.draws == 2 and network_result.draws == 0
    inner, images = network(5).requires_grad_(False), to_tensor(PICTURES.adversarial)
    for seed in range(2):
        after = result.predictions[:, 1 + seed, 1]
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(SEED + seed))
        logits = inner(images + 0.9 * noise)
        assert after["label"].tolist() == logits.argmax(-1).tolist()
        assert np.allclose(after["confidence"], logits.softmax(-1).amax(-1), atol=1e-6)
    more = judged(3)[1].predictions[:, :, :3]
    assert more.tobytes() == found.predictions.tobytes()  # NaN are equal, too
    assert evaluation_of(judged(1)[1], judges, PICTURES.labels, NO_TARGETS).classifiers[1].draws == 0


def test_deterministic_defences_are_judged_once():
    names = ("a@resize:0.9", "a@jpeg:75", "a@denoise", "a@jpeg:75@diffpure:100", "a@smoothing:1", "a")
    assert [is_random(name) for name in names] == [True, False, False, True, True, False]


def evaluation(after) -> Evaluation:
    alone = replace(classifier_result(LABELS, BEFORE[0], after[0]), name="a")
    return Evaluation([alone, drawn(after)], {}, [])


def test_the_table_names_what_each_row_is():
    found = evaluation(AFTER)
    of_draws = [f"    {rule} of 3 draws" for rule in ("worst", "mean", "majority")]
    assert [row[0] for row in found.tables()[0]][1:] == ["a", "  @resize:0.9", *of_draws]
    assert found.tables()[0][3][-1].startswith("2/3 = 67%")
    draws = json.loads(json_text(found.as_dict()))["classifiers"][1]["draws"]
    assert draws["count"] == 3 and draws["worst"]["success"]["count"] == 2


def test_a_comparison_has_the_draws_of_each_attack():
    found = {"one": evaluation(AFTER), "other": evaluation([AFTER[0]] * 3)}
    lines = compare_metrics({mode: success_metrics(one) for mode, one in found.items()})
    metrics = [line for line in lines if line["name"].endswith("draws")]
    worst, mean, _ = metrics
    assert [value.count for value in worst["values"].values()] == [2, 1]
    assert worst["differences"]["one"] is None
    assert worst["differences"]["other"].difference.value == pytest.approx(-1 / 3)
    # image 0 in all draws instead of one, image 2 in none instead of two of three
    assert mean["differences"]["other"].difference.value == pytest.approx((2 / 3 + 0 - 2 / 3) / 3)


def test_a_run_judged_by_draws_and_by_more_of_them_later(data, quick, tmp_path):
    out, surrogate = tmp_path / "out", f"{quick}@resize:0.5"
    judges = ["--model_name", surrogate, "--defences", "smoothing:0.5,jpeg:75", "--transfer_models", ""]
    command = [*MAIN, *flags(data, out, "--draws", "1", "--limit", "2", *judges)]
    succeed([*command, "--judge_draws", "2"])
    (row, *_) = json.loads((out / "results.json").read_text())["images"]
    answer = succeed([*command, "--judge_draws", "3", "--processes", "2"])
    assert "majority of 3 draws" in answer.stdout and DRAWS_LEGEND in answer.stdout
    results = json.loads((out / "results.json").read_text())
    names = {surrogate, f"{surrogate}@smoothing:0.5", f"{surrogate}@jpeg:75"}
    assert {one["model"] for one in results["classifiers"] if "draws" in one} == names
    for name in names:
        more = results["images"][0]["draws"][name]["after"]["label"]
        assert len(more) == 3 and more[:2] == row["draws"][name]["after"]["label"]
    again = [*MAIN, "--is_test", "--images_root", str(out), "--save_dir", str(tmp_path / "judged")]
    succeed([*again, *judges, "--judge_draws", "3"])
    judged = json.loads((tmp_path / "judged/evaluation.json").read_text())
    assert judged["classifiers"] == results["classifiers"]
    assert judged["images"][0]["draws"] == results["images"][0]["draws"]
