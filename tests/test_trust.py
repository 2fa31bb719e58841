"""A run's folder that can be trusted: records of another run, damaged files, inputs that change.
Real processes and files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import MAIN, done, flags, pictures, refusal, run, save_checkpoint, start, succeed, wait_for

from diffattack.common.errors import InputError
from diffattack.data.images import delete_abandoned, replacing, temporary_name
from diffattack.data.records import read_run
from diffattack.runner.folder import check_folder, claim


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run of four images, with their dates."""
    return shutil.copytree(whole("fixed"), tmp_path / "finished", copy_function=shutil.copy2)


# ---------------------------------------------------------------- whose results


def test_a_run_stops_when_another_takes_its_folder_over(data, tmp_path):
    first = start([*MAIN, *flags(data, tmp_path, "--iterations", "20")])
    wait_for(lambda: len(done(tmp_path)) >= 1, first)
    succeed([*MAIN, *flags(data, tmp_path, "--overwrite", "--guidance", "3", "--limit", "1")])
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 1 and "Traceback" not in errors
    assert "has been taken over by a run of another configuration" in errors
    assert read_run(tmp_path).configuration["guidance"] == 3.0
    assert [record.index for record in read_run(tmp_path).records] == [0]


def test_a_record_of_another_run_is_refused(finished):
    configuration = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(configuration | {"guidance": 3.0}))
    with pytest.raises(ValueError, match="0000_record.npz is damaged.*of another run than run.json.; delete"):
        list(read_run(finished).records)


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def flip(path):
    with zipfile.ZipFile(path) as archive:  # within what is stored, of which a sum is kept
        largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 30 + len(largest.filename) + largest.compress_size // 2] ^= 16
    path.write_bytes(content)


def swap(path):
    shutil.copy(path.with_name("0002_record.npz"), path)


@pytest.mark.parametrize("damage", [cut, flip, swap])
def test_a_damaged_record_is_named_with_what_to_do(finished, damage):
    damage(finished / "0001_record.npz")
    refused = refusal([sys.executable, "utils.py", finished])
    assert re.search(r"0001_record\.npz .*(delete it|--overwrite)", refused)


def test_only_what_is_damaged_or_has_changed_is_made_again(data, whole, tmp_path):
    inputs, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(data / "images", inputs)
    command = [*MAIN, *flags(data, out, "--weight_mode", "fixed", "--images_root", inputs)]
    assert run(command).returncode == 0
    cut(out / "0001_record.npz")
    (out / "0002_adv_image.png").write_bytes(b"no picture")
    shutil.copy(inputs / "img0.png", inputs / "img3.png")
    (out / "0000_backup_record.npz").write_bytes(b"mine")
    (out / "0000_adv_image.png.other-1.partial").write_bytes(b"of another machine")
    kept = (out / "0000_record.npz").stat().st_mtime_ns
    result = run(command)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "going on with an earlier run: 1 of 4 images are done" in result.stderr
    reasons = {"img1": "damaged", "img2": "is not the one that was written", "img3": "has changed"}
    for name, reason in reasons.items():
        assert f"note: {name}.png is made again: " in result.stderr and reason in result.stderr
    assert (out / "0000_record.npz").stat().st_mtime_ns == kept
    expected, found = pictures(whole("fixed")), pictures(out)
    assert all(found[name] == expected[name] for name in expected if name[:4] != "0003")


BITS = """import torch


class Net(torch.nn.Module):
    def forward(self, x):
        levels = 255 * x.detach()
        between = ((levels - levels.round()).abs() > 1e-3).flatten(1).any(1)
        logits = torch.zeros(len(x), 1000).index_fill(1, torch.tensor([0]), 9.0)
        logits[:, 7] = 18.0 * between
        return logits + x.mean((1, 2, 3))[:, None] * torch.linspace(-1, 1, 1000)
"""


def test_success_is_that_of_the_file_and_not_of_the_tensor(data, tmp_path):
    """Of a classifier that sees another class wherever a value is none of 8 bits."""
    (tmp_path / "bits.py").write_text(BITS)
    command = flags(data, tmp_path / "out", "--model_name", f"{tmp_path}/bits.py:Net", "--limit", "1")
    result = run([*MAIN, *command])
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["images"]
    assert row["before"]["label"] == row["after"]["label"] == 1 and row["fooled_as_tensor"]
    assert row["success"] is False and row["fooled"] is False
    assert "success was lost in rounding to 8 bits" in result.stdout


def test_a_checkpoint_that_has_changed_is_named(data, tmp_path):
    model = shutil.copytree(data / "model", tmp_path / "model")
    command = [*MAIN, *flags(data, tmp_path / "out", "--limit", "1"), "--pretrained_diffusion_path", model]
    assert run(command).returncode == 0
    save_checkpoint(model, scaling_factor=0.25)
    assert f"the content of {model}/vae/config.json has changed" in refusal(command)


@pytest.mark.parametrize("content", ["", "[1]", "[" * 10_000 + "]" * 10_000])
def test_a_damaged_run_file_is_named(finished, content):
    (finished / "run.json").write_text(content)
    for attempt in (lambda: check_folder(finished, {}), lambda: read_run(finished)):
        with pytest.raises(ValueError, match="run.json cannot be read .*give another folder"):
            attempt()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_folder_is_claimed_by_one_run(tmp_path, monkeypatch, has_links):
    def no_links(source, target):
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    identity = claim(tmp_path, {"guidance": 2.5})
    assert claim(tmp_path, {"guidance": 2.5}) == identity
    with pytest.raises(InputError, match="guidance was 2.5 and is 3.0"):
        claim(tmp_path, {"guidance": 3.0})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_of_two_that_start_at_once_one_claims_the_folder(tmp_path, monkeypatch):
    link = os.link

    def after_another(source, target):
        target.write_text('{"guidance": 2.5}')
        link(source, target)

    monkeypatch.setattr(os, "link", after_another)
    with pytest.raises(InputError, match="guidance was 2.5 and is 3.0"):
        claim(tmp_path, {"guidance": 3.0})
    assert (tmp_path / "run.json").read_text() == '{"guidance": 2.5}'


def test_a_file_name_need_not_be_unicode(data, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(data / "images" / "img0.png", os.fsencode(tmp_path / "images") + b"/im\xffg.png")
    (tmp_path / "labels.txt").write_text("1\n")
    given = f"--images_root {tmp_path}/images --label_path {tmp_path}/labels.txt --figures all"
    result = run([*MAIN, *flags(data, tmp_path / "out", *given.split())], limits={})  # as a process
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert r"im\udcffg.png" in result.stdout
    assert json.loads((tmp_path / "out/results.json").read_text())["images"][0]["file"] == "im\udcffg.png"


# ---------------------------------------------------------------- tidiness


def test_what_killed_processes_left_half_written_is_deleted(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = temporary_name(tmp_path / "0000_adv_image.png")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{ended.pid}."))
    elsewhere = mine.with_name("0000_adv_image.png.another_host-1.partial")
    for path in (mine, dead, elsewhere):
        path.write_bytes(b"half")
    delete_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted((mine, elsewhere))


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    with replacing(tmp_path / "a") as first:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "a") as second:
            first.write_text("first")
            second.write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "first"
