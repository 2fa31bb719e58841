"""Rows of a file of labels: what stands there of each image, before anything is looked up. The forms:

- a label a line in the images' natural order, several of an image with spaces between them: "3 17"
- a name, with or without folder and suffix, and its label a line, either first: "val/a.png 3"; "3,a"
- a table with a heading, such as filename,label (IMAGE_TITLES, LABEL_TITLES, TARGET_TITLES)
- the same as JSON lines; a JSON mapping of names to a label or a list of labels
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffattack.common.errors import note, one_line
from diffattack.data.classes import NUMBER, WORDNET_ID, composed
from diffattack.data.texts import read_text

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


def read_rows(path: Path, images: Sequence[Path]) -> list[Row]:
    """The rows of a file of labels.

    Raises:
        ValueError: there is no such file, or it is in none of the forms.
        csv.Error: it is no table.
    """
    text = read_text(path, FORMS)
    lines = [(k, line.strip()) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    before, heading = (lines[0][0] - 1, lines[0][1]) if lines else (0, "")
    if heading.startswith(("{", "[")):
        return rows_of_json(path, [line for _, line in lines])
    separator = next((sign for sign in "\t,;" if sign in heading), " ")
    titles = heading.split(separator)
    if len(titles) == 1 or not has_title(titles, IMAGE_TITLES + LABEL_TITLES):
        return rows_of_lines(path, lines, images)
    table = csv.DictReader(text.split("\n")[before:], delimiter=separator, skipinitialspace=True)
    rows = [(f"line {before + table.line_num}", row) for row in table]
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
    parts = text.split()
    are_several = any(all(re.fullmatch(kind, part) for part in parts) for kind in (NUMBER, WORDNET_ID))
    return parts if are_several else [text]


def rows_of_table(path: Path, titles: Sequence[str], rows: Iterable[tuple[str, dict]]) -> list[Row]:
    """Rows whose columns have titles, each with where it stands."""
    images = sorted(
        (title for title in titles if has_title([title], IMAGE_TITLES)),
        key=lambda title: IMAGE_TITLES.index(simple(title)),
    )
    labels = [title for title in titles if has_title([title], LABEL_TITLES)]
    targets = [title for title in titles if has_title([title], TARGET_TITLES)]
    if not images or len(labels) != 1:
        raise ValueError(
            f"{str(path)!r} has the columns {', '.join(map(str.strip, titles))}; expected one that names the "
            f"image (filename, image, ImageId, path) and one with its label (label, class, TrueLabel, wnid)"
        )
    return [
        Row(
            f"{where} of {str(path)!r}",
            str(row.get(images[0])),
            labels_of_cell(row.get(labels[0])),
            "".join(str(row.get(title) or "").strip() for title in targets[:1]),
        )
        for where, row in rows
    ]


def rows_of_json(path: Path, lines: Sequence[str]) -> list[Row]:
    """JSON lines of rows, or a mapping of names to labels."""
    are_documents = all(line[0] + line[-1] == "{}" for line in lines)
    try:
        documents = list(map(json.loads, lines if are_documents else ["\n".join(lines)]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON ({one_line(error)}); expected {FORMS}") from None
    first = documents[0]
    if isinstance(first, list) or {"images", "annotations"} <= set(first):
        kind = "JSON with a list" if isinstance(first, list) else "COCO's annotations"
        raise ValueError(f"{str(path)!r} is {kind}; expected {FORMS}")
    titles = list({title: None for document in documents for title in document})
    if has_title(titles, IMAGE_TITLES) or len(documents) > 1:
        return rows_of_table(path, titles, ((f"row {k}", row) for k, row in enumerate(documents, 1)))
    return [Row(f"{name!r} of {str(path)!r}", name, labels_of_cell(label)) for name, label in first.items()]


# ---------------------------------------------------------------- lines


def rows_of_lines(path: Path, lines: Sequence[tuple[int, str]], images: Sequence[Path]) -> list[Row]:
    """A line for each image, by itself or beside the image's name."""
    where = f"line {{}} of {str(path)!r}".format
    known = {known for image in images for known in (composed(image.name), composed(image.stem))}
    found = []
    for is_name_first in (True, False):
        pairs = [(k, split_line(line, known, is_name_first)) for k, line in lines]
        found.append([Row(where(k), pair[0], [pair[1]]) for k, pair in pairs if pair])
    named = max(found, key=lambda rows: len({row.name for row in rows}))
    are_named = len({row.name for row in named}) >= max(1, len(images) / 2)
    labels = [labels_of_cell(line) for _, line in lines]
    several = [parts for parts in labels if len(parts) > 1]
    if len(several) == len(lines) == len(images) and may_be_numbers(several, images, are_named):
        raise ValueError(
            f"{where(lines[0][0])}, {lines[0][1][:40]!r}, may be an image's number and its label, or two "
            f"labels; give a table with columns filename,label"
        )
    if are_named:
        return named
    if several:
        note(f"{len(several)} of {len(lines)} lines of {str(path)!r} give several labels")
    return [Row(where(k), None, parts) for (k, _), parts in zip(lines, labels)]


def may_be_numbers(several: Sequence[list[str]], images: Sequence[Path], are_named: bool) -> bool:
    """Whether the first of several labels may number the images: by their names, if these are few, by the
    numbers at their ends, or by counting up.
    """
    if are_named:
        return len(images) < FEW
    firsts = [int(float(parts[0])) for parts in several if re.fullmatch(NUMBER, parts[0])]
    ends = [int(match[0]) for image in images if (match := re.search(r"\d+$", image.stem))]
    is_rising = firsts == sorted(set(firsts)) and (firsts[:1] < [2] or len(firsts) >= FEW)
    return bool(firsts) and (is_rising or sorted(firsts) == sorted(ends))


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


def parts_of(path: str) -> list[str]:
    """The folders and the name of a path of any system; a folder `images` says nothing."""
    *folders, name = re.split(r"[/\\]", composed(path.strip()))
    return [*(part for part in folders if part.lower() not in ("", ".", "images")), name]


def without_suffix(name: str) -> str:
    return re.sub(r"\.[A-Za-z]\w*$", "", name)
