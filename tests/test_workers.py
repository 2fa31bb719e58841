"""Processes that share out the images of a run on a CPU. Real processes, real signals."""

import errno
import os
import signal
from functools import partial

import psutil
import pytest
from conftest import MAIN, done, flags, pictures, run, start, wait_for
from work_of_processes import die_or_write, fail_or_wait, named_by

from diffattack.common.parallel import available_cores, processes_for, run_in_processes


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
    found = []
    assert run_in_processes(2, range(20), found.append, named_by, (os.getpid(),)) == []
    assert sorted(part for part, _ in found) == [*range(20)]
    assert 1 <= len({process for _, process in found}) <= 2
    assert run_in_processes(1, "ab") == ["a", "b"]


@pytest.mark.slow
def test_an_error_is_raised_here_and_ends_the_others():
    with pytest.raises(OSError, match="No space left") as caught:
        run_in_processes(2, [partial(fail_or_wait, False), partial(fail_or_wait, True)])
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "somewhere"
    assert not workers_of(os.getpid())


@pytest.mark.slow
def test_where_a_process_is_killed_half_as_many_go_on_and_then_this_one(tmp_path, capsys):
    deadly = partial(die_or_write, tmp_path / "a", True)
    left = run_in_processes(4, [partial(die_or_write, tmp_path / "b", False), *3 * [deadly]])
    assert left[-3:] == 3 * [deadly] and len(left) - 3 == (not (tmp_path / "b").exists())
    told = capsys.readouterr().err
    assert "going on in 2 processes" in told and "going on in this one" in told
    assert not (tmp_path / "a").exists() and not workers_of(os.getpid())


def test_one_process_a_core_as_far_as_images_and_memory_go(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = psutil.virtual_memory().available
    assert processes_for(1000, 1) == available_cores()
    assert processes_for(1, 1) == 1
    assert processes_for(1000, 10 * free) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processes_for(1000, 1) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_end_with_the_run_and_what_is_done_stays(data, whole, tmp_path, number, code):
    command = [*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed", "--processes", "2")]
    process = start(command, start_new_session=True)
    wait_for(lambda: done(tmp_path), process)
    workers, finished = workers_of(process.pid), done(tmp_path)
    assert len(workers) == 2
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert set(finished) <= set(done(tmp_path))
    assert run(command).returncode == 0
    assert pictures(tmp_path) == pictures(whole("fixed"))


def test_a_run_goes_on_when_one_of_its_processes_is_killed(data, whole, tmp_path):
    process = start([*MAIN, *flags(data, tmp_path, "--weight_mode", "fixed", "--processes", "2")])
    wait_for(lambda: done(tmp_path), process)
    workers_of(process.pid)[0].kill()
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "a process was killed" in errors
    assert said.count("mean PSNR") == 1 and "resource_tracker" not in errors
    assert pictures(tmp_path) == pictures(whole("fixed"))


def test_mode_learnable_refuses_processes(data, tmp_path):
    result = run([*MAIN, *flags(data, tmp_path, "--weight_mode", "learnable", "--processes", "2")])
    assert result.returncode == 2 and "in one process" in result.stderr
