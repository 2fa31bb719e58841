"""Where the files of a run's images lie: beside each other in its folder, or, of more than 10,000 images, in
subfolders of 1,000, since no tool likes a folder of half a million files.

    layout = Layout(Path("output"), images=50_000)
    layout.file(12_345, "adv_image.png")        # output/12000/12345_adv_image.png
"""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

SUBFOLDERS_ABOVE, IMAGES_EACH = 10_000, 1_000
SUBFOLDERS = f"{5 * '[0-9]'}*/"  # those of any run, for glob


# Bytes. File systems take 255 in a name; what stands around one of ours is an image's number, a word or two,
# and, while it is written, the machine and process.
LONGEST_IN_A_NAME = 150


def shortened(text: str, longest: int) -> str:
    """A part of a file's name, cut where it has more bytes than that, with a digest of all at the end."""
    if len(text.encode()) <= longest:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text.encode()[: longest - len(digest) - 1].decode(errors="ignore") + "-" + digest


def index_of(path: Path) -> int:
    """The index of the image of which this is a file."""
    return int(path.name.split("_")[0])


@dataclass(frozen=True)
class Layout:
    """Of a run over so many images: all of its data set's, also where fewer are attacked."""

    folder: Path
    images: int

    @property
    def places(self) -> list[Path]:
        """The folders in which the files of images lie."""
        return list(
            dict.fromkeys(self.file(index, "").parent for index in range(0, self.images, IMAGES_EACH))
        )

    def file(self, index: int, name: str) -> Path:
        """A file of an image, such as `adv_image.png`."""
        inner = f"{index // IMAGES_EACH * IMAGES_EACH:05d}" if self.images > SUBFOLDERS_ABOVE else ""
        return self.folder / inner / f"{index:04d}_{name}"

    def record(self, index: int) -> Path:
        """An image's record is written last: where it is, the image is finished."""
        return self.file(index, "record.npz")

    def failure(self, index: int) -> Path:
        """Says why an image could not be attacked."""
        return self.file(index, "failed.txt")

    def finished(self, among: Collection[int] | None = None) -> set[int]:
        """The indices of images that have a record."""
        return self._those_with("record.npz", among)

    def failed(self, among: Collection[int] | None = None) -> set[int]:
        """The indices of images that could not be attacked."""
        return self._those_with("failed.txt", among)

    def _those_with(self, name: str, among: Collection[int] | None) -> set[int]:
        """Folders are listed rather than files asked for, which takes long on other machines' disks."""
        names = {file for place in self.places if place.is_dir() for file in os.listdir(place)}
        return {k for k in (range(self.images) if among is None else among) if f"{k:04d}_{name}" in names}
