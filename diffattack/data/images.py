"""Reading and writing pictures: as a person sees them, whole or not at all.

from diffattack.data.images import read_image, to_tensor
images = to_tensor(read_image(Path("demo/images/bison.jpg"), 224))   # (1, 3, 224, 224) in [0, 1]
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, features

from diffattack.common.errors import note_of_image
from diffattack.data.colour import ProfileError, checked, in_srgb, profile_of
from diffattack.data.layout import Layout
from diffattack.data.opened import UnreadableImageError, opened, printed_said, say_frames
from diffattack.data.pixels import Deep, RangeError, deep_pixels

if TYPE_CHECKING:  # torch takes long to import, and figures are drawn without it
    import torch

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

ORIENTATION = 0x0112  # EXIF's
CLEAR = 1  # of 255, an opacity that is none; also where 8 bits of it are written as if they were 16


def read_image(path: Path, size: int) -> np.ndarray:
    """A picture as a person sees it, Lanczos-resized: uint8 `(size, size, 3)`.

    A colour profile is followed to sRGB, EXIF rotation applied, transparency laid over white, and more than 8
    bits and floating point scaled to 8. Of an animation it is the first frame. What a user should know of the
    picture is said.

    Raises:
        OSError: the file is missing, truncated, no image, or its numbers have no range that is known.
    """
    with opened(path) as file:
        say_frames(path, file)
        deep = deep_pixels(path, file)
        try:
            if deep is None:
                image = in_rgb(path, file)
            else:
                image = deep_in_rgb(path, file, deep)
        except RangeError as error:
            raise UnreadableImageError(f"{path.name} cannot be shown: {error}") from error
        return np.asarray(image.resize((size, size), Image.LANCZOS))


def in_rgb(path: Path, file: Image.Image) -> Image.Image:
    """A file of 8 bits, of any of Pillow's modes, in RGB."""
    profile = usable_profile(path, file, space_of(file.mode))
    with printed_said(path, file):
        image = ImageOps.exif_transpose(file)
        image.load()
    # Pillow takes all of these for inverted, as Adobe's are
    if file.format == "JPEG" and image.mode == "CMYK" and "adobe" not in file.info:
        image = ImageChops.invert(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by their opacity already
        image = image.convert(image.mode.upper())
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = image.getchannel("A")
    if profile is not None:
        mode = {"gray": "L", "rgb": "RGB", "cmyk": "CMYK"}[space_of(file.mode)]
        values = in_srgb(np.asarray(image.convert(mode)), profile, space_of(file.mode))
        image = Image.fromarray(values)
    return over_white(path, image.convert("RGB"), opacity)


def space_of(mode: str) -> str:
    """The space of the colours of one of Pillow's modes, as `diffattack.data.colour` names it."""
    if mode in ("1", "L", "LA", "La"):
        return "gray"
    return {"CMYK": "cmyk", "LAB": "lab"}.get(mode, "rgb")


def deep_in_rgb(path: Path, file: Image.Image | None, deep: Deep) -> Image.Image:
    """Pixels of more than 8 bits in 8.

    Raises:
        RangeError: it is not known which of their numbers is white.
    """
    values, opacity = deep.in_16_bits()
    profile = usable_profile(path, file, deep.space, deep.profile)
    if profile is not None:
        values = in_srgb(values, profile, deep.space)
    values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[values.size // (values.shape[0] * values.shape[1])]
    image = Image.frombytes(mode, values.shape[1::-1], values.tobytes()).convert("RGB")
    if opacity is not None:
        opacity = Image.fromarray((255 * opacity).round().astype(np.uint8))
    image = over_white(path, image, opacity)
    image.getexif()[ORIENTATION] = deep.orientation or (file and file.getexif().get(ORIENTATION)) or 1
    return ImageOps.exif_transpose(image)


def usable_profile(
    path: Path, file: Image.Image | None, space: str, given: bytes | None = None
) -> bytes | None:
    """The colour profile by which the numbers of a space have to be converted; what is wrong with one is
    said.
    """
    try:
        return checked(given if given or file is None else profile_of(file, space), space)
    except ProfileError as error:
        note_of_image(path, f"its {error}")
        return None


def over_white(path: Path, image: Image.Image, opacity: Image.Image | None) -> Image.Image:
    """RGB, with an opacity of mode L laid over white; not one that is nowhere, as in files whose fourth
    channel is empty.
    """
    if opacity is None:
        return image
    if opacity.getextrema()[1] <= CLEAR:
        note_of_image(path, "it is transparent all over, so that its opacity is taken for none", "clear")
        return image
    image.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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


def read_pair(layout: Layout, index: int) -> list[np.ndarray]:
    """The clean and the adversarial picture that a run wrote, uint8 `(H, W, 3)`."""
    return [
        np.asarray(Image.open(layout.file(index, f"{kind}.png")).convert("RGB"))
        for kind in ("originImage", "adv_image")
    ]
