"""Colours as a viewer shows them: the numbers of a picture that has a colour profile, in sRGB.

    profile = checked(profile_of(file, "rgb"), "rgb")
    pixels = in_srgb(pixels, profile, "rgb")            # (H, W, 3)

A profile is an ICC profile, or what a PNG says by gAMA and cHRM or by cICP, an AVIF by nclx, made into one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageCms

SPACES = {b"GRAY": "gray", b"RGB ": "rgb", b"CMYK": "cmyk", b"Lab ": "lab"}  # as profiles name them
SAME = 2  # levels of 255 by which another's sRGB differs from ours at most: it is rounded otherwise

# as image editors show pictures
INTENT, FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
# of 16 bits, which by default go through a grid: off by up to 15 levels of 255 where colours are clipped
EXACT = ImageCms.Flags.NOOPTIMIZE

SRGB_WHITE = (0.3127, 0.3290)
SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of red, green and blue
# of ITU-T H.273, as cICP and nclx have them
PRIMARIES = {
    1: SRGB_PRIMARIES,
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
SDR = {1, 6, 13, 14, 15}  # transfer functions that viewers show by sRGB's curve
UNSPECIFIED = 2
SRGB_GAMMA = (0.95 / 2.2, 1.05 / 2.2)  # a PNG's gAMA that stands for sRGB's curve, as libpng takes it
ADOBE_RGB = "R03"  # of EXIF's interoperability index


class ProfileError(ValueError):
    """A profile cannot be used; the message says why, as the end of a sentence that begins with "its"."""


def profile_of(file: Image.Image, space: str) -> bytes | None:
    """The ICC profile of a picture whose numbers are of a space, or one made of what it says of its colours
    otherwise; None where it says nothing, or that they are sRGB.

    Raises:
        ProfileError: it says what cannot be converted.
    """
    if file.format == "PNG":
        cicp = png_chunks(file).get(b"cICP")
        if cicp is not None and len(cicp) == 4:  # which comes before all others
            return profile_of_code(cicp[0], cicp[1], space == "gray")
    if "icc_profile" in file.info:
        if not file.info["icc_profile"]:  # Pillow could not unpack it, or a part of it is missing
            raise ProfileError("colour profile is broken and ignored")
        return file.info["icc_profile"]
    if "srgb" in file.info:
        return None
    if file.format == "PNG" and "gamma" in file.info:
        return profile_of_gamma(file.info["gamma"], file.info.get("chromaticity"), space == "gray")
    if file.format == "AVIF":
        head = start_of(file, 2**16)
        place = head.find(b"colrnclx")
        if place >= 0 and len(head) >= place + 12:
            return profile_of_code(*struct.unpack(">HH", head[place + 8 : place + 12]), space == "gray")
    if file.format == "JPEG2000":
        head = start_of(file, 2**22).split(b"\xff\x4f\xff\x51")[0]  # what comes before the codestream
        place = head.find(b"colr\x02")  # a restricted profile, and any
        if place >= 4:
            return head[place + 7 : place - 4 + int.from_bytes(head[place - 4 : place], "big")]
    if file.format == "BMP":
        head = start_of(file, 138)
        if head[14:18] == b"\x7c\0\0\0" and head[70:74] == b"DEBM":  # a V5 header with a profile
            place, length = struct.unpack("<2I", head[126:134])
            return start_of(file, 14 + place + length)[14 + place :]
    if file.format in ("JPEG", "MPO") and says_adobe_rgb(file.getexif()):
        raise ProfileError("EXIF data says Adobe RGB and it has no colour profile; browsers take it for sRGB")
    return None


def says_adobe_rgb(exif: Image.Exif) -> bool:
    """As cameras say it that write no profile."""
    return exif.get_ifd(0xA005).get(1) == ADOBE_RGB or exif.get_ifd(0x8769).get(0xA001) == 2


def start_of(file: Image.Image, size: int) -> bytes:
    """The first bytes of an image's file, which stays where it was."""
    place = file.fp.tell()
    file.fp.seek(0)
    content = file.fp.read(size)
    file.fp.seek(place)
    return content


def png_chunks(file: Image.Image) -> dict[bytes, bytes]:
    """The chunks before the pixels of a PNG that Pillow says nothing of, by their names."""
    place, chunks = file.fp.tell(), {}
    file.fp.seek(8)
    while len(head := file.fp.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] in (b"cICP", b"sBIT") and length <= 4:
            chunks[head[4:]] = file.fp.read(length)
        else:
            file.fp.seek(length, 1)
        file.fp.seek(4, 1)
    file.fp.seek(place)
    return chunks


def profile_of_code(primaries: int, transfer: int, grey: bool) -> bytes | None:
    """A profile of colours that are coded as in ITU-T H.273."""
    if primaries == UNSPECIFIED and transfer in SDR | {UNSPECIFIED}:
        return None
    if primaries not in PRIMARIES or transfer not in SDR | {UNSPECIFIED}:
        raise ProfileError(
            f"colours are coded as ITU-T H.273 has it by {primaries} and {transfer} (HDR, or a rare kind), "
            f"which is not converted; convert it to sRGB"
        )
    if primaries == 1 or grey:
        return None
    curve = np.linspace(0, 1, 4096)
    curve = np.where(curve <= 0.04045, curve / 12.92, ((curve + 0.055) / 1.055) ** 2.4)
    return made(SRGB_WHITE, PRIMARIES[primaries], transferfunction=curve.astype(np.float32))


def profile_of_gamma(gamma: float, chromaticity: Sequence[float] | None, grey: bool) -> bytes | None:
    """A profile of what a PNG says by gAMA and cHRM."""
    if gamma <= 0:
        raise ProfileError("gAMA is 0, which means nothing")
    white, primaries = SRGB_WHITE, SRGB_PRIMARIES
    if chromaticity is not None and not grey:
        white, primaries = tuple(chromaticity[:2]), tuple(chromaticity[2:8])
    near = np.allclose([*white, *primaries], [*SRGB_WHITE, *SRGB_PRIMARIES], atol=0.005)
    if near and SRGB_GAMMA[0] <= gamma <= SRGB_GAMMA[1]:
        return None
    if grey:
        import imagecodecs

        return imagecodecs.cms_profile("gray", gamma=1 / gamma)
    return made(white, primaries, gamma=1 / gamma)


def made(white: Sequence[float], primaries: Sequence[float], **curve) -> bytes:
    """A profile of RGB with these chromaticities.

    Raises:
        ProfileError: they are those of no colours.
    """
    import imagecodecs

    corners = [value for k in range(0, 6, 2) for value in (*primaries[k : k + 2], 1.0)]
    try:
        return imagecodecs.cms_profile("rgb", whitepoint=[*white, 1.0], primaries=corners, **curve)
    except (ValueError, imagecodecs.CmsError) as error:
        raise ProfileError(f"chromaticities are those of no colours ({error})") from None


def checked(profile: bytes | None, space: str) -> bytes | None:
    """A profile that changes numbers of a space, "gray", "rgb", "cmyk" or "lab"; None where it leaves them as
    they are, because it is sRGB.

    Raises:
        ProfileError: it is broken, or one of another space.
    """
    if profile is None:
        return None
    own = SPACES.get(profile[16:20])
    if own is None or profile[36:40] != b"acsp":
        raise ProfileError("colour profile is broken and ignored")
    if own == space == "lab":
        return None  # L*a*b* is what it is
    if own != space and own == "rgb" and space == "gray" and largest_change(profile, "rgb") <= SAME:
        return None  # grey, and called sRGB
    if own != space:
        raise ProfileError(
            f"colour profile is of {own.upper()} and its pixels are {space.upper()}, so it is ignored"
        )
    return None if largest_change(profile, space) <= SAME else profile


@functools.lru_cache(64)
def largest_change(profile: bytes, space: str) -> float:
    """By how many levels of 255 a profile changes a grid of colours at most; of inks infinity.

    Raises:
        ProfileError: the profile is broken.
    """
    steps = np.linspace(0, 255, 256 if space == "gray" else 18).round().astype(np.uint8)
    channels = {"gray": 1, "cmyk": 4}.get(space, 3)
    if channels == 4:
        steps = steps[::6]
    grid = np.stack(np.meshgrid(*[steps] * channels), -1).reshape(1, -1, channels)
    shown = in_srgb(grid[..., 0] if channels == 1 else grid, profile, space)
    if not keeps_light(profile, space, channels):
        raise ProfileError("colour profile makes white dark or black bright, so it is broken and ignored")
    if channels == 4:
        return np.inf
    return float(np.abs(shown.astype(int) - grid).max())


def keeps_light(profile: bytes, space: str, channels: int) -> bool:
    """Whether white is bright and black dark by a profile, and greys near one are not the other."""
    ramp = np.array([[0, 64, 192, 255]], np.uint8)
    ramp = 255 - ramp if space == "cmyk" else ramp
    values = ramp if channels == 1 else np.repeat(ramp[..., None], channels, -1)
    black, dark, bright, white = in_srgb(values, profile, space)[0].mean(-1)
    return black < 100 and dark < 250 and bright > 5 and white > 200


def in_srgb(values: np.ndarray, profile: bytes, space: str) -> np.ndarray:
    """Numbers of a space, uint8 or uint16, `(H, W)` of "gray" and `(H, W, C)` of the others, in sRGB: `(H, W,
    3)` of the same type.

    Raises:
        ProfileError: the profile is broken.
    """
    import imagecodecs

    if space == "gray" and values.dtype == np.uint8:  # which would be converted on a coarse grid
        table = in_srgb(np.arange(256, dtype=np.uint16)[None] * 257, profile, space)[0]
        return (table / 257).round().astype(np.uint8)[values]
    ours = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    try:
        return imagecodecs.cms_transform(
            np.ascontiguousarray(values),
            profile,
            ours,
            colorspace=space,
            outcolorspace="rgb",
            intent=int(INTENT),
            flags=int(FLAGS | EXACT if values.dtype == np.uint16 else FLAGS),
        )
    except (ValueError, imagecodecs.CmsError) as error:
        raise ProfileError(f"colour profile is broken and ignored ({error})") from None
