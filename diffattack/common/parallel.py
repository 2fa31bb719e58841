"""Processes: those that share out the images of a run on a CPU, and those that a launcher has started.

One process with one thread for each core attacks far more images an hour than one process with all the
threads: most operations of a small model are too short to be worth sharing between threads. Each image is
computed by one process, so what is written does not depend on how many there are.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from tqdm import tqdm

from diffattack.common.errors import InputError, note, notes

MEMORY_SHARE = 0.8  # of the memory that is free, for all processes together
# elsewhere libraries do not bear to be forked once they are imported
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def processes_for(images: int, bytes_each: int = 1) -> int:
    """How many processes to start on this machine: one a core, no more than there are images, nor than fit
    into memory.

    One where OMP_NUM_THREADS is set: then the user shares out the cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return 1
    fitting = int(MEMORY_SHARE * psutil.virtual_memory().available / bytes_each)
    return max(1, min(available_cores(), images, fitting))


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(processes: int) -> None:
    """Gives this process the threads of one of so many: its share of the cores, or OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // processes))


# ---------------------------------------------------------------- processes of our own


def run_in_processes(
    processes: int,
    parts: Sequence,
    done: Callable[[Any], object],
    prepare: Callable[..., Callable],
    arguments: tuple = (),
) -> list:
    """Works on parts in several processes, which end with this one; where one of them is killed, half as many
    go on.

    Args:
        done: is told what comes of each part.
        prepare: `prepare(*arguments)`, which each process calls once, is what it calls with parts.
    Returns:
        the parts that are left to this process: all of them where `processes` is 1.
    Raises:
        the first exception of a process; the others are then ended.
    """
    left = dict(enumerate(parts))
    if left and processes > 1:
        import_ahead()
    while left and processes > 1:
        pool = ProcessPoolExecutor(min(processes, len(left)), CONTEXT, _begin, (prepare, arguments))
        try:
            futures = {pool.submit(_work, part): k for k, part in left.items()}
            for future in as_completed(futures):
                result, their_notes = future.result()
                del left[futures[future]]
                for text, path in their_notes.items():
                    note(text, path)
                done(result)
        except BrokenProcessPool:
            processes //= 2
            goes_on = f"{processes} processes" if processes > 1 else "this one"
            tqdm.write(
                f"a process was killed, perhaps for want of memory; going on in {goes_on}", file=sys.stderr
            )
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return list(left.values())


def import_ahead(modules: Sequence[str] = ()) -> None:
    """Starts the process that others are forked from, if there is none, and has it import these modules: once
    for all of them, and while this process still reads and loads. None of them ever sees Ctrl-C, which
    reaches the whole group: this process answers for all.
    """
    if sys.platform == "linux":
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which Python 3.11 and 3.12 do not tell it
        CONTEXT.set_forkserver_preload(["__main__", *modules])
        resource_tracker.ensure_running()  # which lets signals through when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(prepare: Callable[..., Callable], arguments: tuple) -> None:
    global _prepared
    _prepared = functools.cache(lambda: prepare(*arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(part: Any) -> tuple[Any, dict[str, Path | None]]:
    """What comes of a part, and all that this process has noted."""
    try:
        return _prepared()(part), dict(notes)
    except SystemExit:  # what is half-written has been taken back
        os._exit(1)


# ---------------------------------------------------------------- processes of a launcher

# of how many processes, by what starts them without setting RANK
OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
ADVICE = "start it by torchrun or accelerate launch, or unset RANK and WORLD_SIZE"


class Process(NamedTuple):
    """One of several on one or more machines; or the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # which of those on its machine it is


def this_process() -> Process:
    """By what torchrun, accelerate launch or Slurm put into the environment.

    Raises:
        InputError: RANK, WORLD_SIZE and LOCAL_RANK do not fit together.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    rank = os.environ.get("RANK") or ("0" if size == "1" else "?")
    texts = [rank, size, os.environ.get("LOCAL_RANK") or "0"]
    numbers = [int(text) for text in texts if text.isdecimal()]
    if len(numbers) < 3 or numbers[0] >= numbers[1]:
        shown = "RANK={}, WORLD_SIZE={}, LOCAL_RANK={}".format(*texts)
        raise InputError(f"the environment has {shown}, which do not fit together; {ADVICE}")
    return Process(*numbers)


def check_alone() -> None:
    """Raises InputError where others started several processes that know nothing of each other."""
    for name, starter in OTHERS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise InputError(
                f"{starter} has started {count} processes ({name}), each of which would attack all images; "
                f"give each its --shard K/{count}, start them by accelerate launch, or unset {name}"
            )
