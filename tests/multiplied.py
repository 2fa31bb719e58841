"""Runs of any size, from a finished one of a few images: what is measured of many images, and the pages
of runs that nobody would wait for in a test.

    multiply(Path("output_fixed"), Path("output_many"), 50_000)

Each image is a copy of one of the source's, in turn: pictures are hard links, records differ in their row.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS, read_configuration, run_identity

OWN = ("row.npy", "run.npy")  # what the copies of a record do not share


def multiply(
    source: Path,
    target: Path,
    images: int,
    change: Callable[[int, dict], dict] = lambda k, row: row,
    settings: dict | None = None,
) -> Path:
    """Writes a run of so many images into `target`, with the pooled figures of the source and its
    results.json, which has no "images" then; returns `target`.

    Args:
        change: what becomes of the row of the k-th image.
        settings: other values for run.json.
    """
    configuration = read_configuration(source) | (settings or {})
    few = Layout(source, len(configuration["images"]))
    there = sorted(few.finished())
    from_there = [there[k % len(there)] for k in range(images)]
    many = Layout(target, images)
    configuration |= {key: [configuration[key][j] for j in from_there] for key in ("labels", "targets")}
    configuration["images"] = [
        f"{k:0{len(str(images))}d}_{configuration['images'][j]}" for k, j in enumerate(from_there)
    ]
    for place in many.places:
        place.mkdir(parents=True)
    (target / "run.json").write_text(json.dumps(configuration, indent=2) + "\n")
    identity = npy(run_identity(target))
    sources = {j: (*common_part(few.record(j)), pictures_of(few, j)) for j in there}
    for k, j in enumerate(from_there):
        shared, row, pictures = sources[j]
        for name, path in pictures:
            os.link(path, many.file(k, name))
        row = row | {"index": k, "file": configuration["images"][k]}
        many.record(k).write_bytes(with_own(shared, npy(json.dumps(change(k, row))), identity))
    copy_results(source, target)
    return target


def common_part(record: Path) -> tuple[bytes, dict]:
    """A record without what its copies do not share, as a file; and its row."""
    out = io.BytesIO()
    with zipfile.ZipFile(record) as saved, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as kept:
        for name in saved.namelist():
            if name not in OWN:
                kept.writestr(name, saved.read(name))
        row = json.loads(str(np.load(io.BytesIO(saved.read("row.npy")))))
    return out.getvalue(), row


def pictures_of(layout: Layout, index: int) -> list[tuple[str, Path]]:
    """The names of an image's files but for its record, without its index, and the files."""
    start = layout.file(index, "").name
    paths = sorted(
        path for path in layout.file(index, "").parent.glob(f"{start}*") if "record" not in path.name
    )
    return [(path.name.removeprefix(start), path) for path in paths]


def with_own(shared: bytes, row: bytes, identity: bytes) -> bytes:
    out = io.BytesIO()
    out.write(shared)
    with zipfile.ZipFile(out, "a") as file:
        for name, content in zip(OWN, (row, identity)):
            file.writestr(name, content)
    return out.getvalue()


def npy(text: str) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(text))
    return out.getvalue()


def copy_results(source: Path, target: Path) -> None:
    for path in (source / ANALYSIS).glob("[a-z]*.png"):
        (target / ANALYSIS).mkdir(exist_ok=True)
        os.link(path, target / ANALYSIS / path.name)
    if (source / "results.json").exists():
        results = json.loads((source / "results.json").read_text())
        results.pop("images", None)
        (target / "results.json").write_text(json.dumps(results, indent=2) + "\n")
