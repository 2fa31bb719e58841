"""What of a run has been looked at and found whole: `checked.json` in its folder.

Starting again must find out what is missing, damaged or of a picture that has changed since. To read all that
takes minutes where images are thousands; a file whose size and time are those that it had when it was read
need not be read again. And where nothing at all has changed, the report is what it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from diffattack import ROOT
from diffattack.classifiers.identity import difference
from diffattack.classifiers.registry import REGISTRY, check_name
from diffattack.data.dataset import Item
from diffattack.data.images import replacing
from diffattack.data.layout import Layout
from diffattack.data.records import json_digest
from diffattack.evaluation.quality import measures_at_hand
from diffattack.options import Options

FILE = "checked.json"
OWN = ("record.npz", "originImage.png", "adv_image.png", "reconstruction.png")
REPORT = ("results.json", "log.txt")
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


def seen_of(classifier: str) -> str:
    """What can be seen of a classifier without loading it, by sizes and times of the files of its name; ""
    where that is not all of it: a user's code reads weights from wherever it likes, and a hub may have new
    ones of the same name. Of an embedded one nothing changes, unless its package does, which is not seen.
    """
    name = check_name(classifier)
    path = Path(name.removeprefix("hf:").removeprefix("timm:local-dir:"))
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    if not files:
        return name if name in REGISTRY else ""
    return json_digest([(str(file), stamp(file)) for file in files])


class Checked:
    """The images of a run whose files have been found whole, by how they were then; and the classifiers of
    its report, by what was seen of them and what they were.
    """

    def __init__(self, layout: Layout, masks: Mapping[int, Path], classifiers: Iterable[str] = ()):
        self.layout, self.masks = layout, masks
        self.images: dict[str, str] = {}
        self.report, self.identities = "", {}
        self.seen = {name: seen_of(name) for name in classifiers}  # before they are loaded
        try:
            saved = json.loads((layout.folder / FILE).read_text())
            self.images, self.report = dict(saved["images"]), str(saved["report"])
            self.identities = {name: (seen, known) for name, (seen, known) in saved["classifiers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
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

    def report_of(self, items: Sequence[Item], options: Options) -> str:
        """A digest of all that a report of these images says, but for what its classifiers are, and of the
        code that says it.
        """
        flags = {
            declared.name: str(getattr(options, declared.name))
            for declared in fields(options)
            if declared.name not in IDLE
        }
        code = max(
            path.stat().st_mtime_ns
            for kind in ("*.py", "diffattack/*/*.py", "diffattack/*/*.html")
            for path in ROOT.glob(kind)
        )
        return json_digest(
            [
                flags,
                code,
                sorted(measures_at_hand()),
                stamp(options.fid_reference),
                [self.images.get(str(item.index)) for item in items],
                [stamp(self.layout.failure(index)) for index in sorted(self.layout.failed())],
            ]
        )

    def is_reported(
        self, items: Sequence[Item], options: Options, identity_of: Callable[[str], dict]
    ) -> bool:
        """Whether the report in the folder is of these images and classifiers as they are now; a classifier
        is loaded, by `identity_of` its name, only where what can be seen of it is not all, or has changed.
        """
        files = REPORT if options.figures == "none" else (*REPORT, "report.html")
        return (
            all((self.layout.folder / name).is_file() for name in files)
            and self.report == self.report_of(items, options)
            and all(self.is_as_reported(name, identity_of) for name in self.seen)
        )

    def is_as_reported(self, name: str, identity_of: Callable[[str], dict]) -> bool:
        """Whether a classifier is what it was when the report was written."""
        seen, identity = self.identities.get(name, ("", None))
        if identity is None:
            return False
        return bool(seen and seen == self.seen[name]) or difference(identity, identity_of(name)) is None

    def write_reported(self, items: Sequence[Item], options: Options, identities: Mapping[str, dict]) -> None:
        """Keeps that the report in the folder is of these images, by classifiers with these identities."""
        self.report = self.report_of(items, options)
        self.identities = {name: (seen, identities.get(name)) for name, seen in self.seen.items()}
        content = {"report": self.report, "images": self.images, "classifiers": self.identities}
        with replacing(self.layout.folder / FILE) as temporary:
            temporary.write_text(json.dumps(content))
