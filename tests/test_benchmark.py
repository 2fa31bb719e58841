"""The benchmark, on a model so small that its times mean nothing."""

import json
import sys

import pytest

import benchmark


@pytest.mark.nightly
def test_all_sides_are_measured(data, monkeypatch, capsys):
    command = ["benchmark.py", "--checkpoint", data / "model", "--res", 96, "--iterations", 3]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    benchmark.main()
    results = json.loads(capsys.readouterr().out)
    ratios = results["ratios"]
    assert 0 < ratios["default"]["unet_evaluations"] < ratios["diffattack"]["unet_evaluations"] < 0.6
    assert 0 < ratios["default"]["peak_memory"] < 1
    assert all(results[side]["seconds"] > 0 for side in ("default", "diffattack", "reference"))
