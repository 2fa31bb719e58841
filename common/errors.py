"""What reaches the user in one line: errors that say what, where and what to do, and notes that need no
answer.
"""

import functools
import multiprocessing
import sys

from common.launched import is_first_process


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


class DatasetError(ValueError):
    """A file or folder of a data set cannot be used; the message says which flag, where, and what to do, in
    one line.
    """


class ClassifierError(ValueError):
    """A classifier is unavailable; the message says which, why, and what to do, in one line."""


class CheckpointError(ValueError):
    """A checkpoint is not what it says, or of a kind that is not loaded; the message says which."""


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


@functools.cache
def note(text: str) -> None:
    """Says something once; of several processes, the first says it."""
    if is_first_process() and multiprocessing.parent_process() is None:
        print(f"note: {text}", file=sys.stderr)


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
