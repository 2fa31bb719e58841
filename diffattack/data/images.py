"""Reading and writing pictures: as a person sees them, whole or not at all.

from diffattack.data.images import read_image, to_tensor
images = to_tensor(read_image(Path("demo/images/bison.jpg"), 224))   # (1, 3, 224, 224) in [0, 1]
"""

from __future__ import annotations

import io
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps

from diffattack.common.errors import note, one_line
from diffattack.data.layout import Layout

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".j2k", ".jpf"),
    *(".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".tga"),
)
SAME = 2  # levels of 255 by which another's sRGB differs from ours at most: it is rounded otherwise
WHITE_FROM = 128  # a mask that is nowhere as bright says nothing that can be meant


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image's file as Pillow opens it.

    Raises:
        OSError: it is missing, damaged, or no image; also for whatever decoders of damaged files raise
            inside.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is odd in a file that is read all the same
            with Image.open(path) as file:
                yield file
    except Exception as error:
        raise OSError(f"{path.name} is not a readable image ({one_line(error)})") from error


def read_image(path: Path, size: int) -> np.ndarray:
    """A picture as a person sees it, Lanczos-resized: uint8 `(size, size, 3)`.

    Raises:
        OSError: the file is missing, truncated, no image, or of floats or integers of 32 bits.
    """
    with opened(path) as file:
        return np.asarray(in_rgb(path, file).resize((size, size), Image.LANCZOS))


def read_mask(path: Path, size: int) -> np.ndarray:
    """A user's own mask, white where a picture may change: float32 `(size, size)` in [0, 1], resized like it.

    Raises:
        OSError: it cannot be read, is nowhere white, or has transparent parts, by which some tools mean what
            may change and others what may not.
    """
    grey = read_image(path, size).mean(-1)
    with opened(path) as file:
        is_opaque = file.convert("RGBA").getchannel("A").getextrema()[0] == 255
    if not is_opaque or grey.max() < WHITE_FROM:
        problem = "is white nowhere" if is_opaque else "has transparent parts, which may mean either"
        raise OSError(f"the mask {path.name} {problem}; save it in white where a picture may change")
    return (grey / 255).astype(np.float32)


def in_rgb(path: Path, file: Image.Image) -> Image.Image:
    """A file upright, in sRGB and on white; what has been done to it is said, but for turning it."""
    if getattr(file, "is_animated", False) and file.format != "MPO":  # a photograph and a smaller copy
        note("it has several frames or pages, of which the first is taken", path)
    profile, image = file.info.get("icc_profile"), ImageOps.exif_transpose(file)
    if image.mode in ("F", "I"):
        raise ValueError("Pillow reads it as floats or as integers of 32 bits; save it with 8 bits")
    if image.mode.startswith("I;16"):
        note("it is grey of 16 bits, of which 65535 is white", path)
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = (in_srgb(path, image, profile) if profile else image).convert("RGB")
    if opacity is None or opacity.getextrema()[0] == 255:
        return image
    note("it has transparent parts, which are laid on white", path)
    image.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def in_srgb(path: Path, image: Image.Image, profile: bytes) -> Image.Image:
    """A picture with an ICC profile in sRGB; as it is where that changes nothing."""
    mode = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}.get(image.mode, "RGB")
    image = image.convert(mode)
    try:
        converted = ImageCms.profileToProfile(
            image,
            io.BytesIO(profile),
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        note("its colour profile is broken or one of other colours, and is ignored", path)
        return image
    change = ImageChops.difference(converted, image.convert("RGB"))
    if mode != "CMYK" and max(largest for _, largest in change.getextrema()) <= SAME:
        return image
    note("its colours are converted to sRGB by its colour profile", path)
    return converted


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """8-bit `(H, W, 3)` or `(B, H, W, 3)` to `(B, 3, H, W)` in [0, 1]; B is 1 for a single picture."""
    return torch.from_numpy(pixels.copy()).view(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float() / 255


def to_pixels(image: torch.Tensor, truncated: bool = False) -> np.ndarray:
    """`(3, H, W)` in [0, 1] to 8-bit `(H, W, 3)`, rounded, or cut off as the original DiffAttack does."""
    return levels(image, truncated).to(torch.uint8).cpu().permute(1, 2, 0).numpy()


def levels(images: torch.Tensor, truncated: bool = False) -> torch.Tensor:
    """Images in [0, 1] as 0, 1, ... 255, rounded or cut off; in float32, of any shape."""
    values = images.float().clamp(0, 1) * 255
    return values.floor() if truncated else values.round()


def rounded(images: torch.Tensor, truncated: bool = False) -> torch.Tensor:
    """Images in [0, 1] as they are once they have been written in 8 bits and read again."""
    return (levels(images, truncated) / 255).to(images)


HOST = re.sub(r"\W", "", platform.node())[:20]


def temporary_name(path: Path) -> Path:
    """Of this process alone, on this machine and on those that share its file system."""
    return path.with_name(f"{path.name}.{HOST}-{os.getpid()}.partial")


def delete_abandoned(folder: Path) -> None:
    """Deletes the temporary files that processes of this machine left in a folder when they were killed."""
    for path in folder.glob(f"*.{HOST}-*.partial"):
        process = path.stem.rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, this process's own, renamed to `path` at the end, so that no half-written
    file ever has the final name, whatever happens.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_image(array: np.ndarray, path: Path, compress_level: int = 6) -> None:
    """Writes uint8 `(H, W, 3)` as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", compress_level=compress_level)


def write_result(
    layout: Layout, index: int, clean: np.ndarray, adversarial: np.ndarray, model_name: str, success: bool
) -> None:
    """Writes the five pictures of one image, named as the original DiffAttack names them; both uint8 `(H, W,
    3)`.
    """
    outcome = "ATKSuccess" if success else "Fail"
    difference = adversarial.astype(np.float64) - clean
    span = max(np.ptp(difference), 1)
    pictures = {
        "originImage.png": clean,
        "adv_image.png": adversarial,
        f"diff_{model_name}_image_{outcome}.png": np.concatenate([clean, adversarial], axis=1),
        "diff_relative.png": ((difference - difference.min()) / span * 255).round().astype(np.uint8),
        "diff_absolute.png": np.abs(difference).astype(np.uint8),
    }
    for name in (f"diff_{model_name}_image_ATKSuccess.png", f"diff_{model_name}_image_Fail.png"):
        layout.file(index, name).unlink(missing_ok=True)  # an earlier run may have ended the other way
    for name, picture in pictures.items():
        write_image(picture, layout.file(index, name))


@dataclass(frozen=True)
class Pictures:
    """The files of a run, read back: uint8 `(B, H, W, 3)`, and the true labels `(B,)`, or `(B, L)` where
    images have up to L, -1 for those they lack.

    `reconstructed` is what inversion, null-text optimisation and decoding give without any attack; None where
    that is the clean picture, or was not written.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    reconstructed: np.ndarray | None = None
    targets: np.ndarray | None = None  # (B,), of a targeted attack; -1 where there is none

    @property
    def sides(self) -> list[np.ndarray]:
        """The clean and the adversarial pictures, and the reconstructed ones where there are any."""
        both = [self.clean, self.adversarial]
        return both if self.reconstructed is None else [*both, self.reconstructed]

    def of(self, chosen: Sequence[int]) -> Pictures:
        """Some of them."""
        return Pictures(*(None if part is None else part[list(chosen)] for part in vars(self).values()))


def part_of_change(clean: np.ndarray, adversarial: np.ndarray, part: float) -> np.ndarray:
    """Clean pictures uint8 `(..., 3)` with a part up to 1 of their change, as a file would have them."""
    return np.round(clean + part * (adversarial.astype(np.float32) - clean)).astype(np.uint8)


def read_pair(layout: Layout, index: int) -> list[np.ndarray]:
    """The clean and the adversarial picture that a run wrote, uint8 `(H, W, 3)`."""
    return [
        np.asarray(Image.open(layout.file(index, f"{kind}.png")).convert("RGB"))
        for kind in ("originImage", "adv_image")
    ]
