"""What files of labels mean: the classes of each image, and its target.

    labels = Labels(Path("labels.csv"), IMAGENET_CLASSES, base=1)
    classes, targets = labels.of_images(images, Path("photos"))     # ((3,), (17, 20), ...), (None, ...)

A label is a number, a WordNet id, or the name of a class; `label_rows.py` says in which forms files come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from natsort import natsorted

from diffattack.common.errors import DatasetError, note
from diffattack.data.classes import ClassFinder, ClassNames, wordnet_id_of
from diffattack.data.image_names import parts_of, rows_of_images
from diffattack.data.label_rows import INTEGER, Row, read_rows, split_labels


def numbered(number: int, class_names: Sequence[str], base: int) -> int:
    """The class of a number that counts from `base`; where the class names say how a file of labels counts,
    that is followed.
    """
    numbering = ClassNames.of(class_names).numbering
    return numbering[number - 1] if numbering else number - base


def check_target(target: int, class_names: Sequence[str], base: int) -> int:
    """The class of a target that counts from `base`."""
    first, last = numbers_of(class_names, base)
    if not first <= target <= last:
        raise DatasetError(f"--target_label is {target}; expected a label from {first} to {last}")
    return numbered(target, class_names, base)


def numbers_of(class_names: Sequence[str], base: int) -> tuple[int, int]:
    """The first and the last number of a label."""
    first = 1 if ClassNames.of(class_names).numbering else base
    return first, first + len(class_names) - 1


@dataclass(frozen=True)
class Labels:
    """A file of labels that count from `base`."""

    path: Path
    class_names: Sequence[str]
    base: int

    @cached_property
    def finder(self) -> ClassFinder:
        return ClassFinder(self.class_names)

    @cached_property
    def called_by_numbers(self) -> dict[str, int]:
        """Classes whose names are numbers, as those of digits are."""
        return {name: k for k, name in enumerate(self.class_names) if name.isdigit()}

    def of_images(self, images: Sequence[Path], root: Path) -> tuple[list[tuple[int, ...]], list[int | None]]:
        """The classes of each image, and its target or None.

        Raises:
            DatasetError: something does not fit.
        """
        rows = read_rows(self.path, images, self.is_class)
        if any(row.name is not None for row in rows):
            rows = rows_of_images(self.path, rows, images, root)
        return self.in_order(rows, len(images))

    def is_class(self, name: str) -> bool:
        return bool(self.finder.places(name))

    def of_images_in_order(self, images: Sequence[Path]) -> list[tuple[int, ...]]:
        """The classes of images that have other names than those in the file, in which they are all there is.

        Raises:
            DatasetError: something does not fit.
        """
        rows = read_rows(self.path, images, self.is_class)
        if any(row.name is not None for row in rows):
            note(
                f"--label_path: the rows of {str(self.path)!r} are taken in the natural order of their names"
            )
            rows = natsorted(rows, key=lambda row: parts_of(row.name))
        return self.in_order(rows, len(images))[0]

    def in_order(self, rows: Sequence[Row], images: int) -> tuple[list[tuple[int, ...]], list[int | None]]:
        """The classes and targets of a row for each image."""
        self.check_not_one_hot(rows)
        labels = [self.several(row) for row in rows]
        if len(labels) != images:
            raise DatasetError(
                f"--label_path: {str(self.path)!r} has {len(labels)} labels but --images_root has "
                f"{images} images; expected one label an image"
            )
        return labels, [self.one(row.target, row.line) if row.target else None for row in rows]

    def check_not_one_hot(self, rows: Sequence[Row]) -> None:
        """Raises DatasetError where rows seem to have a number for each class, 1 or 0, and not labels."""
        parts = [split_labels(row.labels.strip(" []()")) for row in rows]
        lengths, values = {len(part) for part in parts}, {value for part in parts for value in part}
        if len(lengths) == 1 and lengths != {1} and all(re.fullmatch(r"[01](\.0*)?", v) for v in values):
            if len(self.class_names) in lengths or lengths - {2}:
                raise DatasetError(
                    f"--label_path: each row of {str(self.path)!r} is ones and zeros, such as "
                    f"{rows[0].labels[:40]!r}, which is no list of labels; give the numbers of the classes, "
                    f"or a table with a column for each class"
                )

    def several(self, row: Row) -> tuple[int, ...]:
        """The classes of a row, each once."""
        where = f"--label_path: line {row.line} of {str(self.path)!r}"
        if row.unclear:
            raise DatasetError(
                f"{where} says {row.unclear}; expected 1, or 0 where an image does not show it"
            )
        text = row.labels.strip().strip("[]()").strip()
        if not text:
            raise DatasetError(f"{where} has no label; give it one, or leave the image out")
        parts = [part.strip("\"'") for part in split_labels(text)]
        ids = [part for part in parts if wordnet_id_of(part)]
        if len(parts) == 5 * len(ids):  # each with a box
            parts = ids
        elif ids and len(parts) > len(ids) and all(re.fullmatch(INTEGER, p) for p in parts if p not in ids):
            raise DatasetError(f"{where} gives a WordNet id and numbers, {text[:40]!r}; give one of them")
        if not all(re.fullmatch(INTEGER, part) or wordnet_id_of(part) for part in parts):
            parts = [text]  # the name of a class, or several names
            if "|" in text and not self.finder.places(text):
                parts = text.split("|")
        labels = tuple(dict.fromkeys(self.one(part, row.line) for part in parts))
        self.check_others(row, labels)
        return labels

    def check_others(self, row: Row, labels: Sequence[int]) -> None:
        """Raises DatasetError where another column of a row names another class."""
        for text in row.others:
            places = [] if re.fullmatch(INTEGER, text) else self.finder.places(text)
            if places and not set(places) & set(labels):
                raise DatasetError(
                    f"--label_path: line {row.line} of {str(self.path)!r} has the label {row.labels}, which "
                    f"counted from {self.base} is {self.class_names[labels[0]]!r}, and beside it {text!r}; "
                    f"--label_base says what labels count from"
                )

    def one(self, text: str, line: int) -> int:
        """The class of a label."""
        text = text.strip()
        first, last = numbers_of(self.class_names, self.base)
        where, expected = f"--label_path: line {line} of {str(self.path)!r} is", f"{first} to {last}"
        if re.fullmatch(INTEGER, text):
            number = int(text.split(".")[0])
            if not first <= number <= last:
                raise DatasetError(f"{where} {number}; labels count from {first}, so expected {expected}")
            found = numbered(number, self.class_names, self.base)
            if self.called_by_numbers.get(text, found) != found:
                raise DatasetError(
                    f"{where} {text}, which as a name and as a label that counts from {first} is not the "
                    f"same class; --label_base says what labels count from"
                )
            return found
        places = self.finder.places(text) if text else []
        if not places:
            raise DatasetError(
                f"{where} {text[:40]!r}; expected an integer from {expected}, or a WordNet id or the name of "
                f"a class"
            )
        if len(places) > 1:
            raise DatasetError(
                f"{where} {text[:40]!r}, which may be {self.finder.described(places, first)}; give the label "
                f"or WordNet id"
            )
        return places[0]
