"""Pixels of more than 8 bits, which Pillow opens in 8 or not at all: what a file holds, and which of its
numbers is white.

    deep = deep_pixels(path, file)          # None where 8 bits are all that there is
    deep.in_16_bits()                       # (H, W) or (H, W, C), of which 65535 is full, and the opacity
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffattack.data.colour import png_chunks
from diffattack.data.opened import REDUCED

# A share of pixels, and a number in small pictures, that may be hot, dead or painted over and decide nothing
OUTLIERS, FEW = 1e-3, 4
PAINTED = 0.2  # a share that may be of one value, as scale bars and captions are
DARK = 16383  # of 65535; what is no brighter may have been meant in fewer bits
CERTAIN_SHIFTS = (257, 256)  # how 8 bits are made 16


class RangeError(ValueError):
    """It is not known which of a picture's numbers is white; the message says what it could be."""


@dataclass(frozen=True)
class Deep:
    """Pixels of more than 8 bits, in the order of the file."""

    values: np.ndarray  # (H, W) of "gray", (H, W, 3) of "rgb" and (H, W, 4) of "cmyk"; integers or floats
    space: str
    white: float | None = None  # the number that the file's format says is full
    alpha: np.ndarray | None = None  # (H, W), of the same range
    significant: int | None = None  # how many bits a PNG says there were before
    suggested: tuple[float, ...] = ()  # the largest numbers by a TIFF's MaxSampleValue and SMaxSampleValue
    is_inverted: bool = False  # 0 is white
    is_premultiplied: bool = False
    profile: bytes | None = None  # of a TIFF, as the next
    orientation: int | None = None

    def in_16_bits(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The pixels as uint16, of which 65535 is full, and the opacity `(H, W)` in [0, 1].

        Raises:
            RangeError: which number is full is not known.
        """
        white = self.white_level()
        opacity = None
        if self.alpha is not None:
            opacity = (self.alpha / np.float32(1 if self.alpha.max() <= 1 else white)).clip(0, 1)
        if (
            self.values.dtype == np.uint16
            and white == 65535
            and not (self.is_inverted or self.is_premultiplied)
        ):
            return self.values, opacity
        values = self.values.astype(np.float32) / np.float32(white)
        if self.is_inverted:
            values = 1 - values
        if self.is_premultiplied:
            alpha = np.broadcast_to(opacity if values.ndim == 2 else opacity[..., None], values.shape)
            values = np.divide(values, alpha, out=np.zeros_like(values), where=alpha > 0)
        return (65535 * values).round().clip(0, 65535).astype(np.uint16), opacity

    def white_level(self) -> float:
        """Which number is full. Raises RangeError where it is not known."""
        if not np.isfinite(self.values).all() or self.values.min() < 0:
            raise RangeError("its values are negative or not finite; save it with values from 0 to 255")
        if self.white is not None:
            return self.white
        peaks = self.values if self.values.ndim == 2 else self.values.max(-1)
        if self.values.dtype.kind == "f":
            return white_of_floats(self.values, peaks, self.suggested)
        return white_of_integers(self.values, peaks, self.suggested, self.significant)


def bulk_of(peaks: np.ndarray) -> float:
    """The largest value but for outliers."""
    allowed = min(max(FEW, int(OUTLIERS * peaks.size)), peaks.size - 1)
    return np.partition(peaks, -1 - allowed, axis=None)[-1 - allowed]


def white_of_floats(values: np.ndarray, peaks: np.ndarray, suggested: tuple[float, ...]) -> float:
    """1 or 255."""
    largest, bulk = peaks.max(), bulk_of(peaks)
    if largest <= 1 and 255 not in suggested:
        return 1.0
    if largest > 255:
        raise RangeError(f"its values go up to {largest:.3g}; save it with 8 bits")
    if 255 in suggested or (values == values.round()).all() and bulk > 1 or bulk > 255 / 4:
        return 255.0
    if bulk <= 1 and (1 in suggested or (values != values.round()).mean() > OUTLIERS):
        return 1.0
    raise RangeError(
        f"its values go up to {bulk:.3g}, which is neither 1 nor 255: over 0 to 255 its mean is "
        f"{values.mean():.3g} of 255, over 0 to 1 it is {255 * values.clip(0, 1).mean():.3g}; save it with 8 "
        f"bits"
    )


def white_of_integers(
    values: np.ndarray, peaks: np.ndarray, suggested: tuple[float, ...], significant: int | None
) -> float:
    """65535, or what the file says."""
    largest, bulk = int(peaks.max()), int(bulk_of(peaks))
    if largest > 65535:
        raise RangeError(f"its values go up to {largest:.3g}; save it with 8 bits")
    powers = {2**bits - 1 for bits in range(8, 17)}
    for number in suggested:  # others are of what the pixels happen to reach
        if number in powers and bulk <= number:
            return float(number)
    if significant is not None and 1 < significant <= 16 and 0 < bulk < 2**significant:
        # by its specification a PNG's bits are the upper ones, followed by themselves or by zeros
        is_empty = (values & (2 ** (16 - significant) - 1) == 0).mean() >= 1 - OUTLIERS
        return 65535.0 if is_empty or repeats(values, significant) else 2.0**significant - 1
    above = peaks[peaks > DARK]
    if above.size > PAINTED * peaks.size:
        return 65535.0
    is_dark = above.size <= max(FEW, OUTLIERS * peaks.size) or np.unique(above).size <= 2
    if not is_dark or largest == 0:
        return 65535.0
    for factor in CERTAIN_SHIFTS:  # 8 bits, however dark
        if np.count_nonzero(values % factor) <= max(FEW, OUTLIERS * peaks.size) * (largest > DARK):
            return 65535.0
    bulk = int(peaks[peaks <= DARK].max()) if above.size > FEW else bulk
    full = 2 ** max(8, bulk.bit_length()) - 1
    bits, look = ("12 or fewer", "almost black") if bulk <= 4095 else ("14 or fewer", "dark")
    but = f" but for {np.count_nonzero(peaks > full)} pixels" if largest > full else ""
    raise RangeError(
        f"of its 16 bits it uses {bits}{but}, so that it is {look}: over 0 to 65535 its mean is "
        f"{values.mean() / 257:.3g} of 255, over 0 to {full} it is "
        f"{255 * values.clip(0, full).mean() / full:.3g}; scale it to 65535, or save it with 8 bits"
    )


def repeats(values: np.ndarray, bits: int) -> bool:
    """Whether 16-bit values are of so many bits, scaled to all: followed by their own first bits, but for
    rounding.
    """
    upper = values.astype(np.int32) >> (16 - bits)
    expected = (upper << (16 - bits)) | (upper >> max(0, 2 * bits - 16))
    return bits >= 8 and (abs(expected - values.astype(np.int32)) <= 1).mean() >= 1 - OUTLIERS


# ---------------------------------------------------------------- from files


def deep_pixels(path: Path, file: Image.Image | None) -> Deep | None:
    """The pixels of an opened file that has more than 8 bits, else None; without `file` those of a TIFF.

    Raises:
        ValueError, OSError and what else the decoders raise: it is broken, or of a rare kind.
    """
    if file is None or file.format == "TIFF" and max(file.tag_v2.get(258, (1,))) > 8:
        return deep_tiff(path)
    if file.format == "PNG" and "16B" in str(file.tile[0][3]):
        return deep_png(path, file)
    deep = None
    if file.format == "JPEG2000":
        deep = deep_jpeg2000(path, file)
    elif file.format == "PPM":
        deep = deep_ppm(path)
    if deep is not None:
        return deep
    if file.mode == "F" or file.mode.startswith("I"):
        return Deep(np.asarray(file), "gray")
    return None


def deep_png(path: Path, file: Image.Image) -> Deep:
    import imagecodecs

    values = imagecodecs.png_decode(path.read_bytes())
    bits = png_chunks(file).get(b"sBIT")
    colours = 3 if values.ndim == 3 and values.shape[-1] > 2 else 1
    significant = None if bits is None else max(bits[:colours], default=None)
    alpha = values[..., -1] if values.ndim == 3 and values.shape[-1] in (2, 4) else None
    values = values[..., :3] if colours == 3 else values.reshape(*values.shape[:2], -1)[..., 0]
    clear = file.info.get("transparency")
    if clear is not None and alpha is None:
        is_clear = values == np.asarray(clear)
        alpha = np.where(is_clear.all(-1) if colours == 3 else is_clear, 0, 65535).astype(np.uint16)
    return Deep(values, "rgb" if colours == 3 else "gray", alpha=alpha, significant=significant)


def deep_tiff(path: Path) -> Deep:
    """With what Pillow does not open, too: floating point in colour, and grey with opacity."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = next((page for page in tiff.pages if not page.subfiletype & REDUCED), tiff.pages.first)
        kind, axes = page.photometric.name, page.axes
        samples = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3, "SEPARATED": 4}.get(kind)
        if samples is None or axes not in ("YX", "YXS", "SYX"):
            raise ValueError(
                f"a TIFF of kind {kind} with {page.bitspersample} bits and axes {axes} is not read"
            )
        if page.imagewidth * page.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
            raise Image.DecompressionBombError(f"it has {page.imagewidth} x {page.imagelength} pixels")
        values = page.asarray()
        values = np.moveaxis(values, 0, -1) if axes == "SYX" else values
        values = values if values.ndim == 3 else values[..., None]
        bits, extra = page.bitspersample, [int(sample) for sample in page.extrasamples]
        if samples == 1 and values.shape[-1] - (extra[:1] in ([1], [2])) > 1:
            raise ValueError(
                f"it has {values.shape[-1]} bands of grey and does not say which are red, green and blue; "
                f"save it as RGB"
            )
        if values.shape[-1] < samples:
            raise ValueError(f"a TIFF of kind {kind} has {values.shape[-1]} samples a pixel")
        # MaxSampleValue, SMaxSampleValue, InterColorProfile, Orientation
        *largest, profile, orientation = (page.tags.valueof(code) for code in (281, 341, 34675, 274))
    is_float = values.dtype.kind == "f"
    white = float(2**bits - 1) if not is_float and 8 < bits < 16 else None
    alpha, is_premultiplied = None, False
    if samples != 4 and extra and extra[0] in (1, 2) and values.shape[-1] > samples:
        is_premultiplied = extra[0] == 1
        alpha = values[..., samples]
    space = {1: "gray", 3: "rgb", 4: "cmyk"}[samples]
    return Deep(
        values[..., 0] if samples == 1 else values[..., :samples],
        space,
        white,
        alpha,
        is_inverted=kind == "MINISWHITE",
        suggested=tuple(float(np.max(tag)) for tag in largest if tag is not None),
        is_premultiplied=is_premultiplied,
        profile=profile,
        orientation=orientation,
    )


def deep_jpeg2000(path: Path, file: Image.Image) -> Deep | None:
    """None also of luminance with subsampled colours, which Pillow puts together."""
    import imagecodecs

    content = path.read_bytes()
    place = content.find(b"\xff\x4f\xff\x51")  # SOC and SIZ
    components = int.from_bytes(content[place + 40 : place + 42], "big")
    sizes = [content[place + 42 + 3 * k : place + 45 + 3 * k] for k in range(components)]
    bits = {(size[0] & 127) + 1 for size in sizes}
    is_plain = place >= 0 and all(size[1:] == b"\1\1" and size[0] < 128 for size in sizes)
    is_ycc = b"colr\1\0\0\0\0\0\x12" in content[: max(place, 0)]
    space = {"L": "gray", "I;16": "gray", "LA": "gray", "RGB": "rgb", "RGBA": "rgb"}.get(file.mode)
    if not is_plain or is_ycc or space is None or len(bits) != 1 or not 8 < max(bits) <= 16:
        return None
    values, bits = imagecodecs.jpeg2k_decode(content), max(bits)
    values = values if values.ndim == 3 else values[..., None]
    white = float(2**bits - 1) if bits < 16 else None
    colours = 1 if space == "gray" else 3
    alpha = values[..., -1] if values.shape[-1] == colours + 1 else None
    return Deep(values[..., 0] if colours == 1 else values[..., :3], space, white, alpha)


def deep_ppm(path: Path) -> Deep | None:
    content = path.read_bytes()
    gap = rb"(?:\s|#[^\n]*\n)+"
    head = re.match(rb"P([2356])" + gap + rb"(\d+)" + gap + rb"(\d+)" + gap + rb"(\d+)\s", content)
    if head is None or int(head[4]) < 256:
        return None
    kind, width, height, white = map(int, head.groups())
    channels = 3 if kind in (3, 6) else 1
    count = width * height * channels
    if kind > 3:
        values = np.frombuffer(content, ">u2", count, head.end()).astype(np.uint16)
    else:
        numbers = re.sub(rb"#[^\n]*", b"", content[head.end() :]).split()[:count]
        values = np.array(numbers, np.int64).astype(np.uint16)
    values = values.reshape((height, width, 3) if channels == 3 else (height, width))
    return Deep(values, "rgb" if channels == 3 else "gray", float(white) if white < 65535 else None)
