"""The images of a run and their labels, from the files that data sets come with.

    images = read_dataset(Path("photos"), Path("labels.txt"), class_names)      # a list of Item

Labels: a text file with a line for each image in natural order, a number or several ("3 17"), or an image's
name or number and its label; a table with columns ImageId,TrueLabel (and TargetClass), as NIPS 2017's, or
filename,label, matched by name (label_rows.py has all the forms); or no file where the images lie in one
folder a class, have a metadata.csv beside them, or the WordNet ids of their classes in their names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from natsort import natsorted

from diffattack.common.errors import DatasetError, note
from diffattack.data.classes import WORDNET_ID, ClassFinder, wordnet_id_of
from diffattack.data.images import IMAGE_SUFFIXES, PICTURE_SUFFIXES
from diffattack.data.label_rows import IMAGE_TITLES, LABEL_TITLES, TARGET_COLUMN, TARGET_TITLES, simple
from diffattack.data.labels import Labels, check_target, numbered, numbers_of
from diffattack.data.texts import read_text


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
    "standford_car": Preset(
        logit_temperature=10.0, class_names="Stanford Cars' cars_meta.mat"
    ),  # spelt as the original tool does
}


NOT_OF_THE_USER = {".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX"}
METADATA = ("metadata.csv", "metadata.jsonl")  # as Hugging Face's imagefolder has them


def is_image(path: Path) -> bool:
    """Whether its name is one of an image, and it is no folder or pipe of that name. A link that leads
    nowhere is one: skipped, it would shift the labels of all that follow.
    """
    has_name = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return has_name and (path.is_file() or not path.exists())


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in natural order, or of the folders in it, one a class; says what it skips.

    Raises:
        DatasetError: there is no folder, no image in it, or a class of which no picture can be read.
    """
    if not folder.is_dir():
        raise DatasetError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images = natsorted(filter(is_image, folder.iterdir()), key=lambda path: path.name)
    folders = class_folders(folder)
    skipped = [path for path in folder.iterdir() if not path.is_dir() and not is_image(path)]
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
    deeper = next(filter(is_image, folder.glob("*/*/*")), None) if not images else None
    if deeper:
        raise DatasetError(
            f"--images_root: images of {str(folder)!r} lie deeper, as {str(deeper.relative_to(folder))!r}; "
            f"give --images_root {str(deeper.parents[1])!r}, with one folder a class"
        )
    if not images:
        raise DatasetError(
            f"--images_root: no image in {str(folder)!r}; expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}, or folders of them, one a class"
        )
    skipped = [path for path in skipped if path.name not in (*NOT_OF_THE_USER, *METADATA)]
    if skipped:
        names = sorted(path.name + ("/" if path.is_dir() else "") for path in skipped)
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        note(f"--images_root: {len(names)} entries of {str(folder)!r} are no images and skipped: {shown}")
    return images


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in NOT_OF_THE_USER


def class_folders(folder: Path) -> list[Path]:
    """In natural order."""
    return natsorted(
        (path for path in folder.iterdir() if path.is_dir() and not is_hidden(path)),
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
    label_path = label_path or metadata_of(folder)
    if label_path is None:
        labels = labels_of_names(folder, images, class_names) or labels_of_folders(
            folder, images, class_names, label_base
        )
        targets = [None] * len(images)
    else:
        labels, targets = Labels(label_path, class_names, label_base).of_images(images, folder)
    if target is None:
        targets = [None] * len(images)
    elif target != TARGET_COLUMN:
        targets = [check_target(target, class_names, label_base)] * len(images)
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


def metadata_of(folder: Path) -> Path | None:
    """The table of labels that lies in a folder of images, if one does."""
    for path in (folder / name for name in METADATA):
        if not path.is_file():
            continue
        try:
            title = read_text(path).lstrip().split("\n", 1)[0]
        except UnicodeDecodeError:
            continue
        titles = {simple(part) for part in re.split(r"[,;\t:{}]", title)}
        if titles & set(LABEL_TITLES) and titles & set(IMAGE_TITLES):  # it may hold other things than labels
            note(f"--images_root: labels are those of {path.name} in it")
            return path
    return None


def labels_of_names(
    folder: Path, images: Sequence[Path], class_names: Sequence[str]
) -> list[tuple[int, ...]] | None:
    """The classes of images that lie together and have WordNet ids in their names, as in ImageNet's training
    set; None where some have none.
    """
    ids = [re.findall(rf"(?<![A-Za-z0-9]){WORDNET_ID}(?!\d)", path.stem) for path in images]
    if images[0].parent != folder or any(len(set(found)) != 1 for found in ids):
        return None
    finder = ClassFinder(class_names)
    places = [finder.places(found[0]) for found in ids]
    if not all(places):
        return None
    note(f"--images_root: labels are the WordNet ids in the names of the images, such as {images[0].name}")
    return [tuple(found) for found in places]


def labels_of_folders(
    folder: Path, images: Sequence[Path], class_names: Sequence[str], base: int
) -> list[tuple[int, ...]]:
    """The class of the folder that each image lies in: the one of its name or WordNet id; or, where all are
    numbers, the label of that number; or else the folder's place among all of them in natural order, which is
    said.
    """
    if images[0].parent == folder:
        raise DatasetError(
            f"--label_path: the images lie in {str(folder)!r} itself; give a file of labels, or one folder "
            f"of images a class"
        )
    folders = [path.name for path in class_folders(folder)]
    finder = ClassFinder(class_names)
    found = {name: places_of_folder(name, finder, base) for name in folders}
    unknown = [name for name, places in found.items() if not places]
    if not unknown:
        numbers = {name: the_only(folder, name, places, finder, base) for name, places in found.items()}
    elif all(re.fullmatch(r"\d+", name) for name in folders):
        numbers = labels_of_numbers(folder, folders, class_names, base)
    elif len(folders) == len(class_names) and not (finder.classes.wordnet_ids and wordnet_id_of(unknown[0])):
        numbers = {name: k for k, name in enumerate(folders)}
        alike = {name: found[name] or finder.places(singular(name)) for name in folders}
        elsewhere = next((name for name, k in numbers.items() if alike[name] and k not in alike[name]), None)
        if elsewhere:
            raise DatasetError(
                f"--images_root: no class is called {unknown[0]!r}, as one of the folders of {str(folder)!r} "
                f"is, and {elsewhere!r} does not have the place of its class among them, so that they are "
                f"neither the names of the classes nor in their order; rename them, or give --label_path"
            )
        say_mapping("in natural order", numbers, class_names)
    else:
        kind = (
            "has the WordNet id" if finder.classes.wordnet_ids and wordnet_id_of(unknown[0]) else "is called"
        )
        raise DatasetError(
            f"--images_root: {str(folder)!r} has {len(folders)} folders but there are {len(class_names)} "
            f"classes, and no class {kind} {unknown[0]!r}; "
            "name the folders after the class names, have one for each class, or give --label_path"
        )
    return [(numbers[path.parent.name],) for path in images]


def singular(name: str) -> str:
    """A guess, by which a folder is found out to be at another place than its class."""
    return re.sub(r"(?<=[^s])s$", "", re.sub(r"ies$", "y", name))


def places_of_folder(name: str, finder: ClassFinder, base: int) -> list[int]:
    """The classes that a folder's name can mean; one that begins with a number, as CUB-200-2011's have the
    label before the name, must mean both.
    """
    places, match = finder.places(name), re.fullmatch(r"(\d+)[\W_]+(\D.*)", name)
    if places or not match:
        return places
    return [k for k in finder.places(match[2]) if int(match[1]) in (k + base, k + 1, k)]


def the_only(folder: Path, name: str, places: Sequence[int], finder: ClassFinder, base: int) -> int:
    """The class of a folder.

    Raises:
        DatasetError: its name may be that of several.
    """
    if len(places) > 1:
        raise DatasetError(
            f"--images_root: the folder {name!r} of {str(folder)!r} may be of "
            f"{finder.described(places, base)}; call it by its WordNet id, where there is one, or "
            f"exactly as the class, or give --label_path"
        )
    return places[0]


def labels_of_numbers(
    folder: Path, folders: Sequence[str], class_names: Sequence[str], base: int
) -> dict[str, int]:
    """Of folders that are called by numbers, the labels: they count from 0 where one is called 0, and else
    from `base`.
    """
    start = 0 if any(int(name) == 0 for name in folders) else base
    start, last = numbers_of(class_names, start)
    beyond = [name for name in folders if not start <= int(name) <= last]
    if beyond or len(set(map(int, folders))) < len(folders):
        raise DatasetError(
            f"--images_root: the folders of {str(folder)!r} are numbers, and "
            + (
                f"{beyond[0]!r} is none of the {len(class_names)} classes, which count from {start}"
                if beyond
                else "two are the same one"
            )
            + "; name them after the classes, or give --label_base or --label_path"
        )
    note(f"--images_root: the folders of {str(folder)!r} are labels that count from {start}")
    return {name: numbered(int(name), class_names, start) for name in folders}


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
    if simple(text) in TARGET_TITLES:
        return TARGET_COLUMN
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(
            f"expected a label, or {TARGET_COLUMN} for the column of that name, not {text!r}"
        )
    return int(text)
