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
    few, many = Layout(source, len(configuration["images"])), Layout(target, images)
    there = sorted(few.finished())
    from_there = [there[k % len(there)] for k in range(images)]
    configuration |= {key: [configuration[key][j] for j in from_there] for key in ("labels", "targets")}
    files = [f"{k:0{len(str(images))}d}_{configuration['images'][j]}" for k, j in enumerate(from_there)]
    configuration["images"] = files
    for place in many.places:
        place.mkdir(parents=True)
    (target / "run.json").write_text(json.dumps(configuration, indent=2) + "\n")
    identity, records = npy(run_identity(target)), {j: common_part(few.record(j)) for j in there}
    for k, j in enumerate(from_there):
        start = few.file(j, "")
        for path in start.parent.glob(f"{start.name}*"):
            if "record" not in path.name:
                os.link(path, many.file(k, path.name.removeprefix(start.name)))
        shared, row = records[j]
        own = npy(json.dumps(change(k, row | {"index": k, "file": files[k]}))), identity
        many.record(k).write_bytes(shared)
        with zipfile.ZipFile(many.record(k), "a") as file:
            for name, content in zip(OWN, own):
                file.writestr(name, content)
    for path in (source / ANALYSIS).glob("[a-z]*.png"):
        (target / ANALYSIS).mkdir(exist_ok=True)
        os.link(path, target / ANALYSIS / path.name)
    if (source / "results.json").exists():
        results = json.loads((source / "results.json").read_text())
        results.pop("images", None)
        (target / "results.json").write_text(json.dumps(results, indent=2) + "\n")
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


def npy(text: str) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(text))
    return out.getvalue()
