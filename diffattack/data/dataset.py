"""Folders of images, their labels and targets, in the forms that data sets come with.

    items = read_dataset(Path("photos"), Path("labels.txt"), class_names)      # a list of Item

Labels come from a file (labels.py has its forms), or without one from metadata.csv among the images, from
the WordNet ids in their names, or from the folder of a class that each lies in.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted

from diffattack.common.errors import InputError, note
from diffattack.data.classes import WORDNET_ID, ClassFinder
from diffattack.data.images import IMAGE_SUFFIXES
from diffattack.data.labels import (
    IMAGE_TITLES,
    LABEL_TITLES,
    TARGET_COLUMN,
    TARGET_TITLES,
    has_title,
    read_labels,
)


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
    """In natural order."""
    return natsorted(filter(is_image, folder.glob("*")), key=lambda path: path.name)


def class_folders(folder: Path) -> list[Path]:
    """In natural order."""
    there = (path for path in folder.glob("[!.]*") if path.is_dir() and path.name not in NOT_OF_THE_USER)
    return natsorted(there, key=lambda path: path.name)


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in natural order, or of the folders in it, one a class, where they may lie in a
    folder `images` of its own; notes what is skipped.

    Raises:
        InputError: there is no folder, no image in it, or a class of which no picture can be read.
    """
    if not folder.is_dir():
        raise InputError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images = images_in(folder)
    expected = f"files ending in {', '.join(IMAGE_SUFFIXES)}, or folders of them, one a class"
    for inner in [] if images else class_folders(folder):
        found = images_in(inner) or images_in(inner / "images")
        if not found and any(inner.glob("[!.]*")):
            raise InputError(f"--images_root: no image in {str(inner)!r}; expected {expected}")
        images += found
    if not images:
        raise InputError(f"--images_root: no image in {str(folder)!r}; expected {expected}")
    places = {folder, *(image.parent for image in images)}
    others = {
        path.name for place in places for path in place.iterdir() if not (path.is_dir() or is_image(path))
    }
    if names := sorted(others.difference(NOT_OF_THE_USER, METADATA)):
        note(f"{len(names)} files of {str(folder)!r} are no images and skipped: {', '.join(names[:5])}")
    return images


def masks_of(folder: Path, images_root: Path, items: Sequence[Item]) -> dict[int, Path]:
    """A user's own mask of each picture, by its index, in a folder that looks like that of the pictures:
    `cat/img1.jpg` has the mask `cat/img1.png`, or any other kind of image of that name.

    Raises:
        InputError: there is no mask for a picture.
    """
    masks = {}
    for item in items:
        place = folder / item.path.relative_to(images_root)
        paths = filter(
            Path.is_file, (place.with_suffix(suffix) for suffix in (place.suffix, *IMAGE_SUFFIXES))
        )
        masks[item.index] = next(paths, None)
        if masks[item.index] is None:
            missing = str(place.with_suffix(".png"))
            raise InputError(
                f"--mask_root: there is no mask {missing!r}; one all in white leaves its picture free"
            )
    return masks


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
        InputError: something does not fit.
    """
    images, finder = list_images(folder), ClassFinder(class_names, label_base)
    targets: Sequence[int | None] = [None] * len(images)
    if path := label_path or metadata_of(folder):
        flag = "--images_root" if label_path is None else "--label_path"
        labels, targets = read_labels(path, images, finder, folder, flag)
    else:
        found = labels_of_names(folder, images, finder) or labels_of_folders(folder, images, finder)
        labels = [(label,) for label in found]
    if target != TARGET_COLUMN:
        targets = [None if target is None else finder.label(str(target), "--target_label")] * len(images)
    for image, classes, goal in zip(images, labels, targets):
        if target is not None and (goal is None or goal in classes):
            missing = f"{image.name} has no {TARGET_COLUMN}; give a table with one, or a label for all images"
            own = f"the target of {image.name}, {(goal or 0) + label_base}, is its own label; give another"
            raise InputError(f"--target_label {target}: {missing if goal is None else own}")
    return [Item(k, *parts) for k, parts in enumerate(zip(images, labels, targets))]


def metadata_of(folder: Path) -> Path | None:
    """The table of labels that lies in a folder of images, if one does; it may hold other things."""
    for path in filter(Path.is_file, (folder / name for name in METADATA)):
        titles = re.split(r"[,\t:{}]", path.read_text("utf-8-sig", "replace").split("\n")[0])
        if has_title(titles, LABEL_TITLES) and has_title(titles, IMAGE_TITLES):
            note(f"labels are those of {path.name} in {str(folder)!r}")
            return path
    return None


def labels_of_names(folder: Path, images: Sequence[Path], finder: ClassFinder) -> list[int] | None:
    """The classes of images that lie together and have WordNet ids in their names, as in ImageNet's training
    set; None where some have none.
    """
    ids = [set(re.findall(rf"(?<![A-Za-z0-9]){WORDNET_ID}(?!\d)", path.stem)) for path in images]
    places = [finder.places(*found) if len(found) == 1 else [] for found in ids]
    if images[0].parent != folder or not all(places):
        return None
    note(f"labels are the WordNet ids in the names of the images, such as {images[0].name}")
    return [place for (place,) in places]


def labels_of_folders(folder: Path, images: Sequence[Path], finder: ClassFinder) -> list[int]:
    """The class of the folder that each image lies in: of its name or WordNet id; or, where all are numbers,
    the label of that number, from 0 on where one is 0; or else the folder's place in natural order.

    Raises:
        InputError: the folders are no classes.
    """
    where = f"--images_root: {str(folder)!r}"
    if images[0].parent == folder:
        raise InputError(f"{where} has no folder for each class; give a file of labels as --label_path")
    names = [path.name for path in class_folders(folder)]
    # CUB-200-2011's have a number before the name
    texts = [name if finder.places(name) else re.sub(r"^\d+\W", "", name) for name in names]
    are_like_names = any(finder.places(text) or finder.places(text.rstrip("sS")) for text in texts)
    if all(map(str.isdecimal, names)):
        texts, finder = names, ClassFinder(finder.classes, 0 if 0 in map(int, names) else finder.first)
        note(f"the folders of {str(folder)!r} are labels that count from {finder.first}")
    elif not are_like_names and len(names) == len(finder.classes):
        shown = ", ".join(f"{name} is {text!r}" for name, text in zip(names[:8], finder.classes))
        note(f"the folders of {str(folder)!r} are the classes in natural order, of which {shown}")
        return [names.index(image.relative_to(folder).parts[0]) for image in images]
    labels = {name: finder.label(text, f"{where}: folder {name!r}") for name, text in zip(names, texts)}
    if len(set(labels.values())) < len(names):
        raise InputError(f"{where} has two folders of one class; rename one, or give a file as --label_path")
    return [labels[image.relative_to(folder).parts[0]] for image in images]


def target_label(text: str) -> int | str:
    """What a flag says: a label, or the column that has them."""
    if has_title([text], TARGET_TITLES):
        return TARGET_COLUMN
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a label, or {TARGET_COLUMN} for that column, not {text!r}")
