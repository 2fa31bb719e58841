"""What a run of many images needs: judged where it is written; subfolders; a quick start."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import MAIN, done, flags, run, start, wait_for
from test_processes import TWO_PROCESSES

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
    result = run(command(out))
    assert result.returncode == 0, result.stderr
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
    result = run([*MAIN, *test.split(), *"--transfer_models= --processes 1".split()])
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "t/evaluation.json").read_text())["images"]) == 4
    assert run([*four, "--overwrite"]).returncode == 0 and len(Layout(tmp_path / "out", 4).finished()) == 4


@pytest.mark.nightly
def test_two_machines_of_two_processes_share_the_work_and_go_on_after_a_death(command, tmp_path):
    out = tmp_path / "out"
    machine = [*TWO_PROCESSES[:-3], *"--num_processes 4 --num_machines 2 --main_process_ip 127.0.0.1".split()]
    machine += ["--main_process_port", "29517", "--machine_rank"]

    def launch() -> list:
        four = command(out, "--limit 4 --transfer_models=")[1:]
        return [start([*machine, str(rank), *four], start_new_session=True) for rank in range(2)]

    def rank_of(process: psutil.Process) -> str | None:
        try:
            return process.environ().get("RANK") if str(out) in process.cmdline() else None
        except (psutil.Error, OSError):
            return None

    first = launch()
    wait_for(lambda: out.exists() and done(out), first[0])
    next(process for process in psutil.process_iter() if rank_of(process) == "3").kill()
    assert first[1].wait(timeout=400) != 0
    # the other launcher waits for five minutes for the one that has ended, when its own are done
    wait_for(lambda: {"0000", "0001"} <= set(done(out)), first[0])
    os.killpg(first[0].pid, signal.SIGKILL)
    first[0].wait()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*_adv_image.png")}
    second = launch()
    told = [process.communicate(timeout=400) for process in second]
    assert [process.returncode for process in second] == [0, 0], told
    assert done(out) == ["0000", "0001", "0002", "0003"]
    assert times and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert sum(words.count("mean PSNR") for words, _ in told) == 1
