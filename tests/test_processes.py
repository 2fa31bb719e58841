"""Runs shared out over processes, of a launcher and of our own, in batches, and short of memory. Real
processes, real signals.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from conftest import MAIN, done, flags, launch, pictures, refusal, run, start, wait_for
from work_of_processes import caller, die_or_write, fail_or_wait, named_by

from diff_latent_attack import DiffAttack
from diffattack.common.errors import InputError
from diffattack.common.parallel import available_cores, processes_for, run_in_processes, share_cores
from diffattack.options import Options
from diffattack.runner import setup
from diffattack.runner.setup import check_shards

# On a machine with GPUs `accelerate launch --num_processes 2` does this by itself; without any, it must be
# told not to start one process only.
TWO_PROCESSES = [
    sys.executable,
    *"-m accelerate.commands.launch --multi_gpu --num_processes 2 main.py".split(),
]


def test_shards_write_the_same_files_as_one_run_and_the_last_adds_up(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    first = run([*command, "--shard", "1/2"])
    assert first.returncode == 0 and done(tmp_path) == ["0001", "0003"]
    assert "still to be attacked: 2 images" in first.stdout and not (tmp_path / "results.json").exists()
    merged = run([*command, "--merge"])
    assert merged.returncode == 0 and "still to be attacked: 2 images" in merged.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["images"]) == 2
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
    ours, expected = (json.loads((out / "results.json").read_text()) for out in (tmp_path, whole("fixed")))
    assert [row["after"] for row in ours["images"]] == [row["after"] for row in expected["images"]]


def test_a_process_that_dies_leaves_the_others_images_done(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed")]
    processes = launch(command, 2)
    wait_for(lambda: len(done(tmp_path)) >= 1, processes[1])
    processes[1].kill()
    processes[1].wait()
    finished = set(done(tmp_path))
    out, errors = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 0 and finished | {"0000", "0002"} <= set(done(tmp_path)), errors
    assert ("still to be attacked" in out) == (not {"0001", "0003"} <= finished)
    again = launch(command, 2)
    tables = [process.communicate(timeout=300)[0].count("mean PSNR") for process in again]
    assert [process.returncode for process in again] == [0, 0] and sum(tables) == 1
    assert pictures(tmp_path) == pictures(whole("fixed"))


# ---------------------------------------------------------------- what launchers say in the environment


@pytest.fixture
def environment(monkeypatch):
    def put(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_variables_that_do_not_fit_are_one_line_and_leave_nothing(environment, data, tmp_path):
    environment(RANK="2", WORLD_SIZE="2")
    refused = refusal([*MAIN, *flags(data, tmp_path / "out")])
    assert "RANK=2" in refused and "which do not fit together" in refused and not (tmp_path / "out").exists()


def test_processes_that_know_nothing_of_each_other_are_refused(environment, monkeypatch):
    environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InputError, match="started 4 processes .SLURM_STEP_NUM_TASKS.*--shard K/4"):
        check_shards(Options(), ["fixed"])
    assert check_shards(Options(shard="1/4"), ["fixed"]) == (1, 4)
    environment(RANK="2", WORLD_SIZE="4")
    assert check_shards(Options(), ["fixed"]) == (2, 4)
    environment(RANK="0", WORLD_SIZE="1")
    assert check_shards(Options(), ["fixed"]) == (0, 1)


def test_cores_are_shared_unless_openmp_says_how(monkeypatch):
    before, free = torch.get_num_threads(), psutil.virtual_memory().available
    try:
        for variable, threads in (("3", before), (None, available_cores())):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if variable:
                monkeypatch.setenv("OMP_NUM_THREADS", variable)
            share_cores(1)
            assert torch.get_num_threads() == threads
            assert processes_for(1000, 1) == (1 if variable else available_cores())
        share_cores(1000)
        assert torch.get_num_threads() == processes_for(1, 1) == processes_for(1000, 10 * free) == 1
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- processes of our own


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes that multiprocessing started for it, without its tracker of resources and the server that
    it forks them from.
    """
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
        or ("forkserver" in " ".join(child.cmdline()) and child.ppid() != pid)
    ]


@pytest.mark.slow
def test_each_part_is_worked_on_once_by_a_process_that_is_prepared_once():
    results = []
    assert run_in_processes(2, range(20), results.append, named_by, (os.getpid(),)) == []
    assert sorted(part for part, _ in results) == [*range(20)]
    assert 1 <= len({process for _, process in results}) <= 2
    assert run_in_processes(1, "ab", print, caller) == ["a", "b"]


@pytest.mark.slow
def test_an_error_is_raised_here_and_ends_the_others():
    with pytest.raises(OSError, match="No space left") as caught:
        run_in_processes(2, [partial(fail_or_wait, False), partial(fail_or_wait, True)], print, caller)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "somewhere"
    assert not workers_of(os.getpid())


@pytest.mark.slow
def test_where_a_process_is_killed_half_as_many_go_on_and_then_this_one(tmp_path, capsys):
    deadly = partial(die_or_write, tmp_path / "a", True)
    parts = [partial(die_or_write, tmp_path / "b", False), *3 * [deadly]]
    left = run_in_processes(4, parts, id, caller)
    assert left[-3:] == 3 * [deadly] and len(left) - 3 == (not (tmp_path / "b").exists())
    errors = capsys.readouterr().err
    assert "going on in 2 processes" in errors and "going on in this one" in errors
    assert not (tmp_path / "a").exists() and not workers_of(os.getpid())


def test_workers_end_with_the_run_and_what_is_done_stays(data, whole, tmp_path):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed", "--processes", "2")]
    process = start(command, start_new_session=True)
    wait_for(lambda: done(tmp_path), process)
    workers, finished = workers_of(process.pid), done(tmp_path)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert set(finished) <= set(done(tmp_path))
    assert run(command).returncode == 0
    assert pictures(tmp_path) == pictures(whole("fixed"))


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
    assert "going on with --batch_size 2" in saving.stderr
    assert "the graph of one timestep at a time, which" in saving.stderr
    assert pictures(tmp_path / "saving") == pictures(whole("fixed"))
    none = attempt(tmp_path / "none", batch=0, plain=True)
    assert none.returncode == 1 and "Traceback" not in none.stderr and done(tmp_path / "none") == []
    assert re.search(
        r"main\.py: error: out of memory with one image and one timestep at a time [^\n]*"
        r"give a --res below 96; the images done so far are complete\n",
        none.stderr,
    )
