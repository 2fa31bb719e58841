"""What of a run has been looked at and found whole: `checked.json` in its folder.

Starting again must find out what is missing, damaged or of a picture that has changed since. To read all that
takes minutes where images are thousands; a file whose size and time are those that it had when it was read
need not be read again. And where nothing at all has changed, the report is what it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from data.dataset import Item
from data.images import replacing
from data.layout import Layout
from data.records import json_digest
from evaluation.by_image import Asked
from options import Options

FILE = "checked.json"
OWN = ("record.npz", "originImage.png", "adv_image.png", "reconstruction.png")
REPORT = ("results.json", "log.txt")
CODE = Path(__file__).parent.parent
# flags that change nothing in a report
IDLE = ("device", "batch_size", "processes", "compile", "shard", "overwrite", "check")


def stamp(path: Path | None) -> tuple[int, int] | None:
    """Size and time of a file; None where it is not there."""
    if path is None:
        return None
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


class Checked:
    """The images of a run whose files have been found whole, by how they were then."""

    def __init__(self, layout: Layout, masks: Mapping[int, Path]):
        self.layout, self.masks = layout, masks
        self.images: dict[str, str] = {}
        self.report = ""
        try:
            saved = json.loads((layout.folder / FILE).read_text())
            self.images, self.report = dict(saved["images"]), str(saved["report"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it only spares time

    def stamps(self, item: Item) -> list[tuple[int, int] | None]:
        """Of an image's own files, and of what they were made from."""
        own = [stamp(self.layout.file(item.index, name)) for name in OWN]
        return [*own, stamp(item.path), stamp(self.masks.get(item.index))]

    def has(self, item: Item) -> bool:
        """Whether the image's files are as they were when they were found whole."""
        known = self.images.get(str(item.index))
        return known is not None and known == json_digest(self.stamps(item))

    def add(self, item: Item) -> None:
        self.images[str(item.index)] = json_digest(self.stamps(item))

    def add_finished(self, items: Iterable[Item]) -> None:
        """Adds images that this run has finished: their record, which is written last, is younger than all
        that it depends on. Others are looked at the next time.
        """
        for item in items:
            record, *others = self.stamps(item)
            if record and all(other is None or other[1] <= record[1] for other in others):
                self.add(item)
            else:
                self.images.pop(str(item.index), None)

    def report_of(self, items: Sequence[Item], options: Options, asked: Asked) -> str:
        """A digest of all that a report of these images says, and of the code that says it."""
        flags = {
            declared.name: str(getattr(options, declared.name))
            for declared in fields(options)
            if declared.name not in IDLE
        }
        code = max(
            path.stat().st_mtime_ns for kind in ("*.py", "*/*.py", "*/*.html") for path in CODE.glob(kind)
        )
        return json_digest(
            [
                flags,
                code,
                sorted(asked.digests.items()),
                sorted(asked.measures),
                stamp(options.fid_reference),
                [self.images.get(str(item.index)) for item in items],
                [stamp(self.layout.failure(index)) for index in sorted(self.layout.failed())],
            ]
        )

    def is_reported(self, items: Sequence[Item], options: Options, asked: Asked) -> bool:
        """Whether the report in the folder is of these images as they are now."""
        files = REPORT if options.figures == "none" else (*REPORT, "report.html")
        return all((self.layout.folder / name).is_file() for name in files) and self.report == self.report_of(
            items, options, asked
        )

    def write(self) -> None:
        with replacing(self.layout.folder / FILE) as temporary:
            temporary.write_text(json.dumps({"report": self.report, "images": self.images}))
