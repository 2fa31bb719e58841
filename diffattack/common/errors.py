"""What reaches the user in one line: errors that say what, where and what to do, and notes that need no
answer.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from diffattack.common.launched import is_first_process


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


class ImageNote(NamedTuple):
    """What is said of an image: of each, or where it is of a kind of the first of that kind alone."""

    path: str
    text: str
    kind: str = ""


said_of_images: set[tuple[str, str]] = set()
_passed_on: list[Callable[[ImageNote], None]] = []


def note_of_image(path: Path, text: str, kind: str = "") -> None:
    """Says something of an image once, in whichever process reads it; of a `kind`, of the first image alone.
    A process of `common/parallel.py` leaves it to the one that started it; of those that a launcher started,
    each says it of the images that it reads.
    """
    say_of_image(ImageNote(str(path), text, kind))


def say_of_image(noted: ImageNote) -> None:
    key = ("", noted.kind) if noted.kind else (noted.path, noted.text)
    if key in said_of_images:
        return
    said_of_images.add(key)
    if _passed_on:
        _passed_on[0](noted)
        return
    line = f"note: {'/'.join(Path(noted.path).parts[-2:])}: {noted.text}"  # folders are classes
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)  # above the bars that are shown
    else:  # on a line of its own in a file, where bars end without one
        print("\n" * bool(getattr(tqdm, "_instances", ())) + line, file=sys.stderr)


def pass_on(send: Callable[[ImageNote], None]) -> None:
    """From now on this process passes on what it says of images."""
    _passed_on[:] = [send]


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
