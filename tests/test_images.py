"""Pictures as a viewer shows them, or refused; each from a real file."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageChops

from diffattack.data.images import read_image, to_pixels
from diffattack.data.masks import read_mask

GREY = np.tile(np.linspace(0, 255, 16).round(), (16, 1))  # (16, 16), from black to white


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "values",
    [
        (GREY / 255).astype(np.float32),
        GREY.astype(np.float32),
        (GREY * 257).astype(np.uint16),
        GREY.astype(np.uint8),
    ],
)
def test_grey_values_of_every_range(tmp_path, values):
    read = read_image(saved(tmp_path / "a.tif", Image.fromarray(values)), 16)
    assert np.array_equal(read, np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize(
    "values, message",
    [
        ((GREY * 16).astype(np.uint16), "12 or fewer"),
        ((GREY * 10).astype(np.float32), "go up to 2.55e"),
        ((GREY - 10).astype(np.float32), "negative or not finite"),
        ((GREY + np.nan).astype(np.float32), "negative or not finite"),
        ((GREY * 1e5).astype(np.int32), "go up to"),
    ],
)
def test_grey_values_of_no_known_range_are_refused(tmp_path, values, message):
    with pytest.raises(OSError, match=f"a.tif cannot be shown: .*{message}"):
        read_image(saved(tmp_path / "a.tif", Image.fromarray(values)), 16)


def test_lab(tmp_path):
    lab = np.zeros((16, 16, 3), np.uint8)
    lab[..., 0] = 255 * 53 // 100  # the lightness of middle grey
    image = Image.frombytes("LAB", (16, 16), lab.tobytes())
    read = read_image(saved(tmp_path / "a.tif", image), 16).astype(int)
    assert abs(read - 127).max() <= 4


def test_cmyk_with_and_without_adobes_inversion(tmp_path):
    """Adobe writes the complement of the ink, and says so by its marker; Pillow writes its marker, too."""
    ink = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (0, 255, 255, 0)])  # red
    adobe = saved(tmp_path / "adobe.jpg", ink, quality=100)
    content = adobe.read_bytes()
    place = content.index(b"\xff\xee")
    length = int.from_bytes(content[place + 2 : place + 4], "big")
    (tmp_path / "bare.jpg").write_bytes(content[:place] + content[place + 2 + length :])
    inverted = saved(tmp_path / "inverted.jpg", ImageChops.invert(ink), quality=100).read_bytes()
    place = inverted.index(b"\xff\xee")
    (tmp_path / "plain.jpg").write_bytes(inverted[:place] + inverted[place + 2 + length :])
    red = [read_image(tmp_path / name, 16).reshape(-1, 3).mean(0) for name in ("adobe.jpg", "plain.jpg")]
    for colour in red:
        assert colour[0] > 245 and colour[1:].max() < 10
    assert read_image(tmp_path / "bare.jpg", 16)[..., 0].mean() < 10


def test_opacity_whether_colours_are_multiplied_by_it_or_not(tmp_path):
    colour = np.zeros((16, 16, 4), np.uint8)
    colour[..., 0], colour[..., 3] = 200, 128
    straight = saved(tmp_path / "straight.png", Image.fromarray(colour))
    colour[..., 0] = 200 * 128 // 255
    multiplied = tmp_path / "multiplied.tif"
    tifffile.imwrite(multiplied, colour, photometric="rgb", extrasamples=["assocalpha"])
    expected = [200 * 128 // 255 + 127, 127, 127]
    for path in (straight, multiplied):
        assert abs(read_image(path, 16).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("suffix, form", [(".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000")])
def test_suffixes_of_the_field(tmp_path, suffix, form):
    image = Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8))
    read = read_image(saved(tmp_path / f"a{suffix}", image, format=form), 16)
    assert abs(read.astype(int) - (200, 100, 50)).max() <= 4


def test_levels_are_rounded_or_cut_off_as_in_the_original():
    image = torch.tensor([0.2, 99.4, 99.6, 254.9, 255.0, 300.0]).view(1, 1, 6).expand(3, 1, 6) / 255
    assert to_pixels(image)[0, :, 0].tolist() == [0, 99, 100, 255, 255, 255]
    assert to_pixels(image, truncated=True)[0, :, 0].tolist() == [0, 99, 99, 254, 255, 255]


def test_a_mask_with_transparent_parts_is_refused(tmp_path):
    opacity = Image.new("L", (8, 8), 255)
    mask = Image.new("RGBA", (8, 8), "white")
    mask.putalpha(opacity)
    mask.save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png", 8) == 1).all()
    opacity.paste(0, (0, 0, 8, 4))
    mask.putalpha(opacity)
    mask.save(tmp_path / "a.png")
    with pytest.raises(OSError, match="the mask a.png has transparent parts, which may mean either"):
        read_mask(tmp_path / "a.png", 8)
