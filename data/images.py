"""Reading and writing pictures: as a person sees them, whole or not at all.

from data.images import read_image, to_tensor
images = to_tensor(read_image(Path("demo/images/bison.jpg"), 224))   # (1, 3, 224, 224) in [0, 1]
"""

from __future__ import annotations

import os
import platform
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, features

from common.errors import note_of_file, one_line
from data.colour import (
    SRGB_GAMMA,
    ProfileError,
    RangeError,
    floats_in_8_bits,
    in_8_bits,
    to_srgb,
    with_gamma,
)
from data.deep import is_deep, range_of, read_deep
from data.layout import Layout

if TYPE_CHECKING:  # torch takes long to import, and figures are drawn without it
    import torch

HEAD = 2**16  # bytes that say what a file holds
IMAGE_SUFFIXES = tuple(
    suffix
    for suffix, codec in {
        ".png": "zlib",
        ".jpg": "jpg",
        ".jpeg": "jpg",
        ".jpe": "jpg",
        ".jfif": "jpg",
        ".webp": "webp",
        ".avif": "avif",
        ".jp2": "jpg_2000",
        ".j2k": "jpg_2000",
        ".jpf": "jpg_2000",
        ".bmp": "zlib",
        ".tif": "zlib",
        ".tiff": "zlib",
        ".gif": "zlib",
        ".ppm": "zlib",
        ".pgm": "zlib",
        ".tga": "zlib",
    }.items()
    if features.check(codec)  # a build of Pillow need not have all
)
# what people keep pictures in, whether they can be read here or not
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".heic", ".heif", ".jpeg2000", ".jxl", ".svg", ".raw", ".dng")


def read_image(path: Path, size: int) -> np.ndarray:
    """A picture as a person sees it, Lanczos-resized: uint8 `(size, size, 3)`.

    EXIF rotation is applied, colours are those of its ICC profile, transparency is laid over white, and 16
    bits and floating point are scaled to 8 bits. What of the file is not shown is said.

    Raises:
        OSError: the file is missing, truncated, no image, or its numbers have no range that is known.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path.name} is not a readable image (it is no file)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = to_rgb(read_upright(path), path.name)
        except RangeError as error:
            raise OSError(f"{path.name} cannot be shown: {error}") from error
        except (
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
            Image.DecompressionBombError,
        ) as error:  # what Pillow raises on broken files
            raise OSError(f"{path.name} is not a readable image ({one_line(error)})") from error
    for warning in caught:
        text = one_line(warning.message)
        note_of_file(f"{path.name}: {text}", re.sub(r"\d+", "", text)[:60], at_most=1)
    return np.asarray(image.resize((size, size), Image.LANCZOS))


def read_upright(path: Path) -> Image.Image:
    """A picture as its file has it, turned as its EXIF says."""
    with Image.open(path) as file, open(path, "rb") as content:
        head = content.read(HEAD)
        frames = (
            getattr(file, "n_frames", 1) if file.format != "MPO" else 1
        )  # a phone's photo with its preview
        if frames > 1:
            note_of_file(f"{path.name} has {frames} frames or pages, of which the first is taken", "frames")
        if is_deep(file, head):
            return read_deep(path, file, head)
        range_said = range_of(file, head)  # while its tags are there
        image = ImageOps.exif_transpose(file)
        image.load()
        # Pillow takes all of these for inverted, as Adobe's are
        if file.format == "JPEG" and image.mode == "CMYK" and "adobe" not in file.info:
            profile = image.info.get("icc_profile")
            image = ImageChops.invert(image)
            image.info |= {"icc_profile": profile} if profile else {}
    if image.mode.startswith("I"):
        return grey_in_8_bits(image, *range_said)
    return image


def grey_in_8_bits(image: Image.Image, white: int | None, significant: int | None) -> Image.Image:
    """Whole numbers of 16 or 32 bits, as mode L.

    Raises:
        RangeError: what they mean cannot be told.
    """
    values = np.asarray(image, np.int64)
    if values.min() < 0:
        raise RangeError("its values are negative or not finite; save it with values from 0 to 255")
    if values.max() > 65535:
        raise RangeError(f"its values go up to {values.max():.3g}; save it with 8 bits")
    shown = Image.fromarray(in_8_bits(values, white, significant))
    shown.info |= {key: image.info[key] for key in ("icc_profile",) if key in image.info}
    return shown


def to_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """An image of any of Pillow's modes in RGB.

    Raises:
        RangeError: its numbers have no range that is known.
    """
    info = dict(image.info)
    if image.mode == "F":  # Pillow would clip it at 255
        image = Image.fromarray(floats_in_8_bits(np.asarray(image, np.float64)))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by their opacity already
        image = image.convert(image.mode.upper())
    if image.mode in ("1", "P", "PA", "YCbCr", "HSV"):
        colours = "L" if image.mode == "1" else "RGB"
        image = image.convert("RGBA" if image.has_transparency_data else colours)
    elif image.has_transparency_data and image.mode in ("L", "RGB"):  # one colour of them is transparent
        image = image.convert("RGBA")
    image = in_srgb(image, info, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def in_srgb(image: Image.Image, info: dict, name: str) -> Image.Image:
    """A picture with the colours of its ICC profile, or else of PNG's gamma."""
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if profile:
        try:
            return to_srgb(image, profile)
        except ProfileError as error:
            note_of_file(f"{name}: its colour profile is ignored, since {error}", "profile")
    elif gamma and "srgb" not in info and abs(gamma / SRGB_GAMMA - 1) > 0.05:
        return with_gamma(image, gamma)
    return image


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """8-bit `(H, W, 3)` or `(B, H, W, 3)` to `(B, 3, H, W)` in [0, 1]; B is 1 for a single picture."""
    import torch

    return torch.from_numpy(pixels.copy()).view(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float() / 255


def to_pixels(image: torch.Tensor, truncated: bool = False) -> np.ndarray:
    """`(3, H, W)` in [0, 1] to 8-bit `(H, W, 3)`, rounded, or cut off as the original DiffAttack does."""
    import torch

    return levels(image, truncated).to(torch.uint8).cpu().permute(1, 2, 0).numpy()


def levels(images: torch.Tensor, truncated: bool = False) -> torch.Tensor:
    """Images in [0, 1] as 0, 1, ... 255, rounded or cut off; in float32, of any shape."""
    values = images.float().clamp(0, 1) * 255
    return values.floor() if truncated else values.round()


def rounded(images: torch.Tensor, truncated: bool = False) -> torch.Tensor:
    """Images in [0, 1] as they are once they have been written in 8 bits and read again."""
    return (levels(images, truncated) / 255).to(images)


def temporary_name(path: Path) -> Path:
    """Of this process alone, on this machine and on those that share its file system."""
    host = re.sub(r"\W", "", platform.node())[:20]
    return path.with_name(f"{path.name}.{host}-{os.getpid()}.partial")


def delete_abandoned(folder: Path) -> None:
    """Deletes the temporary files that processes of this machine left in a folder when they were killed."""
    import psutil

    for path in folder.glob("*.partial"):
        match = re.fullmatch(r".+\.(\w*)-(\d+)\.partial", path.name)
        if match and temporary_name(folder / "x").name.startswith(f"x.{match[1]}-"):
            if not psutil.pid_exists(int(match[2])):
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def image_grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Pictures of equal size, uint8 `(H, W, 3)`, side by side on white."""
    padded = [
        [np.pad(picture, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for picture in row]
        for row in rows
    ]
    return np.concatenate([np.concatenate(row, axis=1) for row in padded])


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
