"""What reaches the user in one line: errors that say what, where and what to do, notes that need no answer,
and how the commands end.
"""

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


class RunError(Exception):
    """A run cannot go on; the message says why, in one line, and what is done stays done."""


class RecordError(RunError, ValueError):
    """What a run saved cannot be used; the message says which file, why, and what to do, in one line."""


class AttackError(Exception):
    """An attack of a library or the user's own fails on an image; `index` is the image's place in the order
    in which images came.
    """

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; `iteration` counts from 1, `term` is one of losses.LOSS_TERMS or
    "total", `index` is the image's place in the order in which images came.
    """

    def __init__(self, iteration: int, term: str, index: int):
        super().__init__(f"the {term} loss is not finite in iteration {iteration}")
        self.iteration, self.term, self.index = iteration, term, index


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def is_first_process() -> bool:
    """Of those that a launcher started, the one that speaks for all; or one of no known rank."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


notes: dict[str, Path | None] = {}  # by their texts, of an image where it lies


def note(text: str, path: Path | None = None) -> None:
    """Says something once, of the image at `path` where it is the first that it is true of. Of processes that
    a launcher started, the first speaks, and each of its own images; those of `common/parallel.py` leave it
    to the one that started them.
    """
    if text in notes:
        return
    notes[text] = path
    if multiprocessing.parent_process() is None and (path or is_first_process()):
        where, first = "", ""
        if path:
            where, first = "/".join(path.parts[-2:]) + ": ", " (said of the first such image only)"
        tqdm.write(f"note: {where}{text}{first}", file=sys.stderr)


# ---------------------------------------------------------------- how the commands end


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
    except InputError as error:
        code, text = 2, f"error: {error}" if is_first_process() else ""  # every process finds the same
    except RunError as error:
        code, text = 1, f"error: {error}"
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
