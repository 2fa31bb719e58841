"""Which row of a table is of which image, by the names that it gives them: with their folders or without,
with their suffix or without, on this machine or another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffattack.common.errors import DatasetError
from diffattack.data.classes import composed
from diffattack.data.label_rows import Row

Parts = tuple[str, ...]


def rows_of_images(path: Path, rows: Sequence[Row], images: Sequence[Path], root: Path) -> list[Row]:
    """The row of each image.

    Where rows name images of several folders, and those of the images are among these folders, a name in one
    folder is not that in another one. Else folders are those of another machine.

    Raises:
        DatasetError: an image has no row, or several that say different things.
    """
    named = [(parts_of(row.name or ""), row) for row in rows]
    by_name: dict[str, list[tuple[Parts, Row]]] = {}
    for parts, row in named:
        by_name.setdefault(parts[-1], []).append((parts[:-1], row))
    folders = {parts[:-1] for parts, _ in named}
    in_classes = images[0].parent != root
    places = {image.parent for image in images}
    folders_of = {place: tuple(map(composed, place.resolve().parts)) for place in places}
    root_name = composed(root.resolve().name)
    folders_tell = len(folders) > 1 and (
        in_classes or any(parts[-1] == root_name for parts in folders if parts)
    )
    found, missing = [], []
    for image in images:
        own = folders_of[image.parent]
        candidates = by_name.get(composed(image.name)) or by_name.get(composed(image.stem)) or []
        if folders_tell:
            candidates = [(parts, row) for parts, row in candidates if parts and parts[-1] == own[-1]]
        found.append(None if not candidates else the_nearest(path, image, own, candidates))
        if not candidates:
            missing.append(image)
    if missing:
        raise DatasetError(
            f"--label_path: {str(path)!r} has no row for {missing[0].relative_to(root)}"
            + (f" and {len(missing) - 1} more images" if len(missing) > 1 else "")
            + "; expected one an image"
        )
    check_apart(path, images, found, root)
    return found


def parts_of(name: str) -> Parts:
    """Of a path of any system."""
    parts = tuple(part for part in re.split(r"[/\\]", composed(name.strip())) if part not in ("", "."))
    return parts or ("",)


def in_common(one: Parts, other: Parts) -> int:
    """How many folders two paths share at their ends."""
    pairs = zip(reversed(one), reversed(other))
    return next((k for k, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def the_nearest(path: Path, image: Path, own: Parts, candidates: Sequence[tuple[Parts, Row]]) -> Row:
    """The row whose folders have most in common with the image's."""
    nearest = max(in_common(parts, own) for parts, _ in candidates)
    rows = [row for parts, row in candidates if in_common(parts, own) == nearest]
    different = next(
        (row for row in rows if (row.labels, row.target) != (rows[0].labels, rows[0].target)), None
    )
    if different:
        raise DatasetError(
            f"--label_path: line {different.line} of {str(path)!r} gives {image.name!r} another label than a "
            f"line above it, {rows[0].line}; its folders do not tell which is meant"
        )
    return rows[0]


def check_apart(path: Path, images: Sequence[Path], rows: Sequence[Row], root: Path) -> None:
    """Raises DatasetError where one row is taken for two images."""
    first: dict[int, Path] = {}
    for image, row in zip(images, rows):
        other = first.setdefault(row.line, image)
        if other != image:
            raise DatasetError(
                f"--label_path: line {row.line} of {str(path)!r} may be of {str(other.relative_to(root))!r} "
                f"or of {str(image.relative_to(root))!r}; name images with their folder and suffix"
            )
