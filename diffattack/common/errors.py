"""What reaches the user in one line: errors that say what, where and what to do, and notes that need no
answer.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


DatasetError = ClassifierError = InputError


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


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def is_first_process() -> bool:
    """Of those that a launcher started, the one that speaks for all; or one of no known rank."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


@functools.cache
def note(text: str) -> None:
    """Says something once; of several processes, the first says it."""
    if is_first_process() and multiprocessing.parent_process() is None:
        print(f"note: {text}", file=sys.stderr)


class ImageNote(NamedTuple):
    """What there is to say of the first image of its kind."""

    path: str
    text: str


said_of_images: set[str] = set()
_passed_on: list[Callable[[ImageNote], None]] = []


def note_of_image(path: Path, text: str) -> None:
    """Says something of the first image that it is true of. A process of `common/parallel.py` leaves it to
    the one that started it; of those that a launcher started, each says it of the images that it reads.
    """
    say_of_image(ImageNote("/".join(path.parts[-2:]), text))  # folders are classes


def say_of_image(noted: ImageNote) -> None:
    if noted.text in said_of_images:
        return
    said_of_images.add(noted.text)
    if _passed_on:
        _passed_on[0](noted)
    else:
        tqdm.write(f"note: {noted.path}: {noted.text} (said of the first such image only)", file=sys.stderr)


def pass_on(send: Callable[[ImageNote], None]) -> None:
    """From now on this process passes on what it says of images."""
    _passed_on[:] = [send]
