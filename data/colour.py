"""Colours as a viewer shows them: pictures in other colour spaces than sRGB, and what more than 8 bits
mean."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

OUTLIERS = 0.001  # share of values that may lie above what is taken for white, as those of hot pixels do
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of profiles, by Pillow's modes
SRGB_GAMMA = 1 / 2.2


class ProfileError(ValueError):
    """A colour profile cannot be used; the message says why."""


class RangeError(ValueError):
    """What a picture's numbers mean cannot be told; the message says why, and what to do."""


# ---------------------------------------------------------------- colour spaces


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture of mode RGB, RGBA, L, LA or CMYK, whose numbers mean what its ICC profile says, in RGB or
    RGBA; itself where the profile says what sRGB says.

    Raises:
        ProfileError: the profile is broken, or of another kind of colours than the picture.
    """
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha else image
    space = space_of(profile)
    if space == "RGB" and colours.mode == "L":  # grey pictures often come with the profile of colour ones
        colours = colours.convert("RGB")
    if space != colours.mode:
        raise ProfileError(f"it is for {space or 'other'} colours, and the picture has {colours.mode}")
    transform = transform_of(profile, space)
    if transform is None:
        return image
    shown = transform.apply(colours)
    if alpha:
        shown.putalpha(alpha)
    return shown


def space_of(profile: bytes) -> str | None:
    """The mode of pictures that a profile is for."""
    try:
        return SPACES.get(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        raise ProfileError(f"it cannot be read ({error})") from None


@lru_cache(16)
def transform_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it changes no colour by more than a rounding, as sRGB's own, so that
    the numbers of ordinary pictures stay exactly what they are.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    try:
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.getDefaultIntent(source)
        )
        if mode != "CMYK":
            steps = range(0, 256, 15 if mode == "L" else 51)
            colours = [(v, v, v) for v in steps] if mode == "L" else np.stack(np.meshgrid(*[steps] * 3), -1)
            probe = Image.fromarray(np.array(colours, np.uint8).reshape(1, -1, 3))
            changed = np.asarray(transform.apply(probe.convert(mode)), int) - np.asarray(probe, int)
            if abs(changed).max() <= 2:
                return None
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        raise ProfileError(f"it cannot be used ({error})") from None
    return transform


def with_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """A picture that was encoded as light ** gamma, as sRGB shows it: PNG's gAMA, as browsers read it."""
    curve = [round(255 * (value / 255) ** (SRGB_GAMMA / gamma)) for value in range(256)]
    bands = [
        band if name == "A" else band.point(curve) for name, band in zip(image.getbands(), image.split())
    ]
    return Image.merge(image.mode, bands)


# ---------------------------------------------------------------- more than 8 bits


def in_8_bits(values: np.ndarray, white: int | None = None, significant: int | None = None) -> np.ndarray:
    """Unsigned integers of 16 bits, of any shape, as uint8.

    Args:
        white: the largest value, where the file says it.
        significant: how many of their bits mean something, where the file says it. PNG has them scaled to all
            16, which not every program does.
    Raises:
        RangeError: it could be meant in two ways; the message says what both would show.
    """
    if values.size == 0 or values.max() == 0:
        return np.zeros(values.shape, np.uint8)
    bright = float(np.quantile(values, 1 - OUTLIERS, method="lower"))
    if white is None and significant is not None and significant < 16:
        step = 2 ** (16 - significant)
        is_scaled = bright >= 2**significant or not (values % step).any()
        white = 65535 if is_scaled else 2**significant - 1
    if white is None and ((values % 257 == 0).all() or bright > 16383):
        white = 65535
    if white is None:
        bits = next(bits for bits in (8, 12, 14) if bright < 2**bits)
        few, all_bits = (float((255 * values / m).clip(0, 255).mean()) for m in (2**bits - 1, 65535))
        raise RangeError(
            f"of its 16 bits it uses {bits} or fewer, and nothing says which is meant: with {bits} bits its "
            f"mean is {few:.0f} of 255, with 16 it is {all_bits:.0f}, almost black; save it with 8 bits, or "
            f"scaled to 65535"
        )
    if bright > white:
        raise RangeError(
            f"it says that {white} is white, and has values up to {int(values.max())}; save it with 8 bits"
        )
    return (values.astype(np.float64) * (255 / white)).round().clip(0, 255).astype(np.uint8)


def floats_in_8_bits(values: np.ndarray) -> np.ndarray:
    """Floating point in [0, 1] or [0, 255], as uint8.

    Raises:
        RangeError: they are in another range.
    """
    if not np.isfinite(values).all() or values.min() < 0:
        raise RangeError("its values are negative or not finite; save it with values from 0 to 255")
    largest = values.max()
    if largest > 255:
        raise RangeError(f"its values go up to {largest:.3g}; save it with 8 bits")
    return (values * (255 if largest <= 1 else 1)).round().clip(0, 255).astype(np.uint8)
