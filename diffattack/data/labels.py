"""What a file of labels means: the classes of each image, and its target.

    labels, targets = read_labels(Path("labels.csv"), images, finder, root)   # [(3,), (17, 20)], [None, None]

`label_rows.py` says in which forms files come; `classes.py` what a label can be.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from natsort import natsorted

from diffattack.common.errors import DatasetError, note
from diffattack.data.classes import ClassFinder, composed
from diffattack.data.label_rows import FORMS, Row, parts_of, read_rows, without_suffix


def read_labels(
    path: Path,
    images: Sequence[Path],
    finder: ClassFinder,
    root: Path | None = None,
    flag: str = "--label_path",
) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """The classes of each image, and its target or None.

    Args:
        root: the folder of images, by whose names rows are found; None where the images have other names than
            in the file, and are all that it names, in natural order.
        flag: what named the file.
    Raises:
        DatasetError: something does not fit.
    """
    try:
        rows = read_rows(path, images)
        if root is not None and any(row.name is not None for row in rows):
            rows = rows_of_images(path, rows, images, root)
        elif any(row.name is not None for row in rows):
            note(f"the rows of {str(path)!r} are taken in the natural order of their names")
            rows = natsorted(rows, key=lambda row: parts_of(row.name))
        labels = [classes_of(row, row.labels, finder) for row in rows]
        targets = [classes_of(row, [row.target], finder)[0] if row.target else None for row in rows]
    except (ValueError, csv.Error) as error:
        raise DatasetError(f"{flag}: {error}") from None
    if len(labels) != len(images):
        raise DatasetError(
            f"{flag}: {str(path)!r} has {len(rows)} labels but --images_root has {len(images)} images; "
            f"expected one label an image"
        )
    if all(len(classes) == len(finder.classes) > 1 for classes in labels):
        raise DatasetError(f"{flag}: {str(path)!r} has a number for each class; expected {FORMS}")
    return labels, targets


def classes_of(row: Row, labels: Sequence[str], finder: ClassFinder) -> tuple[int, ...]:
    """The classes of a row, of which none may be there twice, as ones and zeros are."""
    try:
        classes = tuple(map(finder.label, labels))
    except ValueError as error:
        # which may be further columns
        wanted = f", in {FORMS}" if re.search(r"[,;]|\d\s|\s\d", " ".join(labels)) else ""
        raise ValueError(f"{row.where} {error}{wanted}") from None
    if not classes or len(set(classes)) < len(classes):
        what = f"has a class twice, {' '.join(labels)[:40]!r}" if classes else "has no label"
        raise ValueError(f"{row.where} {what}; give it each of its classes once, or leave the image out")
    return classes


def rows_of_images(path: Path, rows: Sequence[Row], images: Sequence[Path], root: Path) -> list[Row]:
    """The row of each image, by its name with or without suffix, or else by one of another suffix: the one
    whose folders have most in common with the image's. Those below the root must be the same, as far as the
    row has them.

    Raises:
        ValueError: an image has no row or several that say different things, or a row several images.
    """
    by_name, by_stem = defaultdict(list), defaultdict(list)  # from the last parts of a path, of any number
    for row in rows:
        *folders, name = parts_of(row.name)
        for k in range(len(folders) + 1):
            by_name[*folders[k:], name].append(row)
            by_stem[*folders[k:], without_suffix(name)].append(row)
    above = parts_of(f"{root.resolve()}/")[:-1]
    is_named = any(parts_of(row.name)[-2:-1] == above[-1:] for row in rows)
    found: dict[Path, Row] = {}
    image_of: dict[str, Path] = {}
    for image in images:
        *inner, name = parts_of(str(image.relative_to(root)))
        stem, folders, needed = composed(image.stem), above + inner, max(len(inner), is_named)
        index = by_name if (name,) in by_name or (stem,) in by_name else by_stem
        key = name if (name,) in by_name else stem
        end = next((end for k in range(len(folders) + 1) if (end := (*folders[k:], key)) in index), ())
        near = [row for row in index.get(end, ()) if min(len(parts_of(row.name)) - 1, needed) < len(end)]
        if not near:
            continue
        found[image], other = near[0], image_of.setdefault(near[0].where, image)
        remedy = "only suffixes differ" if index is by_stem else "name images with their folder and suffix"
        if other != image:
            one, two = (str(path.relative_to(root)) for path in (other, image))
            raise ValueError(f"{near[0].where} may be of {one!r} or of {two!r}; {remedy}")
        if any(row[2:] != near[0][2:] for row in near):
            raise ValueError(f"{near[-1].where} gives {name!r} another label than a line above; {remedy}")
        if index is by_stem:
            note(f"{str(path)!r} has images with other suffixes; they are found by the rest of their names")
    missing = [str(image.relative_to(root)) for image in images if image not in found]
    if missing:
        more = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
        wanted = f"; expected {FORMS}" if not found else ""
        raise ValueError(f"{str(path)!r} has no row for {missing[0]}{more}{wanted}")
    return [found[image] for image in images]
