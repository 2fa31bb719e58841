"""What a file of labels says of each image: its classes, and its target. The forms that are read:

- a label a line in the images' natural order, several of an image with spaces between them: "3 17"
- a name, with or without folder and suffix, and its label a line, either first: "val/a.png 3"; "3,a"
- a table with a heading, such as filename,label (IMAGE_TITLES, LABEL_TITLES, TARGET_TITLES)
- the same as JSON lines; a JSON mapping of names to a label or a list of labels

    labels, targets = read_labels(Path("labels.csv"), images, finder, root)   # [(3,), (17, 20)], [None, None]
"""

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
            rows = by_name or rows_of_images(rows, images, root)
        labels = [classes_of(row, finder) for row in rows]
        targets = [finder.label(row.target, row.where) if row.target else None for row in rows]
        if len(rows) != len(images):
            raise ValueError(f"has {len(rows)} labels but --images_root has {len(images)} images")
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{flag}: {one_line(error, 400)} ({str(path)!r}); what is read: {FORMS}") from None
    return labels, targets


def classes_of(row: Row, finder: ClassFinder) -> tuple[int, ...]:
    """The classes of a row, none of them twice nor all there are, as ones and zeros for each class give."""
    classes = tuple(finder.label(text, row.where) for text in row.labels)
    if len(set(classes)) < max(1, len(classes)) or len(classes) == len(finder.classes) > 1:
        shown = " ".join(row.labels)[:40]
        raise ValueError(f"{row.where} has no label, a class twice, or a number for each class: {shown!r}")
    return classes


# ---------------------------------------------------------------- forms


def read_rows(path: Path, images: Sequence[Path]) -> list[Row]:
    """The rows of a file; raises ValueError or csv.Error where it is in none of the forms."""
    lines = [(k, line) for k, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    texts = [line for _, line in lines]
    heading = texts[0].strip() if texts else ""
    if heading.startswith(("{", "[")):
        return rows_of_table([(f"row {k}", row) for k, row in enumerate(documents_of_json(texts), 1)])
    separator = next((sign for sign in "\t,;" if sign in heading), " ")
    titles = heading.split(separator)
    if len(titles) == 1 or not has_title(titles, IMAGE_TITLES + LABEL_TITLES):
        return rows_of_lines([(f"line {k}", line.strip()) for k, line in lines], images)
    table = csv.DictReader(texts, delimiter=separator, skipinitialspace=True)
    return rows_of_table([(f"line {lines[table.line_num - 1][0]}", row) for row in table])


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


def rows_of_table(rows: Sequence[tuple[str, dict]]) -> list[Row]:
    """Rows whose columns have titles, each with where it stands."""
    titles = list(dict.fromkeys(title for _, row in rows for title in row))
    images, labels, targets = (
        [title for known in titles_of for title in titles if simple(title) == known]
        for titles_of in (IMAGE_TITLES, LABEL_TITLES, TARGET_TITLES)
    )
    if not images or len(labels) != 1 or None in titles:  # where csv leaves cells beyond the last title
        shown = ", ".join(str(title or "one without a title").strip() for title in titles)
        raise ValueError(f"has the columns {shown}, not one of the image and one label")
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


def documents_of_json(lines: Sequence[str]) -> list[dict]:
    """JSON lines of rows, or a mapping of names to labels as if it were such."""
    are_rows = all(line.strip()[0] + line.strip()[-1] == "{}" for line in lines)
    documents = list(map(json.loads, lines if are_rows else ["\n".join(lines)]))
    first = documents[0]
    if isinstance(first, list) or {"images", "annotations"} <= set(first):
        raise ValueError(f"is {'a list' if isinstance(first, list) else 'of COCO annotations'} in JSON")
    if has_title(first, IMAGE_TITLES) or len(documents) > 1:
        return documents
    return [{"filename": name, "label": label} for name, label in first.items()]


def rows_of_lines(lines: Sequence[tuple[str, str]], images: Sequence[Path]) -> list[Row]:
    """A line for each image, by itself or beside the image's name."""
    known = {composed(name) for image in images for name in (image.name, image.stem)}
    either = (
        [
            Row(where, name, [label])
            for where, line in lines
            for name, label in split_line(line, known, is_first)
        ]
        for is_first in (True, False)
    )
    named = max(either, key=lambda rows: len({row.name for row in rows}))
    are_named = len({row.name for row in named}) >= max(1, len(images) / 2)
    rows = [Row(where, None, labels_of_cell(line)) for where, line in lines]
    several = [row.labels for row in rows if len(row.labels) > 1 and re.fullmatch(NUMBER, row.labels[0])]
    are_sure = len(several) < len(rows) or len(rows) != len(images) or (are_named and len(images) >= FEW)
    if not are_sure and number_images(several, images):
        raise ValueError(
            f"{rows[0].where} may be an image's number and its label, or two labels; give a table"
        )
    if several and not are_named:
        note(f"{len(several)} of {len(lines)} lines of the file of labels give several")
    return named if are_named else rows


def number_images(numbers: Sequence[list[str]], images: Sequence[Path]) -> bool:
    """Whether one of several numbers a line may be an image's: as the first counts up, or as names end."""
    columns = [[int(number.split(".")[0]) for number in column] for column in zip(*numbers)]
    ends = sorted(int(end) for image in images for end in re.findall(r"\d+$", image.stem))
    counts = [list(range(start, start + len(images))) for start in (0, 1)]
    return columns[0] in counts or any(sorted(column) == ends for column in columns)


def split_line(line: str, known: set[str], is_name_first: bool) -> Iterable[tuple[str, str]]:
    """The name of a line that names one of the `known` files, and its label. Either may have spaces or commas
    in it: the longest name at the beginning is taken, and the shortest at the end.
    """
    for cut in reversed(list(re.finditer(r"\s*,\s*|\s+", line))):
        left, right = (part.strip("\"'") for part in (line[: cut.start()], line[cut.end() :]))
        name, label = (left, right) if is_name_first else (right, left)
        file = composed(re.sub(r"^[^\s,]*[/\\]", "", name))
        if not known.isdisjoint((file, without_suffix(file))):
            return [(name, label)]
    return []


# ---------------------------------------------------------------- names


def parts_of(path: str) -> list[str]:
    """The folders and the name of a path of any system; a folder `images` says nothing."""
    *folders, name = re.split(r"[/\\]", composed(path.strip()))
    return [*(part for part in folders if part.lower() not in ("", ".", "images")), name]


def without_suffix(name: str) -> str:
    return re.sub(r"\.[A-Za-z]\w*$", "", name)


def rows_of_images(rows: Sequence[Row], images: Sequence[Path], root: Path) -> list[Row]:
    """The row of each image, by its name with or without suffix, or else by one of another suffix. Folders
    below the root must be the same, as far as a row has them, and so must the root's own, where rows name it.
    Raises ValueError where an image has no row or several, or a row several images.
    """
    above = parts_of(f"{root.resolve()}/")[-2:-1]
    is_named = any(parts_of(row.name)[-2:-1] == above for row in rows)
    paths = [parts_of(str(image.relative_to(root))) for image in images]
    depth = max(len(paths[0]), 1 + is_named)  # of names, in which folders above the root do not count
    by_path = defaultdict(list)
    for row in rows:
        *folders, name = parts_of(row.name)[-depth:]
        for each in {name, without_suffix(name)}:
            by_path[*folders, each].append(row)
    found, image_of = [], {}
    for image, path in zip(images, paths):
        (*folders, name), stem, shown = [*above, *path][-depth:], composed(image.stem), "/".join(path)
        tails = [(*folders[k:], each) for each in (name, stem) for k in range(depth)]
        near = next((by_path[tail] for tail in tails if tail in by_path), [])
        if not near:
            raise ValueError(f"has no row for {shown}")
        has_other_suffix = parts_of(near[0].name)[-1] not in (name, stem)
        remedy = "only suffixes differ" if has_other_suffix else "name images with their folder and suffix"
        if any(row[2:] != near[0][2:] for row in near):
            raise ValueError(f"{near[-1].where} gives {shown!r} another label than a line above; {remedy}")
        if (other := image_of.setdefault(near[0].where, shown)) != shown:
            raise ValueError(f"{near[0].where} may be of {other!r} or of {shown!r}; {remedy}")
        if has_other_suffix:
            note("the file of labels has other suffixes; images are found by the rest of their names")
        found.append(near[0])
    return found
