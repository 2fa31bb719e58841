"""Rows of files of labels, in the forms in which data sets and tools write them: what stands there of each
image, before anything is looked up.

    rows = read_rows(Path("labels.csv"), images)        # a list of Row, all named or all in the images' order
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffattack.common.errors import DatasetError, note, one_line
from diffattack.data.classes import WORDNET_ID, composed
from diffattack.data.texts import read_text

TARGET_COLUMN = "TargetClass"
# of the columns of a table, in small letters without spaces and underscores
# The first that is there is taken: what names a file before what may be a number.
IMAGE_TITLES = ("filename", "imagename", "imagepath", "filepath", "filepaths", "file", "path", "image")
IMAGE_TITLES += ("imageindex", "imageid", "id")
LABEL_TITLES = (
    "truelabel",
    "label",
    "labels",
    "classid",
    "class",
    "classname",
    "wnid",
    "synset",
    "wordnetid",
    "labelname",
    "category",
    "categoryname",
)
LABEL_TITLES += ("findinglabels",)  # of ChestX-ray14
LABEL_TITLES += ("predictionstring",)  # of Kaggle's copy of ImageNet: WordNet ids, each with a box
NAME_TITLES = ("name", "species", "object")  # which may name a class beside its label
TARGET_TITLES = (TARGET_COLUMN.lower(), "targetlabel", "targetedlabel")
TITLES = {*IMAGE_TITLES, *LABEL_TITLES, *TARGET_TITLES}
FEW = 5  # lines, whose labels may look like the numbers of images by chance
INTEGER = r"[+-]?\d+(?:\.0+)?"  # pandas writes a column of integers with gaps as 3.0
# of a column that says of each image whether it shows a class
SHOWN, NOT_SHOWN = re.compile(r"1(\.0+)?|true|yes", re.I), re.compile(r"0(\.0+)?|false|no|", re.I)


@dataclass(frozen=True)
class Row:
    """What a file says of an image."""

    line: int
    name: str | None  # None where the images come in natural order
    labels: str
    target: str = ""
    others: tuple[str, ...] = ()  # what further columns say of its class
    unclear: str = ""  # of a column of a class, what is neither 1 nor 0


def read_rows(path: Path, images: Sequence[Path], is_class: Callable[[str], bool]) -> list[Row]:
    """The rows of a file of labels.

    Args:
        is_class: whether a name is that of a class, by which the columns of classes are known.
    Raises:
        DatasetError: there is no such file, or it is in none of the forms.
    """
    if not path.is_file():
        raise DatasetError(
            f"--label_path: there is no file {str(path)!r}; give a text file with one class number a line, "
            f"or a CSV"
        )
    if path.suffix.lower() == ".mat":
        return rows_of_cars(path)
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise DatasetError(
            f"--label_path: {str(path)!r} is no text file; give one class number a line"
        ) from None
    if path.suffix.lower() in (".json", ".jsonl"):
        return rows_of_json(path, text, is_class)
    lines = text.rstrip().split("\n") if text.strip() else []
    first = re.split(r"[,;\t\s]", lines[0]) if lines else []
    has_title = len(lines) > 1 and len({simple(cell) for cell in first} & TITLES) > 1
    if has_title or (path.suffix.lower() in (".csv", ".tsv") and not is_headless(lines)):
        return rows_of_table(path, text, is_class)
    if len(lines) == len(images) + 1 and is_heading(lines[0]) and not is_class(lines[0]):
        return [replace(row, line=row.line + 1) for row in rows_of_lines(path, lines[1:], images)]
    return rows_of_lines(path, lines, images)


def simple(title: str) -> str:
    """A column's title without what spellings differ in."""
    return re.sub(r"[\s_\"']", "", title).lower()


def is_heading(line: str) -> bool:
    """Whether the first line says what stands below it."""
    return simple(line) in LABEL_TITLES or line.startswith("#")


def is_headless(lines: Sequence[str]) -> bool:
    """Whether a table begins with an image and its label at once."""
    cells = re.split(r"[,;\t]", lines[0]) if lines else []
    return len(cells) == 1 or any(re.fullmatch(rf"\s*({INTEGER}|{WORDNET_ID})\s*", cell) for cell in cells)


# ---------------------------------------------------------------- tables


def rows_of_table(path: Path, text: str, is_class: Callable[[str], bool]) -> list[Row]:
    """A table with a title, separated by commas, semicolons, tabs or spaces."""
    text = re.sub(r"^\s*sep=.\s*\n", "", text)  # Excel's
    title = text.lstrip().split("\n", 1)[0]
    separator = max(",;\t", key=title.count) if re.search(r"[,;\t]", title) else " "
    table = csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=separator, skipinitialspace=True)
    return rows_of_dictionaries(path, table, table.fieldnames or [], lambda: table.line_num, is_class)


def rows_of_dictionaries(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    titles: Sequence[str],
    line: Callable[[], int],
    is_class: Callable[[str], bool],
) -> list[Row]:
    """Rows whose columns have titles, of which some are known."""
    columns: dict[str, str] = {}
    for k, title in enumerate(titles):
        known = columns.setdefault(simple(title or ""), title)
        if title in titles[:k] or (known != title and simple(title) in TITLES):
            raise DatasetError(
                f"--label_path: {str(path)!r} has two columns {title.strip()!r}; take one of them out"
            )
    images = [columns[title] for title in IMAGE_TITLES if title in columns]
    image = min(images, key=is_class, default=None)  # ImageNet has a class "file"
    labels = [columns[title] for title in LABEL_TITLES if title in columns]
    labels += [columns[title] for title in NAME_TITLES if title in columns and labels]
    target, *_ = [columns[title] for title in TARGET_TITLES if title in columns] or [None]
    if image and not labels:
        classes = [title for title in titles if title and title != image and is_class(title.strip())]
        if len(classes) > 1:
            left = [title.strip() for title in titles if title and title not in (image, *classes)]
            note(
                f"--label_path: {len(classes)} columns in {str(path)!r} are classes: 1 if an image shows it"
                + (f"; not {', '.join(left)[:80]}" if left else "")
            )
            return [row_of_classes(line(), row, image, classes) for row in rows]
    if not image or not labels:
        raise DatasetError(
            f"--label_path: {str(path)!r} has the columns {', '.join(map(str.strip, titles)) or 'none'}; "
            f"expected ImageId,TrueLabel or filename,label"
        )

    def cell(row: Mapping[str, object], title: str | None) -> str:
        value = row.get(title) if title else None
        if isinstance(value, list):
            return " ".join(map(str, value))
        return "" if value is None else str(value).strip()

    return [
        Row(
            line(),
            cell(row, image),
            cell(row, labels[0]),
            cell(row, target),
            tuple(cell(row, t) for t in labels[1:]),
        )
        for row in rows
        if any(value not in (None, "", []) for value in row.values())
    ]


def row_of_classes(line: int, row: Mapping[str, object], image: str, classes: Sequence[str]) -> Row:
    """A row with a column for each class, as tables of medical data and Kaggle's have them."""
    cells = {title: "" if row.get(title) is None else str(row[title]).strip() for title in classes}
    shown = [title.strip() for title, cell in cells.items() if SHOWN.fullmatch(cell)]
    unclear = next(
        (
            f"{cell[:20]} of {title.strip()!r}"
            for title, cell in cells.items()
            if not SHOWN.fullmatch(cell) and not NOT_SHOWN.fullmatch(cell)
        ),
        "",
    )
    return Row(line, str(row.get(image) or "").strip(), "|".join(shown), unclear=unclear)


def rows_of_json(path: Path, text: str, is_class: Callable[[str], bool]) -> list[Row]:
    """JSON lines of rows, a list of them, a mapping from names to labels, pairs of both in `labels`, or the
    annotations of COCO.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"--label_path: {str(path)!r} is no JSON ({error})") from None
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content):
        return rows_of_coco(path, content)
    if isinstance(content, dict) and isinstance(content.get("labels"), (list, dict)):
        content = content["labels"]
    if isinstance(content, dict):
        content = list(content.items())
    if content and isinstance(content, list) and all(isinstance(row, dict) for row in content):
        titles = list(dict.fromkeys(title for row in content for title in row))
        lines = iter(range(1, len(content) + 1))
        return rows_of_dictionaries(path, content, titles, lambda: next(lines), is_class)
    if not isinstance(content, list) or not all(
        isinstance(r, (list, tuple)) and len(r) == 2 for r in content
    ):
        raise DatasetError(
            f"--label_path: {str(path)!r} is JSON of another form; expected rows with file_name and label, "
            f"or a mapping from names to labels"
        )
    return [
        Row(k, str(name), " ".join(map(str, label)) if isinstance(label, list) else str(label))
        for k, (name, label) in enumerate(content, 1)
    ]


def rows_of_coco(path: Path, content: Mapping) -> list[Row]:
    """Of each image the names of the categories that are annotated in it, each once; their ids leave numbers
    out, so that they are no labels.
    """
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        shown: dict[object, dict[str, None]] = {image["id"]: {} for image in content["images"]}
        for annotation in content["annotations"]:
            shown[annotation["image_id"]][names[annotation["category_id"]]] = None
        return [
            Row(k, str(image["file_name"]), "|".join(shown[image["id"]]))
            for k, image in enumerate(content["images"], 1)
        ]
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"--label_path: {str(path)!r} is not as COCO's instances_val2017.json ({one_line(error, 40)} is "
            f"missing)"
        ) from None


def rows_of_cars(path: Path) -> list[Row]:
    """Stanford Cars' annotations: `fname` and `class` of each picture."""
    from scipy.io import loadmat

    try:
        annotations = loadmat(path, squeeze_me=True)["annotations"].reshape(-1)
        names, classes = annotations["fname"].tolist(), annotations["class"].tolist()
    # what scipy raises on files that are none of its own, and numpy on other contents
    except (ValueError, KeyError, TypeError, NotImplementedError, AttributeError, IndexError):
        raise DatasetError(
            f"--label_path: {str(path)!r} is not Stanford Cars' annotations with labels, such as "
            f"cars_test_annos_withlabels.mat"
        ) from None
    return [Row(k, str(name), str(label)) for k, (name, label) in enumerate(zip(names, classes), 1)]


# ---------------------------------------------------------------- lines


def rows_of_lines(path: Path, lines: Sequence[str], images: Sequence[Path]) -> list[Row]:
    """A line for each image, by itself or after the image's name or number."""
    cells = [re.split(r"[\s,;]+", line.strip(), maxsplit=1) for line in lines]
    if len(lines) > 0 and all(len(row) == 2 and re.fullmatch(r"\d+", row[0]) for row in cells):
        listed = names_in_list(path, [row[0] for row in cells])
        if listed:
            return [Row(k, name, row[1]) for k, (name, row) in enumerate(zip(listed, cells), 1)]
        counted = images_counted(path, cells, images)
        if counted:
            return check_single(
                path,
                [
                    Row(k, str(image), row[1])
                    for k, (image, row) in enumerate(zip(counted, cells), 1)
                    if image
                ],
            )
    numbered = {path.stem for path in images if path.stem.isdigit()}
    if cells and len(numbered) == len(images) and numbered <= {row[-1] for row in cells if len(row) == 2}:
        note(f"--label_path: the second column of {str(path)!r} is the image's name")
        return [Row(k, row[1], row[0]) for k, row in enumerate(cells, 1) if len(row) == 2]
    names = {*(composed(path.name) for path in images), *(composed(path.stem) for path in images)}
    for split in SPLITS:
        pairs = [split(line) for line in lines]
        found = {composed(last_part(pair[0])) for pair in pairs if pair} & names
        if None not in pairs and len(found) >= max(1, len(images) / 2) and not all(map(str.isdigit, found)):
            return check_single(path, [Row(k, name, labels) for k, (name, labels) in enumerate(pairs, 1)])
    several = [k for k, row in enumerate(cells) if len(row) > 1 and re.fullmatch(r"[\d\s,;]+", " ".join(row))]
    if several:
        note(
            f"--label_path: {len(several)} of {len(lines)} lines of {str(path)!r} give several labels, such "
            f"as line {several[0] + 1}: {lines[several[0]].strip()[:40]}"
        )
    return [Row(k, None, line) for k, line in enumerate(lines, 1)]


def split_labels(text: str) -> list[str]:
    """The labels of an image that stand in one text."""
    return re.split(r"[\s,;|]+", text.strip())


def check_single(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of lines that name an image.

    Raises:
        DatasetError: each has as many further numbers as the others, so that these may be labels, or a box, a
            size, a count, or a one for a class and zeros for the others.
    """
    parts = [split_labels(row.labels) for row in rows]
    are_numbers = [all(re.fullmatch(r"[+-]?\d+(\.\d+)?", part) for part in each) for each in parts]
    counts = {len(each) if numbers else 0 for each, numbers in zip(parts, are_numbers)}
    if len(counts) == 1 and counts != {0} and counts != {1}:
        raise DatasetError(
            f"--label_path: each line of {str(path)!r} has {counts.pop()} numbers after the image, such as "
            f"{rows[0].labels[:40]!r}, which may be labels, or a label and a box or a size; give a table "
            f"with columns filename,label, and several labels in one cell with spaces between"
        )
    if max(counts, default=0) > 1:
        several = next(row for row, each in zip(rows, parts) if len(each) > 1)
        note(f"--label_path: lines of {str(path)!r} give several labels, such as line {several.line}")
    return rows


def last_part(name: str) -> str:
    """A path's last part, whatever system the path is of."""
    return re.split(r"[/\\]", name.strip())[-1]


def splitting(pattern: str, name: int, labels: int) -> Callable[[str], tuple[str, str] | None]:
    """A function from a line to an image's name and its labels."""

    def split(line: str) -> tuple[str, str] | None:
        match = re.fullmatch(pattern, line.strip())
        return match and (match[name].strip().strip("\"'"), match[labels].strip())

    return split


# A name may have spaces or commas in it, and labels may be several or have spaces, too; and labels may come
# first. The shortest name is tried first, since the end of a path is a name as well.
AT_FIRST, AT_LAST, AT_FIRST_SPACE, AT_LAST_SPACE = (
    r"(.+?)[,;\t](.+)",
    r"(.+)[,;\t](.+)",
    r"(\S+)\s+(.+)",
    r"(.+)\s+(\S+)",
)
SPLITS = (
    *(splitting(pattern, 1, 2) for pattern in (AT_FIRST, AT_LAST, AT_FIRST_SPACE, AT_LAST_SPACE)),
    *(splitting(pattern, 2, 1) for pattern in (AT_LAST, AT_FIRST, AT_LAST_SPACE, AT_FIRST_SPACE)),
)


def names_in_list(path: Path, numbers: Sequence[str]) -> list[str] | None:
    """The names of numbered images, from the list that lies beside CUB-200-2011's image_class_labels.txt."""
    beside = path.parent / "images.txt"
    if path.name != "image_class_labels.txt" or not beside.is_file():
        return None
    names = dict(
        line.split(None, 1) for line in read_text(beside).split("\n") if len(line.split(None, 1)) == 2
    )
    missing = next((number for number in numbers if number not in names), None)
    if missing is not None:
        raise DatasetError(f"--label_path: {str(beside)!r} has no image {missing}, which {path.name} labels")
    note(f"--label_path: the images of {str(path)!r} have their names from images.txt beside it")
    return [names[number].strip() for number in numbers]


def images_counted(
    path: Path, cells: Sequence[Sequence[str]], images: Sequence[Path]
) -> list[Path | None] | None:
    """The images that the first column numbers, or None, a line each: by their names, by the numbers at the
    ends of their names, or by their place; None where it numbers none.

    Raises:
        DatasetError: it may be meant in two ways.
    """
    firsts = [row[0] for row in cells]
    numbers = [int(text) for text in firsts]
    only_numbers = all(re.fullmatch(rf"{INTEGER}([\s,;]+{INTEGER})*", row[1].strip()) for row in cells)
    stems = {image.stem: image for image in images}
    ends = {int(match[1]): image for image in images if (match := re.search(r"(\d+)\D*$", image.stem))}
    found = None
    if len(stems) == len(images) and set(stems) <= set(firsts) and len(set(firsts)) == len(firsts):
        found, by = [stems.get(text) for text in firsts], "its name"
    elif len(ends) == len(images) and set(ends) <= set(numbers) and len(set(numbers)) == len(numbers):
        found, by = [ends.get(number) for number in numbers], "the number in its name"
    in_order = [image for image in found or () if image is not None] == list(images)
    counts = numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))
    counts = counts and len(numbers) == len(images)
    if counts and found and not in_order:
        raise DatasetError(
            f"--label_path: the first column of {str(path)!r} counts the images, but in another order than "
            f"the numbers in their names; give a table with columns filename,label"
        )
    if not counts and not found:
        return None
    by_chance = len(numbers) == 1 or (not counts and not in_order and len(numbers) < FEW)
    if only_numbers and by_chance and not (found and by == "its name"):
        raise DatasetError(
            f"--label_path: line 1 of {str(path)!r}, {' '.join(cells[0])[:40]!r}, may be an image's number "
            f"and its label, or two labels; give a table with columns filename,label"
        )
    note(
        f"--label_path: the first column of {str(path)!r} is the image's number, by "
        f"{by if found else 'its place in natural order'}; for several labels an image give a table with "
        f"columns filename,label"
    )
    return found if found else list(images)
