"""Long runs: interrupted, killed, out of disk or memory, shared out over processes. Real processes, real signals."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, save_checkpoint
from evaluate import psnr
from timestep_weights import SCHEDULES, schedule_weights

MAIN = [sys.executable, "main.py"]
# On a machine with GPUs `accelerate launch --num_processes 2` does this by itself; without any, it must be told not to start one process only.
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "main.py"]


pytestmark = pytest.mark.xdist_group("runs")  # one worker, so that the runs to compare with are done once


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A random checkpoint, and four small pictures with labels."""
    folder = tmp_path_factory.mktemp("data")
    save_checkpoint(folder / "model")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for k in range(4):
        picture = random.integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(picture).resize((96, 96), Image.BICUBIC).save(folder / "images" / f"img{k}.png")
    (folder / "labels.txt").write_text("1\n22\n333\n444\n")
    return folder


def flags(data: Path, out: Path, *extra: object) -> list[str]:
    return list(map(str, ["--pretrained_diffusion_path", data / "model", "--images_root", data / "images", "--label_path", data / "labels.txt",
                          "--save_dir", out, "--res", "96", "--iterations", "3", "--start_step", "18", *extra]))


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def start(command: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(command, **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(), **options})


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment(), **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def done(out: Path) -> list[str]:
    return sorted(path.name[:4] for path in out.glob("*_record.npz"))


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs to compare with."""
    folders = {}
    for mode in ("fixed", "learnable"):
        folders[mode] = tmp_path_factory.mktemp(mode)
        result = run([*MAIN, *flags(data, folders[mode], "--weight_mode", mode, "--weight_lr", "0.05")])
        assert result.returncode == 0, result.stderr
    return folders


@pytest.mark.parametrize("mode", ["fixed", "learnable"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(data, whole, tmp_path, mode):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", mode, "--weight_lr", "0.05")]
    for images in (1, 2):  # killed twice, in the second and in the third or fourth image
        process = start(command)
        wait_for(lambda: len(done(tmp_path)) >= images, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(done(tmp_path)) < 4
    finished = {name: (tmp_path / f"{name}_adv_image.png").stat().st_mtime_ns for name in done(tmp_path)}
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert f"going on with an earlier run: {len(finished)} of 4 images are done" in result.stderr
    assert pictures(tmp_path) == pictures(whole[mode])
    for name, changed in finished.items():
        assert (tmp_path / f"{name}_adv_image.png").stat().st_mtime_ns == changed  # not attacked again
    ours, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole[mode]))
    assert ours["weights_at_the_end"] == expected["weights_at_the_end"]
    beginning = {"fixed": SCHEDULES["learned"], "learnable": SCHEDULES["increasing"]}[mode]
    moved = np.abs(ours["weights_at_the_end"] - schedule_weights(beginning, 2).numpy()).max()
    assert moved > 0.05 if mode == "learnable" else moved == 0
    assert [row["file"] for row in ours["images"]] == ["img0.png", "img1.png", "img2.png", "img3.png"]


def test_ctrl_c_leaves_nothing_half_done(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    process = start(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job would ignore it
    wait_for(lambda: len(done(tmp_path)) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted; the images done so far are complete, and the same command goes on with the rest" in errors
    assert 1 <= len(done(tmp_path)) < 4 and not list(tmp_path.glob("*.partial"))
    for name in done(tmp_path):
        assert len(list(tmp_path.glob(f"{name}_*.png"))) == 5
    assert run(command).returncode == 0 and pictures(tmp_path) == pictures(whole["fixed"])


def test_a_full_disk_is_one_line_and_counts_nothing_as_done(data, whole, tmp_path):
    """RLIMIT_FSIZE is a byte too small for the largest file of the run: the images before that one stay done, it and the rest do not count."""
    largest = max(whole["fixed"].glob("0*"), key=lambda path: path.stat().st_size)
    limit = largest.stat().st_size - 1
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    result = run(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"main\.py: error: .*File too large; the images done so far are complete, make room and run the same command again to go on\n", result.stderr)
    assert done(tmp_path) == [f"{k:04d}" for k in range(int(largest.name[:4]))] and not list(tmp_path.glob("*.partial"))
    assert run(command).returncode == 0 and pictures(tmp_path) == pictures(whole["fixed"])


def test_another_configuration_is_refused_with_its_keys(data, whole, tmp_path):
    out = tmp_path / "out"
    assert run([*MAIN, *flags(data, out, "--limit", "1")]).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = run([*MAIN, *flags(data, out, "--limit", "1", "--guidance", "3", "--weight_mode", "fixed")])
    assert result.returncode == 2 and re.fullmatch(r"main\.py: error: --save_dir: [^\n]+\n", result.stderr)
    assert "guidance was 2.5 and is 3.0; weight_mode was 'uniform' and is 'fixed'" in result.stderr and "--overwrite" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert run([*MAIN, *flags(data, out, "--weight_mode", "fixed", "--overwrite")]).returncode == 0
    assert pictures(out) == pictures(whole["fixed"]) and (out / "notes.txt").read_text() == "mine"


def test_results_of_nobody_knows_what_are_not_added_to(data, tmp_path):
    (tmp_path / "0000_record.npz").write_bytes(b"")
    result = run([*MAIN, *flags(data, tmp_path)])
    assert result.returncode == 2 and "no run.json" in result.stderr


def test_images_that_failed_are_tried_again(data, tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(2):
        (tmp_path / "images" / f"{k}.png").write_bytes((data / "images" / f"img{k}.png").read_bytes()[: None if k else 2000])
    (tmp_path / "labels.txt").write_text("1\n22\n")
    command = [*MAIN, *flags(data, tmp_path / "out", "--images_root", tmp_path / "images", "--label_path", tmp_path / "labels.txt")]
    first = run(command)
    assert first.returncode == 1 and "not attacked: 0.png" in first.stdout and done(tmp_path / "out") == ["0001"]
    (tmp_path / "images" / "0.png").write_bytes((data / "images" / "img0.png").read_bytes())
    second = run(command)
    assert second.returncode == 0 and "not attacked" not in second.stdout and done(tmp_path / "out") == ["0000", "0001"]


# ---------------------------------------------------------------- several processes

def test_two_shards_write_the_same_files_as_one_run(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    first = run([*command, "--shard", "1/2"])
    assert first.returncode == 0 and done(tmp_path) == ["0001", "0003"] and "still to be attacked: 2 images" in first.stdout
    assert run([*command, "--shard", "0/2"]).returncode == 0
    assert pictures(tmp_path) == pictures(whole["fixed"])
    result = run(command)
    assert "4 of 4 images are done" in result.stderr and "still to be attacked" not in result.stdout


def test_two_processes_write_the_same_files_as_one(data, whole, tmp_path):
    result = run([*TWO_PROCESSES, *flags(data, tmp_path, "--weight_mode", "fixed")])
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path) == pictures(whole["fixed"])
    assert result.stdout.count("mean PSNR") == 1  # one table
    ours, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole["fixed"]))
    assert [row["after"] for row in ours["images"]] == [row["after"] for row in expected["images"]]


def test_a_process_that_dies_leaves_the_others_images_done(data, whole, tmp_path):
    command = [*TWO_PROCESSES, *flags(data, tmp_path, "--weight_mode", "fixed")]
    process = start(command, start_new_session=True)
    wait_for(lambda: len(done(tmp_path)) >= 2, process)
    workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and rank_of(int(pid), tmp_path) == "1"]
    finished = done(tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0 and set(finished) <= set(done(tmp_path))
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path) == pictures(whole["fixed"])


def rank_of(pid: int, out: Path) -> str | None:
    """RANK in the environment of a main.py that writes to `out`, else None."""
    try:
        if str(out) in Path(f"/proc/{pid}/cmdline").read_text():
            variables = dict(item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item)
            return variables.get("RANK")
    except OSError:
        pass
    return None


@pytest.mark.parametrize("extra, command, message", [
    (["--weight_mode", "learnable", "--shard", "0/2"], MAIN, "--weight_mode learnable trains one weight network"),
    (["--weight_mode", "learnable"], TWO_PROCESSES, "--weight_mode learnable trains one weight network"),
    (["--overwrite", "--shard", "0/2"], MAIN, "--overwrite with --shard would delete"),
    (["--shard", "2/2"], MAIN, "--shard is '2/2'; expected K/N"),
    (["--batch_size", "0"], MAIN, "--batch_size is 0; expected at least 1")])
def test_what_cannot_be_shared_out_is_refused(data, tmp_path, extra, command, message):
    result = run([*command, *flags(data, tmp_path / "out", *extra)])
    assert result.returncode != 0 and result.stderr.count(f"main.py: error: {message}") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory

def test_a_batch_gives_what_single_images_give(data, whole, tmp_path):
    assert run([*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed", "--batch_size", "3")]).returncode == 0
    for name in done(tmp_path):
        ours, single = (np.asarray(Image.open(folder / f"{name}_adv_image.png")).astype(int) for folder in (tmp_path, whole["fixed"]))
        assert psnr(ours, single) >= 40  # float32, summed in another order, and AdamW's sign-like first steps
        assert np.load(tmp_path / f"{name}_record.npz")["layer_losses"].shape == (3, 2, 10, 1)


# The allocator's own error, from a request that no machine can meet, for every attack of more than `batch` images or without checkpointing.
SHORT_OF_MEMORY = """
import sys
sys.argv[0] = "main.py"
import main, torch
class DiffAttack(main.DiffAttack):
    def attack(self, inversion, progress=None):
        if len(inversion.images) > {batch} or not (self.checkpointing or {plain}):
            torch.empty(2**60, dtype=torch.uint8)
        return super().attack(inversion, progress)
main.DiffAttack = DiffAttack
sys.exit(main.main())
"""


def test_out_of_memory_halves_the_batch_then_checkpoints_then_gives_up_in_one_line(data, whole, tmp_path):
    def attempt(out: Path, **fits) -> subprocess.CompletedProcess:
        return run([sys.executable, "-c", SHORT_OF_MEMORY.format(**fits), *flags(data, out, "--batch_size", "4", "--weight_mode", "fixed")])

    halved = attempt(tmp_path / "halved", batch=2, plain=True)
    assert halved.returncode == 0 and halved.stderr.count("out of memory") == 1 and "out of memory: going on with --batch_size 2" in halved.stderr
    saving = attempt(tmp_path / "saving", batch=1, plain=False)
    assert saving.returncode == 0 and saving.stderr.count("out of memory") == 3 and "the graph of one timestep at a time, which" in saving.stderr
    assert pictures(tmp_path / "saving") == pictures(whole["fixed"])
    none = attempt(tmp_path / "none", batch=0, plain=True)
    assert none.returncode == 1 and "Traceback" not in none.stderr and done(tmp_path / "none") == []
    assert re.search(r"main\.py: error: out of memory with one image and the graph of one timestep at a time at --res 96 [^\n]*this model needs more memory than there is; the images done so far are complete\n", none.stderr)


def test_memory_does_not_grow_with_the_number_of_images(data, tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(200):
        os.link(data / "images" / f"img{k % 4}.png", tmp_path / "images" / f"{k}.png")
    (tmp_path / "labels.txt").write_text("7\n" * 200)
    process = start([*MAIN, *flags(data, tmp_path / "out", "--images_root", tmp_path / "images", "--label_path", tmp_path / "labels.txt",
                                   "--iterations", "1", "--start_step", "19", "--batch_size", "4")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resident = {}
    while process.poll() is None:
        count = len(done(tmp_path / "out"))
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        if match and count < 200:
            resident[count] = int(match[1]) / 1024
        if count == 200:
            process.kill()  # the table is of no interest here
        time.sleep(0.2)
    assert len(done(tmp_path / "out")) == 200
    early = max(size for count, size in resident.items() if 3 <= count <= 20)
    late = max(size for count, size in resident.items() if count > 20)
    assert late < early + 20, resident  # MB
