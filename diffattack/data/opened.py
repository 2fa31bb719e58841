"""Image files opened for reading, and what there is to say of each: what libraries warn of, and frames that
are not taken.

    with opened(path) as file:              # None for a TIFF that Pillow does not know
        say_frames(path, file)
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffattack.common.errors import note_of_image, one_line

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
REDUCED, MASK = 0b001, 0b100  # of a page's NewSubfileType
LIBRARIES = ("PIL", "tifffile")  # that log what they stumble over
SILENT = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)  # not of the image


class UnreadableImageError(OSError):
    """An image cannot be read; the message says which and why."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image | None]:
    """An image's file as Pillow opens it; what libraries warn of meanwhile is said of the image, each kind
    once.

    Yields:
        None for a TIFF that Pillow does not know.
    Raises:
        UnreadableImageError: it is missing, no ordinary file, damaged, or no image; also for whatever
            decoders of damaged files raise inside.
    """
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise OSError("it is a folder" if path.is_dir() else "it is no ordinary file")
        with warnings_said(path):
            try:
                image = Image.open(path)
            except UnidentifiedImageError:
                with open(path, "rb") as file:
                    if file.read(4) not in TIFF:
                        raise
                image = None
            if image is None:
                yield None
            else:
                with image:
                    seek_whole(image)
                    yield image
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"{path.name} is not a readable image ({one_line(error)})") from error


def seek_whole(image: Image.Image) -> None:
    """Goes to the first page of a TIFF that is no smaller copy of another."""
    page = 0
    while image.format == "TIFF" and image.tag_v2.get(254, 0) & REDUCED and page + 1 < image.n_frames:
        page += 1
        image.seek(page)


@contextmanager
def warnings_said(path: Path) -> Iterator[None]:
    """What libraries warn of or log meanwhile is said of an image, each kind once, instead of printed."""
    with warnings.catch_warnings(record=True) as caught, logged(LIBRARIES) as messages:
        warnings.simplefilter("always")
        for category in SILENT:
            warnings.simplefilter("ignore", category)
        try:
            yield
        finally:
            say_kinds(path, [*(one_line(warning.message) for warning in caught), *messages])


def say_kinds(path: Path, messages: Iterable[str]) -> None:
    """Says what libraries said of an image, each kind of it once."""
    for text in messages:
        kind = re.sub(r"['\"<].*?['\">]|[\d.]+|0x\w+", "*", text)  # whatever the numbers and names
        note_of_image(path, f"{text} (said of the first such image only)", kind)


@contextmanager
def printed_said(path: Path, file: Image.Image) -> Iterator[None]:
    """What libtiff prints meanwhile, which is no warning of Python's, is said of an image likewise."""
    try:
        stderr = os.dup(2) if file.format == "TIFF" else None
    except OSError:  # there is none
        stderr = None
    if stderr is None:
        yield
        return
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            printed.seek(0)
            lines = printed.read().decode(errors="replace").splitlines()
            say_kinds(path, [" ".join(line.split())[:160] for line in lines if line.strip()])


class _Listed(logging.Handler):
    """Keeps messages in a list."""

    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split())[:160])


@contextmanager
def logged(names: tuple[str, ...]) -> Iterator[list[str]]:
    """What is logged meanwhile by these loggers, and by no other way."""
    messages: list[str] = []
    handler, before = _Listed(messages), {}
    for logger in map(logging.getLogger, names):
        before[logger] = logger.propagate
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield messages
    finally:
        for logger, propagate in before.items():
            logger.removeHandler(handler)
            logger.propagate = propagate


def say_frames(path: Path, file: Image.Image | None) -> None:
    """Says of an animation or of several pages that the first alone is taken. A phone's MPO is one
    photograph, with a depth map or a smaller copy.
    """
    if file is not None and (file.format == "MPO" or not getattr(file, "is_animated", False)):
        return
    what = "pages" if file is None or file.format == "TIFF" else "frames"
    try:
        count = pages_of(path) if what == "pages" else file.n_frames
    except Exception:  # the first may be whole where a later one is damaged
        count = None
    if count is None or count > 1:
        many = "several" if count is None else count
        note_of_image(path, f"it has {many} {what}, of which the first is taken")


def pages_of(path: Path) -> int:
    """How many pages a TIFF has, without smaller copies of others and masks."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        return sum(not page.subfiletype & (REDUCED | MASK) for page in tiff.pages)
