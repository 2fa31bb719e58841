"""What launchers say in the environment: what fits together, and waiting for processes that never come."""

import subprocess
import sys

import pytest
import torch
from conftest import MAIN, ROOT, flags, run

from diffattack.common.errors import InputError
from diffattack.common.parallel import Process, available_cores, share_cores, this_process
from diffattack.options import Options
from diffattack.runner.setup import check_shards


@pytest.fixture
def environment(monkeypatch):
    def put(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "variables, process",
    [
        ({}, Process(0, 1)),
        ({"LOCAL_RANK": "3"}, Process(0, 1)),
        ({"WORLD_SIZE": "1"}, Process(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Process(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Process(2, 4)),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, Process(0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Process(5, 8, 1)),
    ],
)
def test_which_process_this_is(environment, variables, process):
    environment(**variables)
    assert this_process() == process


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
    ],
)
def test_variables_that_do_not_fit_together(environment, variables):
    environment(**variables)
    name, value = list(variables.items())[-1]
    with pytest.raises(InputError, match=f"the environment has .*{name}={value}, which do not fit together"):
        this_process()


@pytest.mark.parametrize("rank", ["a", "2"])
def test_variables_that_do_not_fit_are_one_line_and_leave_nothing(environment, data, tmp_path, rank):
    environment(RANK=rank, WORLD_SIZE="2")
    result = run([*MAIN, *flags(data, tmp_path / "out")])
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and f"RANK={rank}" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_refused(environment, monkeypatch, name):
    environment()
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=f"started 4 processes .{name}.*--shard K/4"):
        check_shards(Options(), ["fixed"])
    assert check_shards(Options(shard="1/4"), ["fixed"]) == (1, 4)
    environment(RANK="2", WORLD_SIZE="4")
    assert check_shards(Options(), ["fixed"]) == (2, 4)
    environment(RANK="0", WORLD_SIZE="1")
    assert check_shards(Options(), ["fixed"]) == (0, 1)


def test_a_part_of_the_images_is_said(environment, data, quick, tmp_path):
    environment(RANK="1", WORLD_SIZE="2")
    result = run([*MAIN, *flags(data, tmp_path / "out", "--model_name", quick)])
    assert result.returncode == 0
    environment(RANK="0", WORLD_SIZE="2")
    result = run([*MAIN, *flags(data, tmp_path / "out", "--model_name", quick)])
    assert "process 0 of 2: 2 of 4 images are its part" in result.stderr


def test_a_finished_run_outlives_a_launcher_without_processes(environment, data, quick, tmp_path):
    command = [*MAIN, *flags(data, tmp_path / "out", "--model_name", quick, "--limit", "1")]
    assert run(command).returncode == 0
    before = sorted(tmp_path.rglob("*"))
    environment(RANK="0", WORLD_SIZE="2")
    assert run([*command, "--overwrite"]).returncode == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_cores_are_shared_unless_openmp_says_how(monkeypatch):
    before = torch.get_num_threads()
    try:
        for variable, threads in (("3", before), (None, available_cores())):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if variable:
                monkeypatch.setenv("OMP_NUM_THREADS", variable)
            share_cores(1)
            assert torch.get_num_threads() == threads
        share_cores(1000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_bars_have_no_lock_that_outlives_their_process():
    """As those of multiprocessing do, of which its tracker of resources complains at the very end."""
    locks = "import diffattack.common.environment, tqdm; print(type(tqdm.tqdm.get_lock()).__module__)"
    shown = subprocess.run([sys.executable, "-c", locks], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "_thread"


def test_a_closed_standard_stream_is_refused():
    command = f"{sys.executable} main.py --help <&-"
    shown = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stdout == "" and shown.stderr.count("\n") == 1
