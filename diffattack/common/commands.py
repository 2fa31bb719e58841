"""How the commands end: the exit code, and one line where input or the machine does not allow the
work.
"""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from diffattack.common.errors import CheckpointError, ClassifierError, DatasetError, InputError, RunError
from diffattack.common.launched import LauncherError, is_first_process


class Stopped(BaseException):
    """A signal asked the process to end; like KeyboardInterrupt, it is no error."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP, by which Slurm and a closed terminal end a process, become exceptions as Ctrl-C
    does, so that what is half-written is taken back.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # one that is ignored, as nohup does with SIGHUP, stays ignored
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    elif signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by common.environment
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def run_program(name: str, work: Callable[[], int], done: str = "the images done so far are complete") -> int:
    """Does the work, and says in one line what kept it from being done; returns the exit code.

    Args:
        done: what an interrupted one leaves, which the same command goes on from; "" where it leaves nothing.
    """
    goes_on = f"; {done}, and the same command goes on with the rest" if done else ""

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals_raised():
            return work()
    except (InputError, DatasetError, ClassifierError, CheckpointError, LauncherError) as error:
        if is_first_process():  # every process finds the same
            say(f"{name}: error: {error}")
        return 2
    except RunError as error:
        say(f"\n{name}: error: {error}")
        return 1
    except BrokenProcessPool:
        say(f"\n{name}: error: a process was killed, perhaps for want of memory{goes_on}")
        return 1
    # images that cannot be read and folders that cannot be written are dealt with before
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = (
            f"; {done}, {'make room' if full else 'put that right'} and run the same command again to go on"
        )
        place = error.filename or "writing a result"
        say(f"\n{name}: error: {place}: {error.strerror or error}{remedy if done else ''}")
        return 1
    except (KeyboardInterrupt, Stopped) as error:
        say(f"\n{name}: interrupted{goes_on}")
        return 128 + getattr(error, "number", signal.SIGINT)
