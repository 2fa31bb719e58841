"""Pictures of more than 8 bits a channel, which Pillow cuts off to 8: read by OpenCV, with what their files
say of their range.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.colour import in_8_bits

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SAMPLE, S_MAX_SAMPLE, BITS, PLANAR = 281, 341, 258, 284  # tags of TIFF
ORIENTATION = 0x0112  # a tag of EXIF


def is_deep(file: Image.Image, head: bytes) -> bool:
    """Whether Pillow, which has opened a file and not read it, would drop bits of its colours.

    Args:
        head: the file's first bytes, at least 4,096.
    """
    if file.format == "PNG":
        return head[24] == 16 and head[25] in (2, 4, 6)  # colours, grey with opacity, colours with opacity
    if file.format == "TIFF":
        bits = file.tag_v2.get(BITS, (1,))
        return len(bits) > 1 and max(bits) == 16
    if file.format == "PPM":
        return head[:2] in (b"P6", b"P3") and white_of_ppm(head) > 255
    if file.format == "JPEG2000":
        place = head.find(b"\xff\x4f\xff\x51")  # the size of the picture, and the depth of its channels
        return 0 <= place < len(head) - 43 and (head[place + 42] & 0x7F) + 1 > 8
    return False


def white_of_ppm(head: bytes) -> int:
    """The largest value, which is the fourth word of the file."""
    words = [word for line in head[:400].split(b"\n") for word in line.split(b"#")[0].split()]
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 255


def read_deep(path: Path, file: Image.Image, head: bytes) -> Image.Image:
    """The picture in 8 bits, of mode RGB or RGBA, turned as its EXIF says.

    Raises:
        OSError: it cannot be read.
        RangeError: what its values mean cannot be told.
    """
    is_planar = file.format == "TIFF" and file.tag_v2.get(PLANAR) == 2
    values = read_planes(path) if is_planar else read_by_opencv(path)
    if values is None or values.dtype != np.uint16:
        raise OSError(f"{path.name} has more than 8 bits in a form that cannot be read; save it with 8 bits")
    values = values if values.ndim == 3 else values[..., None]
    colours = values[..., :3] if values.shape[-1] > 2 else values[..., :1]
    shown = in_8_bits(colours, *range_of(file, head))
    image = Image.fromarray(np.broadcast_to(shown, (*shown.shape[:2], 3)).copy())
    if values.shape[-1] in (2, 4):
        opacity = values[..., -1]
        opaque = next(white for white in (255, 4095, 16383, 65535) if opacity.max() <= white)
        image.putalpha(Image.fromarray(in_8_bits(opacity, opaque)))
    if file.format != "TIFF" or is_planar:  # else OpenCV has turned it
        image.getexif()[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
        image = ImageOps.exif_transpose(image)
    image.info |= {key: file.info[key] for key in ("icc_profile", "gamma", "srgb") if key in file.info}
    return image


def read_by_opencv(path: Path) -> np.ndarray | None:
    """The numbers of a file, `(H, W)` or `(H, W, C)`, red first; None where they cannot be read."""
    import cv2  # takes a while, and few need it

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if values is None or values.ndim < 3 or values.shape[-1] < 3:
        return values
    return values[..., [2, 1, 0, 3][: values.shape[-1]]]  # OpenCV has blue first


def read_planes(path: Path) -> np.ndarray | None:
    """The same of a TIFF that has one colour after the other, which OpenCV does not read."""
    import tifffile

    try:
        return tifffile.imread(path, key=0).transpose(1, 2, 0)
    except Exception:  # of compressions that need more than tifffile itself
        return None


def range_of(file: Image.Image, head: bytes) -> tuple[int | None, int | None]:
    """What a file says of its values: which of them is white, and how many bits mean something."""
    if file.format == "PNG":
        return None, significant_bits(head)
    if file.format == "TIFF":
        said = [file.tag_v2.get(tag) for tag in (S_MAX_SAMPLE, MAX_SAMPLE)]
        numbers = [max(value) if isinstance(value, tuple) else value for value in said if value]
        return next((int(number) for number in numbers if 255 < number < 65535), None), None
    if file.format == "PPM":
        white = white_of_ppm(head)
        return (None if white == 65535 else white), None
    if file.format == "JPEG2000":
        bits = (head[head.find(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1
        return (None if bits == 16 else 2**bits - 1), None
    return None, None


def significant_bits(head: bytes) -> int | None:
    """Of a PNG, by its chunk sBIT: the most of its channels."""
    place = len(SIGNATURE)
    while place + 8 <= len(head):
        length, kind = struct.unpack(">I4s", head[place : place + 8])
        if kind == b"sBIT":
            return max(head[place + 8 : place + 8 + min(length, 3)], default=None)
        if kind in (b"IDAT", b"PLTE"):  # it comes before these
            return None
        place += 12 + length
    return None
