"""What a file of labels says of each image: its classes, and its target. The forms that are read:

- a label a line in the images' natural order, several of an image with spaces between them: "3 17"
- a name, with or without folder and suffix, and its label a line, either first: "val/a.png 3"; "3,a"
- a table with a heading, such as filename,label (IMAGE_TITLES, LABEL_TITLES, TARGET_TITLES)
- the same as JSON lines; a JSON mapping of names to a label or a list of labels

    labels, targets = read_labels(Path("labels.csv"), images, finder, root)   # [(3,), (17, 20)], [None, None]
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from natsort import natsorted

from diffattack.common.errors import InputError, note, one_line
from diffattack.data.classes import NUMBER, WORDNET_ID, ClassFinder, composed, read_text

FORMS = (
    "a label a line in the order of the images, a name and its label a line, a table with columns "
    "filename,label, the same as JSON lines, or a JSON mapping of names to labels"
)
# as `simple` writes them; of several columns that name the image, the first here is taken
IMAGE_TITLES = ("filename", "path", "image", "imageid")
LABEL_TITLES = ("label", "truelabel", "class", "wnid")
TARGET_COLUMN = "TargetClass"
TARGET_TITLES = ("targetclass", "targetedlabel")  # the second is TransferAttack's
FEW = 5  # images, whose labels may be the numbers of images by chance


class Row(NamedTuple):
    """What a file says of an image."""

    where: str
    name: str | None  # None where the images come in natural order
    labels: list[str]
    target: str = ""


def read_labels(
    path: Path, images: Sequence[Path], finder: ClassFinder, root: Path | None, flag: str = "--label_path"
) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """The classes of each image, and its target or None.

    Args:
        root: the folder of images, by whose names rows are found; None where the images have other names than
            in the file, and are all that it names, in natural order.
        flag: what named the file.
    Raises:
        InputError: something does not fit.
    """
    try:
        rows = read_rows(path, images)
        if any(row.name is not None for row in rows):
            by_name = natsorted(rows, key=lambda row: parts_of(row.name)) if root is None else ()
            rows = by_name or rows_of_images(path, rows, images, root)
        labels = [classes_of(row, row.labels, finder) for row in rows]
        targets = [classes_of(row, [row.target], finder)[0] if row.target else None for row in rows]
        if labels and all(len(classes) == len(finder.classes) > 1 for classes in labels):
            raise ValueError(f"{str(path)!r} has a number for each class; expected {FORMS}")
        if len(labels) != len(images):
            counts = f"{len(labels)} labels but --images_root has {len(images)} images"
            raise ValueError(f"{str(path)!r} has {counts}; expected one an image")
    except (ValueError, csv.Error) as error:
        raise InputError(f"{flag}: {error}") from None
    return labels, targets


def classes_of(row: Row, labels: Sequence[str], finder: ClassFinder) -> tuple[int, ...]:
    """The classes of a row, of which none may be there twice, as ones and zeros are."""
    try:
        classes = tuple(map(finder.label, labels))
    except ValueError as error:
        columns = f", in {FORMS}" if re.search(r"[,;]|\d\s|\s\d", " ".join(labels)) else ""
        raise ValueError(f"{row.where} {error}{columns}") from None
    if len(set(classes)) < max(1, len(classes)):
        problem = f"has a class twice, {' '.join(labels)[:40]!r}" if classes else "has no label"
        raise ValueError(f"{row.where} {problem}")
    return classes


# ---------------------------------------------------------------- forms


def read_rows(path: Path, images: Sequence[Path]) -> list[Row]:
    """The rows of a file; raises ValueError or csv.Error where it is in none of the forms."""
    text = read_text(path, FORMS)
    lines = [(k, line.strip()) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    before, heading = (lines[0][0] - 1, lines[0][1]) if lines else (0, "")
    if heading.startswith(("{", "[")):
        rows = documents_of_json(path, [line for _, line in lines])
        titles = list(dict.fromkeys(title for row in rows for title in row))
        return rows_of_table(
            path, titles, [(f"row {k} of {str(path)!r}", row) for k, row in enumerate(rows, 1)]
        )
    separator = next((sign for sign in "\t,;" if sign in heading), " ")
    titles = heading.split(separator)
    if len(titles) == 1 or not has_title(titles, IMAGE_TITLES + LABEL_TITLES):
        return rows_of_lines(path, lines, images)
    table = csv.DictReader(text.split("\n")[before:], delimiter=separator, skipinitialspace=True)
    rows = [(f"line {before + table.line_num} of {str(path)!r}", row) for row in table]
    return rows_of_table(path, table.fieldnames, rows)


def simple(title: object) -> str:
    """A column's title without what spellings differ in."""
    return re.sub(r"[\s_\"']", "", str(title)).lower()


def has_title(titles: Iterable[object], known: Collection[str]) -> bool:
    return any(simple(title) in known for title in titles)


def labels_of_cell(cell: object) -> list[str]:
    """The labels of a cell: several numbers or WordNet ids, or one of any kind."""
    if isinstance(cell, list):
        return list(map(str, cell))
    text = "" if cell is None else str(cell).strip()
    several = re.fullmatch(rf"({NUMBER}\s+)+{NUMBER}|({WORDNET_ID}\s+)+{WORDNET_ID}", text)
    return text.split() if several or not text else [text]


def rows_of_table(path: Path, titles: Sequence[str], rows: Sequence[tuple[str, dict]]) -> list[Row]:
    """Rows whose columns have titles, each with where it stands."""
    images, labels, targets = (
        [title for known in titles_of for title in titles if simple(title) == known]
        for titles_of in (IMAGE_TITLES, LABEL_TITLES, TARGET_TITLES)
    )
    if not images or len(labels) != 1 or any(None in row for _, row in rows):
        expected = f"one of the image, one label, and no cell without a title, in {FORMS}"
        shown = ", ".join(map(str.strip, titles))
        raise ValueError(f"{str(path)!r} has the columns {shown}; expected {expected}")
    target = targets[0] if targets else None
    return [
        Row(
            where,
            str(row.get(images[0])),
            labels_of_cell(row.get(labels[0])),
            str(row.get(target) or "").strip(),
        )
        for where, row in rows
    ]


def documents_of_json(path: Path, lines: Sequence[str]) -> list[dict]:
    """JSON lines of rows, or a mapping of names to labels as if it were such."""
    are_rows = all(line[0] + line[-1] == "{}" for line in lines)
    try:
        documents = list(map(json.loads, lines if are_rows else ["\n".join(lines)]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON ({one_line(error)}); expected {FORMS}") from None
    first = documents[0]
    if isinstance(first, list) or {"images", "annotations"} <= set(first):
        kind = "JSON with a list" if isinstance(first, list) else "COCO's annotations"
        raise ValueError(f"{str(path)!r} is {kind}; expected {FORMS}")
    if has_title(first, IMAGE_TITLES) or len(documents) > 1:
        return documents
    return [{"filename": name, "label": label} for name, label in first.items()]


def rows_of_lines(path: Path, lines: Sequence[tuple[int, str]], images: Sequence[Path]) -> list[Row]:
    """A line for each image, by itself or beside the image's name."""
    where, known = f"line {{}} of {str(path)!r}".format, set()
    known.update(composed(name) for image in images for name in (image.name, image.stem))
    named: list[Row] = []
    for is_name_first in (True, False):
        pairs = [(k, split_line(line, known, is_name_first)) for k, line in lines]
        rows = [Row(where(k), pair[0], [pair[1]]) for k, pair in pairs if pair]
        named = max(named, rows, key=lambda some: len({row.name for row in some}))
    are_named = len({row.name for row in named}) >= max(1, len(images) / 2)
    rows = [Row(where(k), None, labels_of_cell(line)) for k, line in lines]
    numbers = [row.labels for row in rows if len(row.labels) > 1 and re.fullmatch(NUMBER, row.labels[0])]
    are_sure = len(numbers) < len(rows) or len(rows) != len(images) or (are_named and len(images) >= FEW)
    if not are_sure and number_images(numbers, images):
        raise ValueError(
            f"{rows[0].where}, {lines[0][1][:40]!r}, may be an image's number and its label, or two "
            f"labels; give a table with columns filename,label"
        )
    if numbers and not are_named:
        note(f"{len(numbers)} of {len(lines)} lines of {str(path)!r} give several labels")
    return named if are_named else rows


def number_images(numbers: Sequence[list[str]], images: Sequence[Path]) -> bool:
    """Whether one of several numbers a line may be an image's: as the first counts up, or as names end."""
    columns = [[int(number.split(".")[0]) for number in column] for column in zip(*numbers)]
    ends = sorted(int(end) for image in images for end in re.findall(r"\d+$", image.stem))
    counts = [list(range(start, start + len(images))) for start in (0, 1)]
    return columns[0] in counts or any(sorted(column) == ends for column in columns)


def split_line(line: str, known: set[str], is_name_first: bool) -> tuple[str, str] | None:
    """The name of a line that names one of the `known` files, and its label. Either may have spaces or commas
    in it: the longest name at the beginning is taken, and the shortest at the end.
    """
    for cut in reversed(list(re.finditer(r"\s*,\s*|\s+", line))):
        left, right = (part.strip("\"'") for part in (line[: cut.start()], line[cut.end() :]))
        name, label = (left, right) if is_name_first else (right, left)
        file = composed(re.sub(r"^[^\s,]*[/\\]", "", name))
        if not known.isdisjoint((file, without_suffix(file))):
            return name, label
    return None


# ---------------------------------------------------------------- names


def parts_of(path: str) -> list[str]:
    """The folders and the name of a path of any system; a folder `images` says nothing."""
    *folders, name = re.split(r"[/\\]", composed(path.strip()))
    return [*(part for part in folders if part.lower() not in ("", ".", "images")), name]


def without_suffix(name: str) -> str:
    return re.sub(r"\.[A-Za-z]\w*$", "", name)


def rows_of_images(path: Path, rows: Sequence[Row], images: Sequence[Path], root: Path) -> list[Row]:
    """The row of each image, by its name with or without suffix, or else by one of another suffix: the one
    whose folders have most in common with the image's. Those below the root must be the same, as far as the
    row has them. Raises ValueError where an image has no row or several, or a row several images.
    """
    by_name, by_stem = defaultdict(list), defaultdict(list)  # from the last parts of a path, of any number
    for row in rows:
        *folders, name = parts_of(row.name)
        for k in range(len(folders) + 1):
            by_name[*folders[k:], name].append(row)
            by_stem[*folders[k:], without_suffix(name)].append(row)
    above = parts_of(f"{root.resolve()}/")[:-1]
    is_named = any(parts_of(row.name)[-2:-1] == above[-1:] for row in rows)
    found, image_of, missing = [], {}, []
    for image in images:
        shown = str(image.relative_to(root))
        *inner, name = parts_of(shown)
        stem, folders, needed = composed(image.stem), above + inner, max(len(inner), is_named)
        index = by_name if (name,) in by_name or (stem,) in by_name else by_stem
        key = name if (name,) in by_name else stem
        end = next((end for k in range(len(folders) + 1) if (end := (*folders[k:], key)) in index), ())
        near = [row for row in index.get(end, ()) if min(len(parts_of(row.name)) - 1, needed) < len(end)]
        if not near:
            missing.append(shown)
            continue
        remedy = "only suffixes differ" if index is by_stem else "name images with their folder and suffix"
        if any(row[2:] != near[0][2:] for row in near):
            problem = f"gives {shown!r} another label than a line above"
            raise ValueError(f"{near[-1].where} {problem}; {remedy}")
        if (other := image_of.setdefault(near[0].where, shown)) != shown:
            raise ValueError(f"{near[0].where} may be of {other!r} or of {shown!r}; {remedy}")
        if index is by_stem:
            note(f"{str(path)!r} has images with other suffixes; they are found by the rest of their names")
        found.append(near[0])
    if missing:
        more = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
        wanted = "" if found else f"; expected {FORMS}"
        raise ValueError(f"{str(path)!r} has no row for {missing[0]}{more}{wanted}")
    return found
