"""How the commands end: the exit code, and one line where input or the machine does not allow the work."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from diffattack.common.errors import CheckpointError, InputError, RunError, is_first_process


def raise_signals() -> None:
    """SIGTERM and SIGHUP, by which Slurm and a closed terminal end a process, become exceptions as Ctrl-C
    does, so that what is half-written is taken back.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows lacks the second
        if number and signal.getsignal(number) is signal.SIG_DFL:  # not ignored, as nohup has it
            signal.signal(number, stop)


def run_program(name: str, work: Callable[[], int], done: str = "the images done so far are complete") -> int:
    """Does the work, and says in one line what kept it from being done; returns the exit code.

    Args:
        done: what an interrupted one leaves, which the same command goes on from; "" where it leaves nothing.
    """
    goes_on = f"; {done}, and the same command goes on with the rest" if done else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    try:
        raise_signals()
        return work()
    except (InputError, CheckpointError) as error:
        code, text = 2, f"error: {error}" if is_first_process() else ""  # every process finds the same
    except RunError as error:
        code, text = 1, f"error: {error}"
    except BrokenProcessPool:
        code, text = 1, f"error: a process was killed, perhaps for want of memory{goes_on}"
    except OSError as error:  # images that cannot be read were dealt with before
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f"; {'make room' if is_full else 'put that right'}{goes_on}" if done else ""
        text = f"error: {error.filename or 'writing a result'}: {error.strerror or error}{remedy}"
        code = 1
    except KeyboardInterrupt as error:
        code, text = 128 + (error.args[0] if error.args else signal.SIGINT), f"interrupted{goes_on}"
    if text:
        print(f"{name}: {text}", file=sys.stderr)
    return code
