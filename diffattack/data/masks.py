"""A user's own masks, one a picture, in a folder that looks like that of the pictures: `cat/img1.jpg` has the
mask `cat/img1.png`, or any other kind of image of that name. White: may change; black: stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffattack.common.errors import InputError
from diffattack.data.dataset import Item
from diffattack.data.images import IMAGE_SUFFIXES, opened, read_image

WHITE_FROM = 128  # a mask that is nowhere as bright says nothing that can be meant


def masks_of(folder: Path, images_root: Path, items: Sequence[Item]) -> dict[int, Path]:
    """The mask of each picture, by its index.

    Raises:
        InputError: there is no folder, or no mask for a picture.
    """
    if not folder.is_dir():
        raise InputError(f"--mask_root: there is no folder {str(folder)!r}; give a folder of masks")
    found, missing = {}, []
    for item in items:
        place = folder / item.path.relative_to(images_root)
        paths = (place.with_suffix(suffix) for suffix in (place.suffix, *IMAGE_SUFFIXES))
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            missing.append(place.relative_to(folder).with_suffix(".png"))
        else:
            found[item.index] = path
    if missing:
        raise InputError(
            f"--mask_root: {str(folder)!r} has no mask for {len(missing)} of {len(items)} pictures, such as "
            f"{str(missing[0])!r}; white is where a picture may change, so one all in white leaves it free"
        )
    return found


def read_mask(path: Path, size: int) -> np.ndarray:
    """Float32 `(size, size)` in [0, 1], resized like the pictures.

    Raises:
        OSError: it cannot be read, is black all over, or has transparent parts, by which some tools mean what
            may change and others what may not.
    """
    with opened(path) as file:
        is_opaque = (
            not file.has_transparency_data or file.convert("RGBA").getchannel("A").getextrema()[0] == 255
        )
    if not is_opaque:
        raise OSError(
            f"the mask {path.name} has transparent parts, which may mean either; save it without, white "
            f"where a picture may change"
        )
    grey = read_image(path, size).mean(-1)
    if grey.max() < WHITE_FROM:
        raise OSError(
            f"the mask {path.name} is nowhere brighter than {grey.max():.0f} of 255, and white is where a "
            f"picture may change"
        )
    return (grey / 255).astype(np.float32)
