"""A process that works for another one ends with it, however that one ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_with_parent() -> None:
    """To be called first in a process that multiprocessing started: Ctrl-C, which reaches the whole group, is
    left to the parent to answer, and when the parent is gone this process ends, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A process that is started meanwhile never sees Ctrl-C; this one sees it, and what else ends it, only
    afterwards, so that no process is left half started.

    Blocking the signal is for those that are started. It is not enough here, since Python answers in its main
    thread a signal that any other thread receives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
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
        yield
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
