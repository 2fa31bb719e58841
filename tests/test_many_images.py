"""What a run of many images needs: judged where it is written; subfolders; a quick start."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, flags, run, succeed

from diffattack.data import layout
from diffattack.data.layout import Layout
from diffattack.data.records import read_run
from diffattack.runner import jobs, judge


@pytest.fixture(scope="module")
def command(data) -> Callable[..., list[str]]:
    """Of a run on two images that a transfer classifier judges, into a folder."""
    few = "--limit 2 --processes 1 --transfer_models efficientnet_lite1"
    return lambda out, more="": [*MAIN, *flags(data, out, *few.split(), *more.split())]


@pytest.fixture(scope="module")
def judged(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "out"
    succeed(command(out))
    return out


def judged_anew(monkeypatch) -> list[str]:
    """The classifiers that are asked from now on, once for all images that are judged together."""
    asked, original = [], judge.judge

    def counting(judges, pictures):
        asked.extend(judges.names)
        return original(judges, pictures)

    monkeypatch.setattr(judge, "judge", counting)
    return asked


def test_what_was_found_is_kept_and_other_judges_judge_again(quick, command, judged, monkeypatch):
    for path in sorted(judged.glob("*_judged.npz")):
        with np.load(path) as found:
            assert found["predictions"].shape == (1, 2, 1, 2) and found["features"].shape == (1, 2, 1280)
            assert {"SSIM", "PSNR dB", "L2"} <= set(found["measures"].tolist())
    before = json.loads((judged / "results.json").read_text())
    asked = judged_anew(monkeypatch)
    names = [quick, "efficientnet_lite1", "efficientnet_lite2"]
    result = run(command(judged, f"--transfer_models {','.join(names[1:])}"))
    assert result.returncode == 0 and asked == names  # for both images at once
    after = json.loads((judged / "results.json").read_text())
    assert [c["model"] for c in after["classifiers"]] == names
    assert after["classifiers"][:2] == before["classifiers"]
    first = run(command(judged))
    assert first.returncode == 0
    assert json.loads((judged / "results.json").read_text())["images"] == before["images"]
    # where nothing has changed a run is added up again and no attack loaded
    monkeypatch.setattr(jobs, "load_attacks", lambda *_: pytest.fail("loads an attack"))
    asked.clear()
    again = run(command(judged))
    assert again.returncode == 0 and asked == [] and again.stdout == first.stdout


def test_a_folder_is_judged_where_it_was_left_off(quick, judged, tmp_path, monkeypatch):
    command = f"--is_test --images_root {judged} --save_dir {tmp_path}/out --model_name {quick}"
    command = [*MAIN, *command.split(), *"--processes 1 --transfer_models efficientnet_lite1".split()]
    assert run(command).returncode == 0
    first = json.loads((tmp_path / "out/evaluation.json").read_text())
    (tmp_path / "out/judged/0001_judged.npz").unlink()
    asked = judged_anew(monkeypatch)
    assert run(command).returncode == 0 and sorted(asked) == sorted([quick, "efficientnet_lite1"])
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == first
    own = json.loads((judged / "results.json").read_text())  # of the same pictures by the same judges
    assert first["quality"] == own["quality"]


def test_above_so_many_images_files_lie_in_subfolders(quick, command, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SUBFOLDERS_ABOVE", 3)
    monkeypatch.setattr(layout, "IMAGES_EACH", 2)
    four = command(tmp_path / "out", "--limit 4 --transfer_models=")
    result = run(four)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/00002/0003_adv_image.png").is_file() and not list(tmp_path.glob("out/0*.png"))
    assert len(read_run(tmp_path / "out").records) == 4
    (tmp_path / "out/00000/0001_record.npz").unlink()
    assert "3 of 4 images are done" in run(four).stderr
    test = f"--is_test --images_root {tmp_path}/out --save_dir {tmp_path}/t --model_name {quick}"
    result = succeed([*MAIN, *test.split(), *"--transfer_models= --processes 1".split()])
    assert len(json.loads((tmp_path / "t/evaluation.json").read_text())["images"]) == 4
    assert run([*four, "--overwrite"]).returncode == 0 and len(Layout(tmp_path / "out", 4).finished()) == 4
