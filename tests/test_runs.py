"""Interrupted runs: killed, out of disk, with other settings. Real processes, real signals."""

import json
import re
import resource
import signal

import numpy as np
import pytest
from conftest import MAIN, done, flags, pictures, run, start, succeed, wait_for

from timestep_weights import SCHEDULES, schedule_weights


@pytest.mark.parametrize("mode", ["fixed", "learnable"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(data, whole, tmp_path, mode):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", mode, "--weight_lr", "0.1")]
    for images in (1, 2):  # killed twice, in the second and in the third or fourth image
        process = start(command)
        wait_for(lambda images=images: len(done(tmp_path)) >= images, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(done(tmp_path)) < 4
    finished = {name: (tmp_path / f"{name}_adv_image.png").stat().st_mtime_ns for name in done(tmp_path)}
    result = succeed(command)
    assert f"going on with an earlier run: {len(finished)} of 4 images are done" in result.stderr
    assert pictures(tmp_path) == pictures(whole(mode))
    for name, changed in finished.items():
        assert (tmp_path / f"{name}_adv_image.png").stat().st_mtime_ns == changed  # not attacked again
    ours, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole(mode)))
    assert ours["weights_at_the_end"] == expected["weights_at_the_end"]
    beginning = {"fixed": SCHEDULES["learned"], "learnable": SCHEDULES["increasing"]}[mode]
    moved = np.abs(ours["weights_at_the_end"] - schedule_weights(beginning, 2).numpy()).max()
    assert moved > 0.05 if mode == "learnable" else moved == 0
    assert [row["file"] for row in ours["images"]] == ["img0.png", "img1.png", "img2.png", "img3.png"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_leave_nothing_half_done(data, tmp_path, name):
    process = start([*MAIN, *flags(data, tmp_path, "--iterations", "20")])
    wait_for(lambda: done(tmp_path), process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in errors
    assert "interrupted; the images done so far are complete, and the same command goes on" in errors
    assert 1 <= len(done(tmp_path)) < 4 and not list(tmp_path.glob("*.partial"))
    assert all(len(list(tmp_path.glob(f"{image}_*.png"))) == 5 for image in done(tmp_path))


def test_a_full_disk_is_one_line_and_counts_nothing_as_done(data, whole, tmp_path):
    """RLIMIT_FSIZE is a byte too small for the largest file of the run: the images before that one stay done,
    it and the rest do not count.
    """
    largest = max(whole("fixed").glob("0*"), key=lambda path: path.stat().st_size)
    limit = largest.stat().st_size - 1
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    result = run(command, limits={resource.RLIMIT_FSIZE: limit})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large; make room; the images done so far are complete" in result.stderr
    assert done(tmp_path) == [f"{k:04d}" for k in range(int(largest.name[:4]))]
    assert not list(tmp_path.glob("*.partial"))
    assert run(command).returncode == 0 and pictures(tmp_path) == pictures(whole("fixed"))


def test_another_configuration_is_refused_with_its_keys(data, whole, tmp_path):
    out = tmp_path / "out"
    assert run([*MAIN, *flags(data, out, "--limit", "1")]).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = run([*MAIN, *flags(data, out, "--limit", "1", "--guidance", "3", "--weight_mode", "fixed")])
    assert result.returncode == 2 and re.fullmatch(r"main\.py: error: --save_dir: [^\n]+\n", result.stderr)
    assert "guidance was 1.0 and is 3.0; weight_mode was 'uniform' and is 'fixed'" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert run([*MAIN, *flags(data, out, "--weight_mode", "fixed", "--overwrite")]).returncode == 0
    assert pictures(out) == pictures(whole("fixed")) and (out / "notes.txt").read_text() == "mine"


def test_images_that_failed_are_tried_again(data, tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(2):
        content = (data / f"images/img{k}.png").read_bytes()
        (tmp_path / f"images/{k}.png").write_bytes(content[: None if k else 2000])
    (tmp_path / "labels.txt").write_text("1\n22\n")
    inputs = ("--images_root", tmp_path / "images", "--label_path", tmp_path / "labels.txt")
    command, out = [*MAIN, *flags(data, tmp_path / "out", *inputs)], tmp_path / "out"
    first = run(command)
    assert first.returncode == 1 and "not attacked: 0.png" in first.stdout and done(out) == ["0001"]
    (tmp_path / "images/0.png").write_bytes((data / "images/img0.png").read_bytes())
    second = run(command)
    assert second.returncode == 0 and "not attacked" not in second.stdout and done(out) == ["0000", "0001"]
