"""Processes that share out the images of a run on a CPU, and that end with the process that started them.

One process with one thread for each core attacks far more images an hour than one process with all the
threads: most operations of a small model are too short to be worth sharing between threads. Each image is
computed by one process, so what is written does not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import psutil
from tqdm import tqdm

from diffattack.common.errors import ImageNote, RunError, pass_on, say_of_image

MEMORY_SHARE = 0.8  # of the memory that is free, for all processes together
STARTS_WITHIN, ENDS_WITHIN = 0.5, 5.0  # seconds, after a signal


def processes_for(images: int, bytes_each: int = 1) -> int:
    """How many processes to start on this machine: one a core, no more than there are images, nor than fit
    into memory.

    One where OMP_NUM_THREADS is set: then the user shares out the cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return 1
    return max(
        1, min(available_cores(), images, int(MEMORY_SHARE * psutil.virtual_memory().available / bytes_each))
    )


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(processes: int) -> int:
    """The threads that each of so many processes gets: OMP_NUM_THREADS, or its share of the cores."""
    # a number, or one for each level of nesting
    given = re.match(r"\s*([1-9]\d*)\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(given[1]) if given else max(1, available_cores() // processes)


_has_server = False  # of this process, that imports ahead


def import_ahead(modules: Sequence[str]) -> None:
    """Starts a process that imports these modules, from which `run_in_processes` then forks its own: they are
    imported once, and while this process still reads and loads. What cannot be imported there is imported
    later. Nothing happens on other systems than Linux: they have no such servers, or libraries that do not
    bear to be forked once they are imported.
    """
    global _has_server
    if sys.platform != "linux" or _has_server:
        return
    multiprocessing.set_forkserver_preload(["__main__", *modules])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 and 3.12 do not give the server the path that modules are found on
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, before]))
    try:
        with interrupts_held():
            forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    _has_server = True


_parent: Connection | None = None  # of a process of `run_in_processes`


def tell_parent(count: int) -> None:
    """Says in a process of `run_in_processes` that so much more is done."""
    if _parent is not None:
        _parent.send(count)


def run_in_processes(
    work: Callable[..., None],
    arguments: Sequence[tuple],
    told: Callable[[int], object] = lambda count: None,
) -> None:
    """Runs `work(*arguments[k])` in the k-th process, with an equal share of the cores or OMP_NUM_THREADS;
    `told` is called with what a process says by `tell_parent`. One that is killed leaves its work undone,
    which is said.

    Raises:
        the first exception of a process; the others are then ended. KeyboardInterrupt likewise.
        RunError: a process cannot be started.
    """
    context = multiprocessing.get_context("forkserver" if _has_server else "spawn")
    threads = threads_of_each(len(arguments))
    running, started, killed = {}, [], []
    try:
        # by the processes: Ctrl-C reaches the whole group, and this process answers for all
        with interrupts_held() as received:
            for part in arguments:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(sender, threads, work, part), daemon=True)
                if not start(process, received):
                    break  # the interrupt is answered at the end of this block
                sender.close()
                running[receiver] = process
                started.append(process)
        while running:
            for receiver in wait(list(running), timeout=0.5):
                process = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:
                    del running[receiver]
                    process.join()
                    killed.append(process.exitcode)
                    continue
                if isinstance(message, int):
                    told(message)
                    continue
                if isinstance(message, ImageNote):
                    say_of_image(message)
                    continue
                del running[receiver]
                process.join()  # while its number is still its own
                if message is not None:
                    raise message
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join(ENDS_WITHIN)
            if process.is_alive():  # one that is stopped, say
                process.kill()
                process.join(ENDS_WITHIN)
    if killed:
        tqdm.write(
            f"{len(killed)} of {len(arguments)} processes were killed "
            f"({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; going on with "
            f"their images in this one",
            file=sys.stderr,
        )


def start(process: BaseProcess, received: Sequence[int]) -> bool:
    """Starts a process, for which the server has to have imported all it should; returns False where that is
    given up, because a signal was received and it takes long.
    """
    failed = []

    def work() -> None:
        try:
            process.start()
        except Exception as error:
            failed.append(error)

    # starting waits in one call for the server, and this thread has to see signals
    thread, received_at = threading.Thread(target=work, daemon=True), None
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if received and received_at is None:
            received_at = time.monotonic()
        if received_at is not None and time.monotonic() - received_at > STARTS_WITHIN and thread.is_alive():
            return False
    if failed and isinstance(failed[0], EOFError):
        raise RunError("a process could not be started, since what starts it was killed; try again")
    if failed:
        raise failed[0]
    return True


def _run(sender: Connection, threads: int, work: Callable[..., None], arguments: tuple) -> None:
    import torch  # takes long, and the processes that draw do without it

    global _parent
    _parent = sender
    pass_on(sender.send)
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        work(*arguments)
    except Exception as error:
        sender.send(error)
    else:
        sender.send(None)


# ---------------------------------------------------------------- how a process ends

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_with_parent() -> None:
    """To be called first in a process that multiprocessing started: Ctrl-C, which reaches the whole group, is
    left to the parent to answer, and when the parent is gone this process ends, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # its own takes a semaphore of the system, which nobody gives back for a process that is ended
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[Sequence[int]]:
    """A process that is started meanwhile never sees Ctrl-C; this one sees it, and what else ends it, only
    afterwards, so that no process is left half started. Yields the signals that have been received so far.

    Blocking the signal is for those that are started. It is not enough here, since Python answers in its main
    thread a signal that any other thread receives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    received = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in ENDING
        if callable(signal.getsignal(number))
    }
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else None
    try:
        yield received
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _wait_for_the_end() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
