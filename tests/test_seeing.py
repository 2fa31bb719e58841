"""Models of seeing beside their own command lines, and in a run and a comparison."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, ROOT, flags, run
from PIL import Image

from diffattack.data.images import read_image
from diffattack.evaluation.seeing import MODELS_OF_SEEING, named_measures

COMMANDS = {
    "flip": (["flip", "-r", "{0}", "-t", "{1}", "-nerrm"], r"Mean: *([\d.]+)"),
    "ssimulacra2": (["ssymulacra2", "{0}", "{1}"], r"(-?[\d.]+)\s*$"),
    "butteraugli": (["butteraugli", "{0}", "{1}"], r"([\d.]+)"),
}


@pytest.fixture(params=MODELS_OF_SEEING)
def word(request, capsys):
    if not named_measures((request.param,)):
        pytest.skip(capsys.readouterr().err.strip() or f"{request.param} is not installed")
    return request.param


@pytest.mark.parametrize("image", range(3))
def test_it_says_what_its_command_line_says(word, image, tmp_path):
    clean = read_image(sorted((ROOT / "demo/images").iterdir())[image], 224)
    noise = np.random.default_rng(image).integers(-8, 9, clean.shape)
    other = np.clip(clean + noise, 0, 255).astype(np.uint8)
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for path, picture in zip(paths, (clean, other)):
        Image.fromarray(picture).save(path)
    command, pattern = COMMANDS[word]
    beside = Path(sys.executable).with_name(command[0])
    program = str(beside) if beside.exists() else shutil.which(command[0])
    given = [program, *(part.format(*paths) for part in command[1:])]
    shown = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path).stdout
    (measure,) = named_measures((word,)).values()
    assert measure(clean, other) == pytest.approx(float(re.search(pattern, shown)[1]), abs=1e-4)


def test_a_run_and_a_comparison_measure_by_it(word, data, quick, tmp_path):
    given = ["--model_name", quick, "--measures", word, "--judge_at", "1", "--limit", "2"]
    result = run([*MAIN, *flags(data, tmp_path / "run", *given)])
    assert result.returncode == 0, result.stderr
    name, _, _ = MODELS_OF_SEEING[word]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert all(name in point for point in results["curve"])
    values = [row["quality"][name] for row in results["images"]]
    assert results["quality"][name]["adversarial"]["value"] == pytest.approx(np.mean(values))
    given += ["--modes", "uniform,fixed", "--transfer_models", "efficientnet_lite1"]
    result = run([sys.executable, "compare.py", *flags(data, tmp_path / "compared", *given)])
    assert result.returncode == 0, result.stderr
    compared = json.loads((tmp_path / "compared/comparison.json").read_text())
    pairs = compared["at_equal_visibility_over_iterations"]
    assert name in {pair["visibility"] for pair in pairs} and name in {
        one["name"] for one in compared["figures"]
    }


def test_what_is_missing_is_left_out_with_a_note(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    named_measures.cache_clear()
    assert named_measures(("butteraugli",)) == {}
    assert "left out: the program butteraugli is not installed" in capsys.readouterr().err
    named_measures.cache_clear()
