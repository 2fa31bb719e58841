"""What a run of many images needs: judged where it is written; subfolders; a quick start; the last of
several adds up.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, done, flags, launch, pictures, run, start, wait_for
from test_processes import TWO_PROCESSES, rank_of

from diffattack.data import layout
from diffattack.data.layout import Layout
from diffattack.data.records import read_run
from diffattack.runner import jobs, judge

JUDGED = ["--transfer_models", "efficientnet_lite1"]


@pytest.fixture(scope="module")
def judged(data, quick, tmp_path_factory) -> Path:
    """A run on two images that a transfer classifier has judged."""
    out = tmp_path_factory.mktemp("judged") / "out"
    result = run([*MAIN, *command_of(data, quick, out), *JUDGED])
    assert result.returncode == 0, result.stderr
    return out


def command_of(data: Path, quick: str, out: Path, *extra: str) -> list[str]:
    # the last value of a flag counts
    return flags(data, out, "--model_name", quick, "--limit", "2", "--processes", "1", *extra)


def judged_anew(monkeypatch) -> list[str]:
    """The classifiers that are asked from now on, once for all images that are judged together."""
    asked, original = [], judge.judge

    def counting(judges, pictures):
        asked.extend(judges.names)
        return original(judges, pictures)

    monkeypatch.setattr(judge, "judge", counting)
    return asked


def test_what_was_found_is_kept_and_other_judges_judge_again(data, quick, judged, monkeypatch):
    for path in sorted(judged.glob("*_judged.npz")):
        with np.load(path) as found:
            assert found["predictions"].shape == (1, 2, 1, 2) and found["features"].shape == (1, 2, 1280)
            assert {"SSIM", "PSNR dB", "L2"} <= set(found["measures"].tolist())
    before = json.loads((judged / "results.json").read_text())
    asked = judged_anew(monkeypatch)
    command = [*MAIN, *command_of(data, quick, judged)]
    names = [quick, "efficientnet_lite1", "efficientnet_lite2"]
    result = run([*command, "--transfer_models", ",".join(names[1:])])
    assert result.returncode == 0 and asked == names  # for both images at once
    after = json.loads((judged / "results.json").read_text())
    assert [c["model"] for c in after["classifiers"]] == names
    assert after["classifiers"][:2] == before["classifiers"]
    assert run([*command, *JUDGED]).returncode == 0
    assert json.loads((judged / "results.json").read_text())["images"] == before["images"]


def test_where_nothing_has_changed_a_run_is_added_up_again_and_no_attack_loaded(
    data, quick, judged, monkeypatch
):
    command = [*MAIN, *command_of(data, quick, judged), *JUDGED]
    first = run(command)
    monkeypatch.setattr(jobs, "load_attacks", lambda *_: pytest.fail("loads an attack"))
    asked = judged_anew(monkeypatch)
    again = run(command)
    assert again.returncode == 0 and asked == [] and again.stdout == first.stdout


def test_a_picture_that_is_another_one_is_made_again(data, quick, judged):
    command = [*MAIN, *command_of(data, quick, judged), *JUDGED]
    assert run(command).returncode == 0
    path, other = judged / "0000_adv_image.png", judged / "0001_adv_image.png"
    expected = path.read_bytes()
    path.write_bytes(other.read_bytes())  # whole, and not what was judged
    result = run(command)
    assert "img0.png is made again" in result.stderr and "is not the one that was written" in result.stderr
    assert path.read_bytes() == expected


def test_a_classifier_whose_file_has_changed_judges_again(data, judged, quick, tmp_path, monkeypatch):
    path = tmp_path / "other.py"
    path.write_text(Path(quick.rsplit(":", 1)[0]).read_text())
    command = [*MAIN, *command_of(data, quick, judged), "--transfer_models", f"{path}:build"]
    assert run(command).returncode == 0
    asked = judged_anew(monkeypatch)
    path.write_text(path.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    assert run(command).returncode == 0 and asked == [quick, f"{path}:build"]


def test_a_folder_is_judged_where_it_was_left_off(data, judged, quick, tmp_path, monkeypatch):
    command = [*MAIN, "--is_test", "--images_root", str(judged), "--save_dir", str(tmp_path / "out")]
    command += ["--model_name", quick, "--processes", "1", *JUDGED]
    assert run(command).returncode == 0
    first = json.loads((tmp_path / "out/evaluation.json").read_text())
    (tmp_path / "out/judged/0001_judged.npz").unlink()
    asked = judged_anew(monkeypatch)
    assert run(command).returncode == 0 and sorted(asked) == sorted([quick, "efficientnet_lite1"])
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == first
    own = json.loads((judged / "results.json").read_text())  # of the same pictures by the same judges
    assert first["quality"] == own["quality"]


def test_above_so_many_images_files_lie_in_subfolders(data, quick, judged, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SUBFOLDERS_ABOVE", 3)
    monkeypatch.setattr(layout, "IMAGES_EACH", 2)
    command = [*MAIN, *command_of(data, quick, tmp_path / "out", "--limit", "4")]
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/00002/0003_adv_image.png").is_file() and not list(tmp_path.glob("out/0*.png"))
    assert len(read_run(tmp_path / "out").records) == 4
    (tmp_path / "out/00000/0001_record.npz").unlink()
    assert "3 of 4 images are done" in run(command).stderr
    test = [*MAIN, "--is_test", "--images_root", str(tmp_path / "out"), "--save_dir", str(tmp_path / "t")]
    result = run([*test, "--model_name", quick, "--transfer_models", "", "--processes", "1"])
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "t/evaluation.json").read_text())["images"]) == 4
    assert run([*command, "--overwrite"]).returncode == 0 and len(Layout(tmp_path / "out", 4).finished()) == 4


def test_the_last_shard_adds_up_and_merging_does_it_before(data, quick, tmp_path):
    command = [*MAIN, *command_of(data, quick, tmp_path, "--limit", "4")]
    first = run([*command, "--shard", "0/3"])
    assert first.returncode == 0 and "still to be attacked: 2 images" in first.stdout
    assert not (tmp_path / "results.json").exists()
    merged = run([*command, "--merge"])
    assert merged.returncode == 0 and "still to be attacked: 2 images" in merged.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["images"]) == 2
    assert run([*command, "--shard", "2/3"]).returncode == 0 and len(done(tmp_path)) == 3
    last = run([*command, "--shard", "1/3"])
    assert "mean PSNR" in last.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["images"]) == 4
    nothing = run([*MAIN, *command_of(data, quick, tmp_path / "none"), "--merge"])
    assert nothing.returncode == 2 and "--merge: there is no run in" in nothing.stderr


def test_four_processes_share_the_work_and_go_on_after_a_death(data, quick, tmp_path):
    out = tmp_path / "out"
    command = [*MAIN, *command_of(data, quick, out, "--limit", "4")]
    first = launch(command, 4)
    wait_for(lambda: "0000" in done(out), first[0])
    first[3].kill()
    ended = [process.communicate(timeout=300) for process in first]
    assert [process.returncode for process in first[:3]] == [0, 0, 0], ended
    finished = done(out)
    times = {name: (out / f"{name}_adv_image.png").stat().st_mtime_ns for name in finished}
    assert {"0000", "0001", "0002"} <= set(finished)
    told = [process.communicate(timeout=300) for process in launch(command, 4)]
    assert done(out) == ["0000", "0001", "0002", "0003"]
    assert all((out / f"{name}_adv_image.png").stat().st_mtime_ns == times[name] for name in finished)
    if len(finished) < 4:
        assert sum(words.count("mean PSNR") for words, _ in told) == 1
    assert len(json.loads((out / "results.json").read_text())["images"]) == 4
    one = [*MAIN, *command_of(data, quick, tmp_path / "one", "--limit", "4")]
    assert run(one).returncode == 0 and pictures(tmp_path / "one") == pictures(out)


@pytest.mark.nightly
def test_two_machines_of_two_processes_share_the_work_and_go_on_after_a_death(data, quick, tmp_path):
    out = tmp_path / "out"
    machine = [*TWO_PROCESSES[:-3], "--num_processes", "4", "--num_machines", "2"]
    machine += ["--main_process_ip", "127.0.0.1", "--main_process_port", "29517", "--machine_rank"]

    def launch() -> list:
        command = ["main.py", *command_of(data, quick, out, "--limit", "4")]
        return [start([*machine, str(rank), *command], start_new_session=True) for rank in range(2)]

    first = launch()
    wait_for(lambda: len(done(out)) >= 1 if out.exists() else False, first[0])
    victims = [int(p) for p in os.listdir("/proc") if p.isdigit() and rank_of(int(p), out) == "3"]
    os.kill(victims[0], signal.SIGKILL)
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
