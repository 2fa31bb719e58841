"""Runs shared out over processes, in batches, and short of memory. Real processes, real signals."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAIN, done, flags, launch, pictures, run, start, wait_for
from PIL import Image

from diff_latent_attack import DiffAttack
from diffattack.evaluation.metrics import psnr
from diffattack.runner import setup

# On a machine with GPUs `accelerate launch --num_processes 2` does this by itself; without any, it must be
# told not to start one process only.
TWO_PROCESSES = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "main.py",
]


def test_two_shards_write_the_same_files_as_one_run(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    first = run([*command, "--shard", "1/2"])
    assert (
        first.returncode == 0
        and done(tmp_path) == ["0001", "0003"]
        and "still to be attacked: 2 images" in first.stdout
    )
    last = run([*command, "--shard", "0/2"])
    assert last.returncode == 0 and "mean PSNR" in last.stdout and "still to be" not in last.stdout
    assert pictures(tmp_path) == pictures(whole("fixed"))
    result = run(command)
    assert "4 of 4 images are done" in result.stderr and result.stdout == last.stdout


def test_two_processes_write_the_same_files_as_one(data, whole, tmp_path):
    result = run([*TWO_PROCESSES, *flags(data, tmp_path, "--weight_mode", "fixed")])
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path) == pictures(whole("fixed"))
    assert result.stdout.count("mean PSNR") == 1  # one table
    ours, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole("fixed"))
    )
    assert [row["after"] for row in ours["images"]] == [row["after"] for row in expected["images"]]


def test_a_process_that_dies_leaves_the_others_images_done(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    processes = launch(command, 2)
    wait_for(lambda: len(done(tmp_path)) >= 1, processes[1])
    processes[1].kill()
    processes[1].wait()
    finished = set(done(tmp_path))
    said, errors = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 0 and finished | {"0000", "0002"} <= set(done(tmp_path)), errors
    assert ("still to be attacked" in said) == (not {"0001", "0003"} <= finished)
    again = launch(command, 2)
    told = [process.communicate(timeout=300)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0]
    assert sum(words.count("mean PSNR") for words in told) == 1
    assert pictures(tmp_path) == pictures(whole("fixed"))


def rank_of(pid: int, out: Path) -> str | None:
    """RANK in the environment of a main.py that writes to `out`, else None."""
    try:
        if str(out) in Path(f"/proc/{pid}/cmdline").read_text():
            variables = dict(
                item.split("=", 1)
                for item in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if "=" in item
            )
            return variables.get("RANK")
    except OSError:
        pass
    return None


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            ["--weight_mode", "learnable", "--shard", "0/2"],
            "--weight_mode learnable trains one weight network",
        ),
        (["--overwrite", "--shard", "0/2"], "--overwrite with --shard or a launcher"),
        (["--shard", "2/2"], "--shard is '2/2'; expected K/N"),
        (["--batch_size", "0"], "--batch_size is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(data, tmp_path, extra, message):
    result = run([*MAIN, *flags(data, tmp_path / "out", *extra)])
    assert result.returncode == 2 and result.stderr.count(f"main.py: error: {message}") == 1
    assert not (tmp_path / "out").exists()


def test_of_launched_processes_one_says_what_cannot_be_shared_out(data, tmp_path):
    processes = launch([*MAIN, *flags(data, tmp_path / "out", "--weight_mode", "learnable")], 2)
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert said.count("main.py: error: --weight_mode learnable trains one weight network") == 1
    assert [process.returncode for process in processes] == [2, 2] and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory


def test_a_batch_gives_what_single_images_give(data, whole, tmp_path):
    assert run([*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed", "--batch_size", "3")]).returncode == 0
    for name in done(tmp_path):
        ours, single = (
            np.asarray(Image.open(folder / f"{name}_adv_image.png")).astype(int)
            for folder in (tmp_path, whole("fixed"))
        )
        assert psnr(ours, single) >= 40  # float32, summed in another order, and AdamW's sign-like first steps
        assert np.load(tmp_path / f"{name}_record.npz")["layer_losses"].shape == (3, 2, 10, 1)


def test_out_of_memory_halves_the_batch_then_checkpoints_then_gives_up_in_one_line(
    data, whole, tmp_path, monkeypatch
):
    whole("fixed")

    def attempt(out: Path, batch: int, plain: bool) -> subprocess.CompletedProcess:
        """The allocator's own error, from a request that no machine can meet, for every attack of more than
        `batch` images or without checkpointing.
        """

        class ShortOfMemory(DiffAttack):
            def begin(self, inversion):
                if len(inversion.images) > batch or not (self.checkpointing or plain):
                    torch.empty(2**60, dtype=torch.uint8)
                return super().begin(inversion)

        monkeypatch.setattr(setup, "DiffAttack", ShortOfMemory)
        return run([*MAIN, *flags(data, out, "--batch_size", "4", "--weight_mode", "fixed")])

    saving = attempt(tmp_path / "saving", batch=1, plain=False)
    assert saving.returncode == 0 and saving.stderr.count("out of memory") == 3
    assert (
        "going on with --batch_size 2" in saving.stderr
        and "the graph of one timestep at a time, which" in saving.stderr
    )
    assert pictures(tmp_path / "saving") == pictures(whole("fixed"))
    none = attempt(tmp_path / "none", batch=0, plain=True)
    assert none.returncode == 1 and "Traceback" not in none.stderr and done(tmp_path / "none") == []
    assert re.search(
        r"main\.py: error: out of memory with one image and one timestep at a time [^\n]*"
        r"give a --res below 96; the images done so far are complete\n",
        none.stderr,
    )


def test_memory_does_not_grow_with_the_number_of_images(data, quick, tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(120):
        os.link(data / "images" / f"img{k % 4}.png", tmp_path / "images" / f"{k}.png")
    (tmp_path / "labels.txt").write_text("7\n" * 120)
    process = start(
        [
            *MAIN,
            *flags(
                data,
                tmp_path / "out",
                "--images_root",
                tmp_path / "images",
                "--label_path",
                tmp_path / "labels.txt",
                "--iterations",
                "1",
                "--start_step",
                "19",
                "--batch_size",
                "4",
                "--model_name",
                quick,
            ),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    resident = {}
    while process.poll() is None:
        count = len(done(tmp_path / "out"))
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        if match and count < 120:
            resident[count] = int(match[1]) / 1024
        if count == 120:
            process.kill()  # the table is of no interest here
        time.sleep(0.2)
    assert len(done(tmp_path / "out")) == 120
    early = max(size for count, size in resident.items() if 3 <= count <= 40)
    late = max(size for count, size in resident.items() if count > 40)
    assert late < early + 20, resident  # MB
