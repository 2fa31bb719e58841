"""Writes the page of a run of many images: report.html, and beside it a folder with all that it shows,
which is loaded as it is looked at. Both stay in the run's folder, whose pictures they show.

    report.html                         summary, figures, and a table of all images, from large_template.html
    report_files/columns.js             what the table shows, a column an array
    report_files/thumbnails/12/12345.webp    the clean and the adversarial picture, side by side
    report_files/details/0/246.js       what is shown of images 12,300 to 12,349 when one of them is opened

A run of any size takes the memory of the columns. What is up to date is kept: thumbnails that are younger
than their pictures, and details as long as the records that they were written from have not changed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from diffattack.common.progress import progress
from diffattack.common.workers import end_with_parent, interrupts_held, processes_for
from diffattack.data.answers import deciding, in_words
from diffattack.data.images import delete_abandoned, replacing
from diffattack.data.layout import Layout, index_of
from diffattack.data.records import ImageRecord, Run
from diffattack.data.shares import timestep_rows
from diffattack.evaluation.tables import MEASURES
from diffattack.plotting.charts import charts
from diffattack.plotting.pages import write_filled

FILES = "report_files"  # beside report.html: file managers take a folder of that name along with the page
EACH = 50  # images whose details are in one file
FOLDER_OF = 1_000  # files in one folder
THUMBNAIL, QUALITY = 72, 70  # pixels, and WebP quality
OUTCOMES = {True: 0, False: 1, None: 2}  # in the order of the page's names for them
ALONE_UP_TO = 20  # files of details that one process writes sooner than others are started


def row_shown(row: dict, models: Sequence[str]) -> dict:
    """What a record's row says of an image, of these classifiers alone; a row without quality knows PSNR."""
    predictions = row["predictions"]
    return row | {
        "predictions": {model: predictions[model] for model in models if model in predictions},
        "quality": row.get("quality", {"PSNR dB": finite(row["psnr"])}),
    }


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- the page


def write_large_page(run: Run, content: Mapping[str, object]) -> None:
    """Writes the page and its folder; `content` is what the template is filled in with besides the images.

    Raises:
        OSError: a picture is missing, or a file cannot be written.
        RecordError: a record cannot be used.
    """
    parts, columns = parts_of(run), Columns()
    write = partial(write_part, run.layout)
    with progress(total=len(run.records), desc="page", unit="image") as bar:
        for entries in shared_out(write, parts):
            for entry in entries:
                columns.add(entry)
            bar.update(len(entries))
    columns.write(run.folder / FILES / "columns.js")
    results = content["results"]
    write_filled(
        run.folder / "report.html",
        "large_template.html",
        **content,
        count=len(run.records),
        timestep_table=timestep_rows(run.pooled.structure, run.timesteps) if run.timesteps else None,
        files=FILES,
        told={  # to the script
            "models": [classifier["model"] for classifier in results.get("classifiers", ())],
            "nearer": {name: way for name, (way, _) in MEASURES.items()},
            "files": FILES,
            "each": EACH,
            "folder": FOLDER_OF,
        },
    )
    remove_others(run.folder / FILES, parts)


def files_of_large_page(folder: Path) -> list[Path]:
    """What lies beside the page, in the folder of a run."""
    kinds = (("thumbnails", "webp"), ("details", "js"))
    found = [path for kind, ending in kinds for path in (folder / FILES / kind).glob(f"*/*.{ending}")]
    own = [path for path in found if path.stem.isdecimal() and path.parent.name.isdecimal()]
    return own + [path for path in [folder / FILES / "columns.js"] if path.is_file()]


def remove_files_of_large_page(folder: Path) -> None:
    """Of a run that has become another, or a small one; what is not the page's stays."""
    for path in files_of_large_page(folder):
        path.unlink(missing_ok=True)
    files = folder / FILES
    for place in (*files.glob("*/*"), *files.glob("*"), files):
        if place.is_dir():
            delete_abandoned(place)
            if not any(place.iterdir()):
                place.rmdir()


def remove_others(files: Path, parts: Sequence[Part]) -> None:
    """Deletes what is there of images that are no longer part of the run, and what was half written."""
    kept = {
        "details": {f"{part.number}.js" for part in parts},
        "thumbnails": {f"{index_of(path)}.webp" for part in parts for path in part.paths},
    }
    delete_abandoned(files)
    for name, those in kept.items():
        for place in (files / name).iterdir():
            delete_abandoned(place)
            for path in place.iterdir():
                if re.fullmatch(r"\d+\.(js|webp)", path.name) and path.name not in those:
                    path.unlink()


def in_folders(folder: Path, number: int, ending: str) -> Path:
    return folder / str(number // FOLDER_OF) / f"{number}{ending}"


# ---------------------------------------------------------------- the details, and the thumbnails with them


@dataclass(frozen=True)
class Part:
    """Images whose details are in one file."""

    number: int  # of their indices over EACH
    paths: list[Path]  # of their records
    records: Sequence[ImageRecord]  # each read when it is asked for
    stamp: str  # of what the file is written from


def parts_of(run: Run) -> list[Part]:
    paths = getattr(run.records, "paths", None) or [record.path for record in run.records]
    code = hashlib.sha256()
    for name in ("large_page.py", "charts.py"):
        code.update((Path(__file__).parent / name).read_bytes())
    parts, start = [], 0
    for number, group in itertools.groupby(paths, lambda path: index_of(path) // EACH):
        mine = list(group)
        end = start + len(mine)
        parts.append(Part(number, mine, run.records[start:end], stamp_of(mine, code.digest())))
        start = end
    return parts


def stamp_of(records: Sequence[Path], code: bytes) -> str:
    """Another one where a record has been written again, or has come or gone."""
    digest = hashlib.sha256(code)
    for path in records:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()[:16]


def shared_out(write: Callable[[Part], list[dict]], parts: Sequence[Part]) -> Iterator[list[dict]]:
    """What `write` returns of each part, in order; of many, by several processes."""
    processes = processes_for(len(parts) // ALONE_UP_TO)
    if processes == 1:
        yield from map(write, parts)
        return
    pool = ProcessPoolExecutor(
        min(processes, 16), multiprocessing.get_context("spawn"), initializer=end_with_parent
    )
    try:
        waiting, left = [], iter(parts)
        with interrupts_held():  # submitting starts the processes
            waiting = [pool.submit(write, part) for part in itertools.islice(left, 2 * processes)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(write, part) for part in itertools.islice(left, 1)]
    finally:  # after Ctrl-C, no more than what is being written is waited for
        pool.shutdown(wait=True, cancel_futures=True)


def write_part(layout: Layout, part: Part) -> list[dict]:
    """Writes the thumbnails and the details of these images unless they are up to date, and returns what the
    table shows of them.
    """
    files = layout.folder / FILES
    for path in part.paths:
        index = index_of(path)
        write_thumbnail(layout, index, in_folders(files / "thumbnails", index, ".webp"))
    path = in_folders(files / "details", part.number, ".js")
    entries = read_details(path, part.stamp)
    if entries is None:
        entries = [describe(layout, record) for record in part.records]
        lines = ",\n".join(script_json(entry) for entry in entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(f"report.details({part.number}, [\n{lines}\n{foot_of(part.stamp)}\n")
    return [{key: value for key, value in entry.items() if key != "charts"} for entry in entries]


def foot_of(stamp: str) -> str:
    return f"], {script_json(stamp)});"


def read_details(path: Path, stamp: str) -> list[dict] | None:
    """What is in a file of details, None if it has another stamp or is not there."""
    try:
        head, *lines, foot = path.read_text().splitlines()
        if foot == foot_of(stamp):
            return [json.loads(line.rstrip(",")) for line in lines]
    except (OSError, ValueError):
        pass
    return None


def script_json(value: object) -> str:
    """JSON as a script may hold it, in ASCII and without what could end the script or a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_thumbnail(layout: Layout, index: int, path: Path) -> None:
    """Writes the clean and the adversarial picture side by side, unless what is there is younger."""
    pictures = [layout.file(index, f"{kind}.png") for kind in ("originImage", "adv_image")]
    try:
        if path.stat().st_mtime_ns > max(picture.stat().st_mtime_ns for picture in pictures):
            return
    except FileNotFoundError:
        pass
    both = Image.new("RGB", (2 * THUMBNAIL, THUMBNAIL))
    for k, picture in enumerate(pictures):
        with Image.open(picture) as file:
            small = file.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.LANCZOS, reducing_gap=3)
        both.paste(small, (k * THUMBNAIL, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        both.save(temporary, "WEBP", quality=QUALITY, method=2)


def describe(layout: Layout, record: ImageRecord) -> dict:
    """All that is shown of an image when it is opened, and what the table shows; what users named is a value
    everywhere, never a key, which would mean something to a script.
    """
    row = record.row
    shown = row_shown(row, list(row["predictions"]))
    picture = layout.file(record.index, "").relative_to(layout.folder).as_posix()
    return {
        "index": record.index,
        "file": row["file"],
        "class": row["class"],
        "target": row.get("target_class"),
        "outcome": OUTCOMES[row["success"]],
        "pictures": picture,
        "said": [said(row["before"]), said(row["after"])],
        "drop": finite(row["before"]["true_confidence"] - row["after"]["true_confidence"]),
        "predictions": [
            [model, *(said(of.get(kind)) for kind in ("before", "after", "reconstructed"))]
            for model, of in shown["predictions"].items()
        ],
        "quality": [[name, finite(value)] for name, value in shown["quality"].items()],
        "charts": charts(record),
    }


def said(prediction: dict | None) -> list | None:
    """The class that a classifier says, and how sure it is; of several classes all that there is to say,
    too.
    """
    if prediction is None:
        return None
    name, probability = deciding(prediction)
    return [name, finite(probability), *([in_words(prediction)] if "of_classes" in prediction else [])]


# ---------------------------------------------------------------- the table


class Columns:
    """What the table shows of all images, in as few bytes as it takes."""

    def __init__(self):
        self.file: list[str] = []
        self.classes: dict[str, int] = {}  # places by name
        self.integers = {name: array("l") for name in ("index", "outcome", "class", "before", "after")}
        self.numbers = {name: array("d") for name in ("before", "after", "drop")}
        self.measures: dict[str, array] = {}

    def add(self, entry: dict) -> None:
        """Adds an image, from what `describe` says of it."""
        (before, how_sure, *_), (after, how_sure_after, *_) = entry["said"]
        count = len(self.file)
        self.file.append(entry["file"])
        for name, value in (
            ("index", entry["index"]),
            ("outcome", entry["outcome"]),
            ("class", self.place_of(entry["class"])),
            ("before", self.place_of(before)),
            ("after", self.place_of(after)),
        ):
            self.integers[name].append(value)
        for name, value in (("before", how_sure), ("after", how_sure_after), ("drop", entry["drop"])):
            self.numbers[name].append(math.nan if value is None else value)
        for name, value in entry["quality"]:
            column = self.measures.setdefault(name, array("d"))
            column.extend([math.nan] * (count - len(column)))  # of images of which it was not measured
            column.append(math.inf if value is None else value)

    def place_of(self, name: str) -> int:
        return self.classes.setdefault(name, len(self.classes))

    def write(self, path: Path) -> None:
        """As a script that hands them to the page; numbers to five digits, which is more than it shows."""
        for column in self.measures.values():
            column.extend([math.nan] * (len(self.file) - len(column)))
        with replacing(path) as temporary, open(temporary, "w") as file:
            file.write(f'report.columns({{"classes":{script_json(list(self.classes))},\n')
            file.write(f'"file":{script_json(self.file)},\n"integers":{{')
            file.write(",\n".join(f'"{name}":[{joined(column)}]' for name, column in self.integers.items()))
            file.write('},\n"numbers":{')
            file.write(",\n".join(f'"{name}":[{joined(column)}]' for name, column in self.numbers.items()))
            file.write('},\n"measures":[')
            file.write(
                ",\n".join(
                    f"[{script_json(name)},[{joined(column)}]]" for name, column in self.measures.items()
                )
            )
            file.write("]});\n")


def joined(column: array) -> str:
    """Numbers as a script reads them, infinite and missing ones, too."""
    if column.typecode != "d":
        return ",".join(map(str, column))
    return ",".join(
        f"{value:.5g}" if math.isfinite(value) else "0/0" if math.isnan(value) else "1/0" for value in column
    )
