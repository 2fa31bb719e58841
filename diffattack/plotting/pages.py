"""What the pages share: templates that Jinja2 fills in, escaping what it fills in, and pictures as part of a
page, so that it asks no network for anything. What they look like is in page_base.html.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffattack.data.images import replacing
from diffattack.evaluation.tables import in_words
from diffattack.plotting.image_figures import decibels

# scale and WebP quality, tried in this order
QUALITIES = [(1, 95), (1, 90), (1, 80), (1, 65), (1, 50), (0.7, 50), (0.5, 50), (0.35, 40), (0.25, 30)]


def write_filled(path: Path, template: str, **content: object) -> None:
    """Writes a page: a template of this folder, filled in.

    Raises:
        OSError: the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"in_words": in_words, "decibels": decibels}
    page = environment.get_template(template).render(**content)
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file name need not be Unicode


def encode(pictures: Sequence[np.ndarray], budget: int, lossless: bool = False) -> list[str]:
    """Data URLs of pictures, uint8 `(H, W, 3)`: WebP at the best quality with which all of them together keep
    to the budget in bytes; without any loss where that is asked for and the budget allows it.
    """
    for scale, quality in [(1, None)] * lossless + QUALITIES:
        files = []
        options = {"lossless": True} if quality is None else {"quality": quality}
        for picture in map(Image.fromarray, pictures):
            out = io.BytesIO()
            size = [max(1, round(side * scale)) for side in picture.size]
            picture.resize(size, Image.LANCZOS).save(out, "WEBP", **options)
            files.append(out.getvalue())
        if sum(map(len, files)) <= budget:
            break
    return [data_url(file, "image/webp") for file in files]


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
