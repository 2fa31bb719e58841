"""A process that works for another one ends with it, however that one ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """To be called first in a process that multiprocessing started: Ctrl-C, which reaches the whole group, is
    left to the parent to answer, and when the parent is gone this process ends, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A process that is started meanwhile never sees Ctrl-C; this one sees it afterwards, if it came."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_the_end() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
