"""Judges in groups: each group's mean is that of its own judges, wherever the mean of all is told."""

import json
import sys
from dataclasses import replace

import pytest
from conftest import MAIN, classifier_result, flags, run

from diffattack.classifiers.registry import groups_of, split_group
from diffattack.evaluation.curves import transfer_scores
from diffattack.evaluation.results import Evaluation, transfer_mean
from diffattack.evaluation.statistics import share

CODE = "import torch\n\n\ndef make():\n    torch.manual_seed(3)\n    pool = torch.nn.AdaptiveAvgPool2d(4)\n"
CODE += "    return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(48, 1000))\n"


def test_a_name_may_have_a_group():
    assert split_group("other=a/b.py:make@jpeg:75") == ("other", "a/b.py:make@jpeg:75")
    assert split_group("timm:resnet50") == ("", "timm:resnet50")
    assert groups_of(["a=x", "y", "b=z", "a=w"]) == {"a": ["x", "w"], "b": ["z"]}


def test_a_groups_mean_is_that_of_its_own():
    surrogate, first, second = (
        classifier_result([0] * 6, [0] * 6, after) for after in ([1] * 6, [1, 1, 0, 0, 0, 0], [1] * 5 + [0])
    )
    vars(first)["name"], vars(second)["name"] = "x", "folder/y.py:make"
    evaluation = Evaluation([surrogate, first, second], {}, [], 1, {"own": ["folder/y.py:make"]})
    assert evaluation.as_dict()["transfer_groups"]["own"]["success"] == transfer_mean([second])
    assert transfer_scores(evaluation)["transfer success, own"].tolist() == [1, 1, 1, 1, 1, 0]
    assert replace(transfer_mean([surrogate]), count=6, total=6) == share(6, 6)  # no certainty from six images
    rows = [row[0] for row in evaluation.classifier_rows()]
    assert rows[2:] == ["x", "y.py:make", "mean", "mean of own"]


@pytest.mark.parametrize("command", ["main.py", "compare.py"])
def test_a_run_tells_the_mean_of_each_group(command, data, quick, tmp_path):
    (tmp_path / "judge.py").write_text(CODE)
    judges = f"siblings=efficientnet_lite1,own={tmp_path}/judge.py:make"
    given = ["--model_name", quick, "--transfer_models", judges, "--limit", "2", "--judge_at", "1"]
    given += ["--modes", "uniform,fixed"] if command == "compare.py" else []
    result = run([sys.executable, command, *flags(data, tmp_path / "out", *given)])
    assert result.returncode == 0, result.stderr
    assert "judge.py:make" in result.stdout and f"{tmp_path}/judge.py" not in result.stdout
    folder = tmp_path / "out" / ("uniform" if command == "compare.py" else "")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["transfer_groups"]) == {"siblings", "own"}
    assert {"transfer, mean", "transfer, siblings", "transfer, own"} <= results["curve"][0].keys()
    if command == "compare.py":
        compared = json.loads((tmp_path / "out/comparison.json").read_text())
        assert {"transfer, siblings", "transfer, own"} <= {one["name"] for one in compared["figures"]}
        scores = {pair["score"] for pair in compared["at_equal_visibility_over_iterations"]}
        assert "transfer success, own" in scores
    assert run([*MAIN, *flags(data, tmp_path / "bad", "--transfer_models", "own=nobody")]).returncode == 2
