"""The images of a run and their labels, from the files that data sets come with.

    images = read_dataset(Path("photos"), Path("labels.txt"), class_names)      # a list of Item

Labels: a text file with a line for each image in natural order, a number or several ("3 17"), or an image's
name or number and its label; a table (commas, semicolons or tabs) with columns ImageId,TrueLabel (and
TargetClass), as NIPS 2017's, or filename,label, matched by name; or no file where the images lie in one
folder a class.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted

from common.errors import DatasetError, note
from data.class_names import spoken
from data.images import IMAGE_SUFFIXES, PICTURE_SUFFIXES

TARGET_COLUMN = "TargetClass"


@dataclass(frozen=True)
class Item:
    """One image; labels count from 0, and there may be several."""

    index: int
    path: Path
    labels: tuple[int, ...]
    target: int | None = None  # of a targeted attack


def labels_and_targets(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Of images, the labels `(B, L)`, -1 where an image has fewer than another, and the targets `(B,)`, -1
    where there is none.
    """
    longest = max(len(item.labels) for item in items)
    labels = np.array([[*item.labels, *[-1] * (longest - len(item.labels))] for item in items])
    return labels, np.array([-1 if item.target is None else item.target for item in items])


@dataclass(frozen=True)
class Preset:
    """What --dataset_name stands for."""

    label_base: int = 1
    logit_temperature: float = 1.0
    class_names: str | None = None  # what --captions must be given, or None for ImageNet's


PRESETS = {
    "imagenet_compatible": Preset(),
    "cub_200_2011": Preset(logit_temperature=10.0, class_names="CUB-200-2011's classes.txt"),
    "standford_car": Preset(
        logit_temperature=10.0, class_names="Stanford Cars' cars_meta.mat"
    ),  # spelt as the original tool does
}


NOT_OF_THE_USER = {".DS_Store", "Thumbs.db", "desktop.ini"}


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in natural order, or of the folders in it, one a class; says what it skips.

    Raises:
        DatasetError: there is no folder, no image in it, or a class of which no picture can be read.
    """
    if not folder.is_dir():
        raise DatasetError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images = natsorted(filter(is_image, folder.iterdir()), key=lambda path: path.name)
    folders = class_folders(folder)
    skipped = [path for path in folder.iterdir() if path.is_file() and not is_image(path)]
    if images:
        skipped += folders
    for inner in folders if not images else []:
        found = natsorted(filter(is_image, inner.iterdir()), key=lambda path: path.name)
        others = [path for path in inner.iterdir() if not is_image(path)]
        pictures = [path.name for path in others if path.suffix.lower() in PICTURE_SUFFIXES]
        if pictures and not found:
            raise DatasetError(
                f"--images_root: no picture of class {inner.name!r} can be read, such as {pictures[0]!r}; "
                f"expected files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        images += found
        skipped += others if found else [inner]
    if not images:
        raise DatasetError(
            f"--images_root: no image in {str(folder)!r}; expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}, or folders of them, one a class"
        )
    skipped = [path for path in skipped if path.name not in NOT_OF_THE_USER]
    if skipped:
        names = sorted(path.name + ("/" if path.is_dir() else "") for path in skipped)
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        note(f"--images_root: {len(names)} entries of {str(folder)!r} are no images and skipped: {shown}")
    return images


def class_folders(folder: Path) -> list[Path]:
    """In natural order."""
    return natsorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


# ---------------------------------------------------------------- labels


def read_dataset(
    folder: Path,
    label_path: Path | None,
    class_names: Sequence[str],
    label_base: int = 1,
    target: int | str | None = None,
) -> list[Item]:
    """The images of a folder with their labels.

    Args:
        folder: of images, or of one folder a class.
        label_path: a text file or a CSV; None takes the folder that an image lies in as its class.
        class_names: the names of the classes.
        label_base: what the files count from, 0 or 1.
        target: of a targeted attack, the label that it is after in all images, counted from `label_base`; or
            TARGET_COLUMN, the CSV's column of that name.
    Raises:
        DatasetError: something does not fit.
    """
    images = list_images(folder)
    if label_path is None:
        labels = labels_of_folders(folder, images, class_names, label_base)
        targets = [None] * len(images)
    else:
        lines = read_lines(label_path)
        read = Labels(label_path, len(class_names), label_base, target == TARGET_COLUMN)
        labels, targets = read.of_file(lines, images)
    if target is None:
        targets = [None] * len(images)
    elif target != TARGET_COLUMN:
        targets = [check_target(target, len(class_names), label_base)] * len(images)
    elif None in targets:
        raise DatasetError(
            f"--target_label {TARGET_COLUMN}: {images[targets.index(None)].name} has no {TARGET_COLUMN} in "
            f"--label_path; give a CSV with that column, or a label for all images"
        )
    for path, classes, goal in zip(images, labels, targets):
        if goal in classes:
            raise DatasetError(
                f"the target of {path.name}, {goal + label_base}, is its own label; a targeted attack needs "
                f"another"
            )
    return [
        Item(index, path, classes, goal)
        for index, (path, classes, goal) in enumerate(zip(images, labels, targets))
    ]


def read_lines(label_path: Path) -> list[str]:
    """The lines of a file of labels."""
    if not label_path.is_file():
        raise DatasetError(
            f"--label_path: there is no file {str(label_path)!r}; give a text file with one class number a "
            f"line, or a CSV"
        )
    try:
        return label_path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise DatasetError(
            f"--label_path: {str(label_path)!r} is no text file; give one class number a line"
        ) from None


# of the columns of a table
TITLES = {"imageid", "filename", "truelabel", "label", TARGET_COLUMN.lower()}


def check_target(target: int, classes: int, base: int) -> int:
    """A target that counts from `base`, counted from 0."""
    if not base <= target < base + classes:
        raise DatasetError(
            f"--target_label is {target}; expected a label from {base} to {base + classes - 1}"
        )
    return target - base


@dataclass(frozen=True)
class Labels:
    """A file of labels that count from `base`, of so many classes; with targets if asked for."""

    path: Path
    classes: int
    base: int
    targeted: bool = False

    def number(self, text: str, line: int) -> int:
        """A label, counted from 0."""
        last = self.base + self.classes - 1
        if not re.fullmatch(r"[+-]?\d+", text.strip()):
            raise DatasetError(
                f"--label_path: line {line} of {str(self.path)!r} is {text.strip()[:40]!r}; expected an "
                f"integer from {self.base} to {last}"
            )
        if not self.base <= int(text) <= last:
            raise DatasetError(
                f"--label_path: line {line} of {str(self.path)!r} is {int(text)}; labels count from "
                f"{self.base}, so expected {self.base} to {last}"
            )
        return int(text) - self.base

    def several(self, text: str, line: int) -> tuple[int, ...]:
        """One label or several, each once."""
        return tuple(dict.fromkeys(self.number(part, line) for part in text.split() or [""]))

    def of_file(
        self, lines: Sequence[str], images: Sequence[Path]
    ) -> tuple[list[tuple[int, ...]], list[int | None]]:
        """The labels, and targets or None, of a table or of lines."""
        title = re.split(r"[,;\t]", lines[0].lower()) if lines else []
        is_table = self.path.suffix.lower() in (".csv", ".tsv") or any(
            name.strip("\"' ") in TITLES for name in title
        )
        if is_table:
            return self.of_table(lines, images)
        return self.of_lines(self.without_numbers(lines, images), images)

    def without_numbers(self, lines: Sequence[str], images: Sequence[Path]) -> Sequence[str]:
        """The lines without the image's name or number before the label, in the order of the images.

        CUB's image_class_labels.txt numbers its images, and such a number is no second label.
        """
        pairs = [line.split() for line in lines]
        if not lines or any(len(pair) != 2 for pair in pairs):
            return lines
        names = {name: label for name, label in pairs}
        files = [next((n for n in (path.name, path.stem) if n in names), None) for path in images]
        if not any(re.fullmatch(r"[+-]?\d+", name) for name in names) and None not in files:
            return [names[name] for name in files]
        counted = [pair[0] for pair in pairs] == [str(k) for k in range(1, len(pairs) + 1)]
        if counted and (len(pairs) > 2 or self.path.name == "image_class_labels.txt"):
            note(f"--label_path: the first column of {str(self.path)!r} is the image's number")
            return [label for _, label in pairs]
        return lines

    def of_lines(
        self, lines: Sequence[str], images: Sequence[Path]
    ) -> tuple[list[tuple[int, ...]], list[None]]:
        """A line for each image."""
        labels = [self.several(text, line) for line, text in enumerate(lines, 1)]
        if len(labels) != len(images):
            raise DatasetError(
                f"--label_path: {str(self.path)!r} has {len(labels)} labels but --images_root has "
                f"{len(images)} images; expected one label an image"
            )
        return labels, [None] * len(images)

    def of_table(
        self, lines: Sequence[str], images: Sequence[Path]
    ) -> tuple[list[tuple[int, ...]], list[int | None]]:
        """A table whose rows name their image, with or without its suffix."""
        separator = max(",;\t", key=(lines or [""])[0].count)
        rows = csv.DictReader(lines, delimiter=separator)
        columns = {name.strip().lower(): name for name in rows.fieldnames or []}
        image = columns.get("imageid") or columns.get("filename")
        label = columns.get("truelabel") or columns.get("label")
        if not image or not label:
            raise DatasetError(
                f"--label_path: {str(self.path)!r} has the columns {', '.join(columns) or 'none'}; expected "
                f"ImageId,TrueLabel or filename,label"
            )
        target = columns.get(TARGET_COLUMN.lower()) if self.targeted else None
        found: dict[str, tuple[tuple[int, ...], int | None]] = {}
        for line, row in enumerate(rows, 2):
            # a path in a table is of another machine
            name = re.split(r"[/\\]", (row[image] or "").strip())[-1]
            goal = self.number(row[target], line) if target and (row[target] or "").strip() else None
            entry = self.several(row[label] or "", line), goal
            if found.setdefault(name, entry) != entry:
                raise DatasetError(
                    f"--label_path: line {line} of {str(self.path)!r} gives {name!r} another label than a "
                    f"line above it"
                )
        missing = [path.name for path in images if path.name not in found and path.stem not in found]
        if missing:
            raise DatasetError(
                f"--label_path: {str(self.path)!r} has no row for {missing[0]}"
                + (f" and {len(missing) - 1} more images" if len(missing) > 1 else "")
                + "; expected one an image"
            )
        pairs = [found.get(path.name) or found[path.stem] for path in images]
        return [classes for classes, _ in pairs], [goal for _, goal in pairs]


def labels_of_folders(
    folder: Path, images: Sequence[Path], class_names: Sequence[str], base: int
) -> list[tuple[int, ...]]:
    """The class of the folder that each image lies in: the one of its name; or, where all are numbers, the
    label of that number; or else the folder's place among all of them in natural order, which is said.
    """
    if images[0].parent == folder:
        raise DatasetError(
            f"--label_path: the images lie in {str(folder)!r} itself; give a file of labels, or one folder "
            f"of images a class"
        )
    folders = [path.name for path in class_folders(folder)]
    by_name = {spoken(name): k for k, name in enumerate(class_names)}
    if all(spoken(name) in by_name for name in folders):
        numbers = {name: by_name[spoken(name)] for name in folders}
    elif all(re.fullmatch(r"\d+", name) for name in folders):
        numbers = labels_of_numbers(folder, folders, len(class_names), base)
    elif len(folders) == len(class_names):
        numbers = {name: k for k, name in enumerate(folders)}
        say_mapping("in natural order", numbers, class_names)
    else:
        strange = next(name for name in folders if spoken(name) not in by_name)
        raise DatasetError(
            f"--images_root: {str(folder)!r} has {len(folders)} folders but there are {len(class_names)} "
            f"classes, and no class is called {strange!r}; "
            "name the folders after the class names, have one for each class, or give --label_path"
        )
    return [(numbers[path.parent.name],) for path in images]


def labels_of_numbers(folder: Path, folders: Sequence[str], classes: int, base: int) -> dict[str, int]:
    """Of folders that are called by numbers, the labels: they count from 0 where one is called 0, and else
    from `base`.
    """
    start = 0 if any(int(name) == 0 for name in folders) else base
    numbers = {name: int(name) - start for name in folders}
    beyond = [name for name, label in numbers.items() if label >= classes]
    if beyond or len(set(numbers.values())) < len(numbers):
        raise DatasetError(
            f"--images_root: the folders of {str(folder)!r} are numbers, and "
            + (
                f"{beyond[0]!r} is none of the {classes} classes, which count from {start}"
                if beyond
                else "two are the same one"
            )
            + "; name them after the classes, or give --label_base or --label_path"
        )
    note(f"--images_root: the folders of {str(folder)!r} are labels that count from {start}")
    return numbers


def say_mapping(how: str, numbers: Mapping[str, int], class_names: Sequence[str]) -> None:
    shown = [f"{name} is {class_names[label]!r}" for name, label in numbers.items()]
    rest = f", and {len(shown) - 8} more" if len(shown) > 8 else ""
    note(
        f"--images_root: the folders are called otherwise than the classes; {how} "
        + ", ".join(shown[:8])
        + rest
    )


def target_label(text: str) -> int | str:
    """What a flag says: a label, or the column that has them."""
    if text != TARGET_COLUMN and not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(
            f"expected a label, or {TARGET_COLUMN} for the column of that name, not {text!r}"
        )
    return text if text == TARGET_COLUMN else int(text)
