"""The images of a run, their labels and the names of their classes, from the files that data sets come with.

    class_names = read_class_names(Path("CUB_200_2011/classes.txt"))
    images = read_dataset(Path("photos"), Path("labels.txt"), class_names)      # a list of Item

Labels: a text file with a line for each image in natural order, a number or several ("3 17"); a CSV with
columns ImageId,TrueLabel (and TargetClass), as NIPS 2017's, or filename,label, matched by name; or no file
where the images lie in one folder a class. Captions: a line for each class; CUB-200-2011's classes.txt;
Stanford Cars' cars_meta.mat; a JSON with an id2label of transformers.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted

from images import IMAGE_SUFFIXES

TARGET_COLUMN = "TargetClass"


class DatasetError(ValueError):
    """A file or folder of a data set cannot be used; the message says which flag, where, and what to do, in
    one line.
    """


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


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in natural order, or of the folders in it, one a class."""
    if not folder.is_dir():
        raise DatasetError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images = natsorted(filter(is_image, folder.iterdir()), key=lambda path: path.name)
    for inner in class_folders(folder) if not images else []:
        images += natsorted(filter(is_image, inner.iterdir()), key=lambda path: path.name)
    if not images:
        raise DatasetError(
            f"--images_root: no image in {str(folder)!r}; expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}, or folders of them, one a class"
        )
    return images


def class_folders(folder: Path) -> list[Path]:
    """In the order of torchvision's ImageFolder, by which it numbers the classes."""
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


# ---------------------------------------------------------------- captions


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names of the classes in the order of their labels, from a file in any of the forms above."""
    if not path.is_file():
        raise DatasetError(
            f"--captions: there is no file {str(path)!r}; give a text file with the name of a class a line"
        )
    try:
        if path.suffix == ".mat":
            class_names = class_names_of_cars(path)
        elif path.suffix == ".json":
            class_names = class_names_of_json(path)
        else:
            class_names = class_names_of_lines(path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise DatasetError(
            f"--captions: {str(path)!r} cannot be read ({' '.join(str(error).split())[:120]}); give a text "
            f"file with the name of a class a line, "
            "CUB's classes.txt, Stanford Cars' cars_meta.mat, or a JSON with id2label"
        ) from None
    for number, caption in enumerate(class_names, 1):
        if not caption.strip():
            raise DatasetError(
                f"--captions: class {number} of {str(path)!r} has no name; expected one a line"
            )
    return tuple(class_names)


def class_names_of_lines(lines: Sequence[str]) -> list[str]:
    """Plain lines, or CUB's: a number, and the same number with a name, as "12
    012.Yellow_headed_Blackbird".
    """
    numbered = [re.fullmatch(r"\s*(\d+)\s+0*(\d+)\.(\S+)\s*", line) for line in lines]
    if lines and all(match and match[1] == match[2] for match in numbered):
        names = {int(match[1]): match[3].replace("_", " ") for match in numbered}
        if sorted(names) != list(range(1, len(names) + 1)):
            raise ValueError("its classes are not numbered from 1 on, each once")
        return [names[number] for number in sorted(names)]
    return [line.strip() for line in lines]


def class_names_of_cars(path: Path) -> list[str]:
    """`class_names` of Stanford Cars' cars_meta.mat."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return [str(name) for name in loadmat(path, squeeze_me=True)["class_names"]]
    except MatReadError as error:
        raise ValueError(error) from None


def class_names_of_json(path: Path) -> list[str]:
    """An `id2label`, by itself or in a config.json, or a list of names."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    content = content.get("id2label", content) if isinstance(content, dict) else content
    if isinstance(content, list):
        return [str(name) for name in content]
    names = {int(key): str(name) for key, name in content.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError("its classes are not numbered from 0 on, each once")
    return [names[number] for number in sorted(names)]


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
        labels, targets = labels_of_folders(folder, images, class_names), [None] * len(images)
    else:
        lines = read_lines(label_path)
        read = Labels(label_path, len(class_names), label_base, target == TARGET_COLUMN)
        labels, targets = (
            read.of_table(lines, images)
            if label_path.suffix.lower() == ".csv"
            else read.of_lines(lines, images)
        )
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
        """A CSV whose rows name their image, with or without its suffix."""
        rows = csv.DictReader(lines)
        columns = {name.strip().lower(): name for name in rows.fieldnames or []}
        image = columns.get("imageid") or columns.get("filename")
        label = columns.get("truelabel") or columns.get("label")
        if not image or not label:
            raise DatasetError(
                f"--label_path: {str(self.path)!r} has the columns {', '.join(columns) or 'none'}; expected "
                f"ImageId,TrueLabel or filename,label"
            )
        target = columns.get(TARGET_COLUMN.lower()) if self.targeted else None
        found = {
            row[image].strip(): (
                self.several(row[label] or "", line),
                self.number(row[target], line) if target and (row[target] or "").strip() else None,
            )
            for line, row in enumerate(rows, 2)
        }
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
    folder: Path, images: Sequence[Path], class_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """The class of the folder that each image lies in: the caption of the same name, or else the folder's
    place among all of them, as torchvision counts.
    """
    if images[0].parent == folder:
        raise DatasetError(
            f"--label_path: the images lie in {str(folder)!r} itself; give a file of labels, or one folder "
            f"of images a class"
        )
    folders = [path.name for path in class_folders(folder)]

    def spoken(name):
        return re.sub(r"[\W_]+", " ", name).strip().lower()

    by_caption = {spoken(caption): k for k, caption in enumerate(class_names)}
    if all(spoken(name) in by_caption for name in folders):
        numbers = {name: by_caption[spoken(name)] for name in folders}
    elif len(folders) == len(class_names):
        numbers = {name: k for k, name in enumerate(folders)}
    else:
        strange = next(name for name in folders if spoken(name) not in by_caption)
        raise DatasetError(
            f"--images_root: {str(folder)!r} has {len(folders)} folders but there are {len(class_names)} "
            f"classes, and no class is called {strange!r}; "
            "name the folders after the class names, have one for each class, or give --label_path"
        )
    return [(numbers[path.parent.name],) for path in images]
