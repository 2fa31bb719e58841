"""What reaches the user in one line: errors that say what, where and what to do, and notes that need no
answer.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

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


# What several processes may find, each of them in files that the others do not see, and how often each kind
# has been said. In a process of `common.workers`, what is found goes to the one that started it.
_said: Counter[str] = Counter()
_relay: Callable[[Finding], object] | None = None


class Finding(NamedTuple):
    """What is said of a file: the text, its kind, and how many of a kind are said."""

    text: str
    kind: str
    at_most: int


def note_of_file(text: str, kind: str, at_most: int = 20) -> None:
    """Says once what was found in a file, and of a kind no more than so many; whichever process finds it."""
    _found(Finding(text, kind, at_most))


@functools.lru_cache(4096)
def _found(finding: Finding) -> None:
    if _relay is not None:
        _relay(finding)
        return
    _said[finding.kind] += 1
    if _said[finding.kind] <= finding.at_most:
        last = " (more of the kind are not said)" if _said[finding.kind] == finding.at_most > 1 else ""
        print(f"note: {finding.text}{last}", file=sys.stderr)


def relay_findings(relay: Callable[[Finding], object]) -> None:
    """To be called in a process of `common.workers`."""
    global _relay
    _relay = relay


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
