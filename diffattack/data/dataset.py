"""Folders of images, their labels and targets, in the forms that data sets come with.

    items = read_dataset(Path("photos"), Path("labels.txt"), class_names)      # a list of Item

Labels come from a file (label_rows.py has its forms), or without one from metadata.csv among the images, from
the WordNet ids in their names, or from the folder of a class that each lies in.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted

from diffattack.common.errors import DatasetError, note
from diffattack.data.classes import WORDNET_ID, ClassFinder
from diffattack.data.images import IMAGE_SUFFIXES
from diffattack.data.label_rows import (
    IMAGE_TITLES,
    LABEL_TITLES,
    TARGET_COLUMN,
    TARGET_TITLES,
    has_title,
)
from diffattack.data.labels import read_labels


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


def labels_of(configuration: dict, index: int) -> tuple[tuple[int, ...], int | None]:
    """The labels of an image of a run, and its target, counted from 0, by the run's run.json."""
    base, labels, target = configuration["label_base"], configuration["labels"][index], None
    if configuration["targets"][index] is not None:
        target = configuration["targets"][index] - base
    return tuple(label - base for label in (labels if isinstance(labels, list) else [labels])), target


@dataclass(frozen=True)
class Preset:
    """What --dataset_name stands for."""

    label_base: int = 1
    logit_temperature: float = 1.0
    class_names: str | None = None  # what --captions must be given, or None for ImageNet's


PRESETS = {
    "imagenet_compatible": Preset(),
    "cub_200_2011": Preset(logit_temperature=10.0, class_names="CUB-200-2011's classes.txt"),
    # spelt as the original tool does
    "standford_car": Preset(logit_temperature=10.0, class_names="Stanford Cars' cars_meta.mat"),
}


# ---------------------------------------------------------------- images

NOT_OF_THE_USER = {".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX"}
METADATA = ("metadata.csv", "metadata.jsonl")  # as Hugging Face's imagefolder has them


def is_image(path: Path) -> bool:
    """Whether its name is one of an image, and it is no folder or pipe of that name. A link that leads
    nowhere is one: skipped, it would shift the labels of all that follow.
    """
    has_name = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return has_name and (path.is_file() or not path.exists())


def images_in(folder: Path) -> list[Path]:
    return natsorted(filter(is_image, folder.iterdir()), key=lambda path: path.name)


def class_folders(folder: Path) -> list[Path]:
    """In natural order."""
    inner = (path for path in folder.iterdir() if path.is_dir() and path.name not in NOT_OF_THE_USER)
    return natsorted((path for path in inner if path.name[0] != "."), key=lambda path: path.name)


def class_folder(folder: Path, image: Path) -> str:
    """The name of the class's folder that an image lies in, itself or in the folder `images` there."""
    return image.relative_to(folder).parts[0]


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in natural order, or of the folders in it, one a class, each with its images or
    a folder `images` of them; notes what is skipped.

    Raises:
        DatasetError: there is no folder, no image in it, or a class of which no picture can be read.
    """
    if not folder.is_dir():
        raise DatasetError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images, expected = images_in(folder), f"expected files ending in {', '.join(IMAGE_SUFFIXES)}"
    skipped = [path for path in folder.iterdir() if not is_image(path) and (images or not path.is_dir())]
    for inner in class_folders(folder) if not images else ():
        place = inner / "images" if (inner / "images").is_dir() and not images_in(inner) else inner
        found, others = images_in(place), [path for path in place.iterdir() if not is_image(path)]
        unread = next((path.name for path in others if path.is_file() and path.name[0] != "."), None)
        if unread and not found:
            raise DatasetError(
                f"--images_root: no picture of class {inner.name!r} can be read, such as {unread!r}; "
                f"{expected}"
            )
        images += found
        skipped += others if found else [inner]
    if not images:
        deeper = next(filter(is_image, folder.glob("*/*/*")), None)
        raise DatasetError(
            f"--images_root: images of {str(folder)!r} lie deeper, as {str(deeper.relative_to(folder))!r}; "
            f"give --images_root {str(deeper.parents[1])!r}, with one folder a class"
            if deeper
            else f"--images_root: no image in {str(folder)!r}; {expected}, or folders of them, one a class"
        )
    names = sorted(path.name + "/" * path.is_dir() for path in skipped if path.name not in NOT_OF_THE_USER)
    names = [name for name in names if name not in METADATA]
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        note(f"{len(names)} entries of {str(folder)!r} are no images and skipped: {shown}")
    return images


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
        label_path: a file of labels; None takes what `folder` says of them.
        class_names: the names of the classes.
        label_base: what labels count from, 0 or 1.
        target: of a targeted attack, the label that it is after in all images, counted from `label_base`; or
            TARGET_COLUMN, the column of that name.
    Raises:
        DatasetError: something does not fit.
    """
    images, finder = list_images(folder), ClassFinder(class_names, label_base)
    if path := label_path or metadata_of(folder):
        flag = "--images_root" if label_path is None else "--label_path"
        labels, targets = read_labels(path, images, finder, folder, flag)
    else:
        found = labels_of_names(folder, images, finder) or labels_of_folders(folder, images, finder)
        labels, targets = [(label,) for label in found], [None] * len(images)
    if target is None:
        targets = [None] * len(images)
    elif target != TARGET_COLUMN:
        targets = [target_class(target, finder)] * len(images)
    elif None in targets:
        raise DatasetError(
            f"--target_label {TARGET_COLUMN}: {images[targets.index(None)].name} has no {TARGET_COLUMN}; "
            f"give a table of labels with that column, or a label for all images"
        )
    for image, classes, goal in zip(images, labels, targets):
        if goal in classes:
            raise DatasetError(
                f"--target_label: the target of {image.name}, {goal + label_base}, is its own label; a "
                f"targeted attack needs another"
            )
    return [Item(k, *parts) for k, parts in enumerate(zip(images, labels, targets))]


def target_class(target: int, finder: ClassFinder) -> int:
    """The class of --target_label."""
    if not finder.first <= target <= finder.last:
        raise DatasetError(
            f"--target_label is {target}; expected a label from {finder.first} to {finder.last}"
        )
    return finder.numbered(target)


def metadata_of(folder: Path) -> Path | None:
    """The table of labels that lies in a folder of images, if one does; it may hold other things."""
    for path in (folder / name for name in METADATA if (folder / name).is_file()):
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            titles = re.split(r"[,\t:{}]", file.readline())
        if has_title(titles, LABEL_TITLES) and has_title(titles, IMAGE_TITLES):
            note(f"labels are those of {path.name} in {str(folder)!r}")
            return path
    return None


def labels_of_names(folder: Path, images: Sequence[Path], finder: ClassFinder) -> list[int] | None:
    """The classes of images that lie together and have WordNet ids in their names, as in ImageNet's training
    set; None where some have none.
    """
    ids = [set(re.findall(rf"(?<![A-Za-z0-9]){WORDNET_ID}(?!\d)", path.stem)) for path in images]
    if images[0].parent != folder or any(len(found) != 1 for found in ids):
        return None
    places = [finder.places(*found) for found in ids]
    if not all(places):
        return None
    note(f"labels are the WordNet ids in the names of the images, such as {images[0].name}")
    return [place for (place,) in places]


def labels_of_folders(folder: Path, images: Sequence[Path], finder: ClassFinder) -> list[int]:
    """The class of the folder that each image lies in: of its name or WordNet id; or, where all are numbers,
    the label of that number, from 0 on where one is 0; or else the folder's place in natural order.

    Raises:
        DatasetError: the folders are no classes.
    """
    if images[0].parent == folder:
        raise DatasetError(
            f"--images_root: the images lie in {str(folder)!r} itself; give a file of labels, --label_path, "
            f"or one folder of images a class"
        )
    names = [path.name for path in class_folders(folder)]
    # CUB-200-2011's have a number before the name
    texts = [name if finder.places(name) else re.sub(r"^\d+\W", "", name) for name in names]
    unknown = next((name for name, text in zip(names, texts) if not finder.places(text)), None)
    if all(map(str.isdecimal, names)):
        finder = ClassFinder(finder.classes, 0 if 0 in map(int, names) else finder.first)
        note(f"the folders of {str(folder)!r} are labels that count from {finder.first}")
    elif unknown:
        are_like_names = any(finder.places(text) or finder.places(text.rstrip("sS")) for text in texts)
        if are_like_names or len(names) != len(finder.classes):
            raise DatasetError(
                f"--images_root: {str(folder)!r} has {len(names)} folders but there are "
                f"{len(finder.classes)} classes, and no class is called {unknown!r}; name the folders after "
                f"the classes, or give --label_path"
            )
        shown = ", ".join(f"{name} is {text!r}" for name, text in zip(names[:8], finder.classes))
        note(f"the folders of {str(folder)!r} are the classes in natural order, of which {shown}")
        return [names.index(class_folder(folder, image)) for image in images]
    try:
        labels = {name: finder.label(text) for name, text in zip(names, texts)}
    except ValueError as error:
        raise DatasetError(f"--images_root: a folder of {str(folder)!r} {error}") from None
    if len(set(labels.values())) < len(labels):
        raise DatasetError(f"--images_root: two folders of {str(folder)!r} are of one class; make them one")
    return [labels[class_folder(folder, image)] for image in images]


def target_label(text: str) -> int | str:
    """What a flag says: a label, or the column that has them."""
    if has_title([text], TARGET_TITLES):
        return TARGET_COLUMN
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(
            f"expected a label, or {TARGET_COLUMN} for the column of that name, not {text!r}"
        )
    return int(text)
