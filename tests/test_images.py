"""Pictures as a viewer shows them, or refused; each from a real file."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffattack.data.images import read_image, read_mask, to_pixels

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (16, 16, 3), np.uint8)
OPACITY = RANDOM.integers(0, 256, (16, 16, 1), np.uint8)
GREY = np.tile(np.linspace(0, 255, 16).round(), (16, 1))  # (16, 16), from black to white
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRAMES = [Image.new("RGB", (16, 16), colour) for colour in ("black", "red", "blue")]


def saved(path, image, **options):
    image.save(path, **options)
    return path


def read(path) -> np.ndarray:
    return read_image(path, 16).astype(int)


def swapped() -> bytes:
    """sRGB with the primaries of red and blue exchanged, so that a viewer shows red as blue."""
    return SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def over_white(colours, opacity):
    return (colours.astype(float) * opacity + 255.0 * (255 - opacity)) / 255


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_profile_is_followed_whatever_the_format(tmp_path, capsys, suffix):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image, plain = Image.fromarray(COLOURS), tmp_path / f"plain.{suffix}"
    path = saved(tmp_path / f"a.{suffix}", image, icc_profile=swapped(), **options)
    assert abs(read(path)[..., ::-1] - read(saved(plain, image, **options))).mean() < 12
    line = f"/a.{suffix}: its colours are converted to sRGB by its colour profile (said"
    assert read(path).any() and capsys.readouterr().err.count(line) == 1


def test_srgb_leaves_every_number_as_it_is(tmp_path, capsys):
    image = Image.fromarray(COLOURS)
    assert np.array_equal(read(saved(tmp_path / "a.png", image, icc_profile=SRGB)), COLOURS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("profile, mode", [(SRGB[:200], "RGB"), (swapped(), "L")])
def test_a_profile_that_cannot_be_used_is_ignored(tmp_path, capsys, profile, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    path = saved(tmp_path / "a.png", image, icc_profile=profile)
    for _ in range(2):
        assert np.array_equal(read(path), np.asarray(image.convert("RGB")))
    text = capsys.readouterr().err
    assert text.count("note: ") == 1 and f"{tmp_path.name}/a.png: its colour profile is broken" in text


# ---------------------------------------------------------------- more than colours


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("darker", [1, 200])
def test_grey_of_sixteen_bits_is_scaled_by_its_type(tmp_path, capsys, suffix, darker):
    values = RANDOM.integers(0, 65536, (16, 16)).astype(np.uint16) // darker
    shown = read(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert abs(shown - values[..., None] / 257).max() <= 0.5
    assert "it is grey of 16 bits, of which 65535 is white" in capsys.readouterr().err


def test_opacity_is_laid_over_white(tmp_path, capsys):
    path = saved(tmp_path / "a.png", Image.fromarray(np.dstack([COLOURS, OPACITY])))
    assert abs(read(path) - over_white(COLOURS, OPACITY)).max() <= 1
    grey = saved(tmp_path / "g.png", Image.fromarray(np.dstack([COLOURS[..., :1], OPACITY]), "LA"))
    assert abs(read(grey) - over_white(COLOURS[..., :1], OPACITY)).max() <= 1
    assert capsys.readouterr().err.count("has transparent parts, which are laid on white") == 1
    opaque = saved(tmp_path / "o.png", Image.fromarray(np.dstack([COLOURS, np.full_like(OPACITY, 255)])))
    assert np.array_equal(read(opaque), COLOURS)


def test_a_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(read(path), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("suffix, form", [("gif", None), ("tif", None), ("jpg", "MPO")])
def test_the_first_of_several_frames_is_taken(tmp_path, capsys, suffix, form):
    """Of a photograph with a smaller copy beside it nothing is said."""
    path = saved(tmp_path / f"a.{suffix}", FRAMES[0], save_all=True, append_images=FRAMES[1:], format=form)
    for _ in range(2):
        assert read(path).max() <= 4
    text = capsys.readouterr().err
    assert text.count("it has several frames or pages, of which the first is taken") == (form is None)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "jpg"])
def test_damaged_files_are_refused_or_shown_and_nothing_else(tmp_path, capsys, suffix):
    """Whatever a decoder stumbles over."""
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(COLOURS))
    content, random = path.read_bytes(), np.random.default_rng(1)
    for _ in range(30):
        damaged = bytearray(content)
        for place in random.integers(0, min(len(content), 300), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged[: random.integers(20, len(content))])
        try:
            read(path)
        except OSError as error:
            assert str(error).startswith(path.name)
    assert all(line.startswith("note: ") for line in capsys.readouterr().err.splitlines())


def test_floats_a_folder_and_what_is_not_there(tmp_path):
    for kind in (np.float32, np.int32):
        path = saved(tmp_path / "a.tif", Image.fromarray(GREY.astype(kind)))
        with pytest.raises(OSError, match="a.tif is not a readable image .*floats or as integers of 32 bits"):
            read(path)
    (tmp_path / "folder.jpg").mkdir()
    for name in ("folder.jpg", "none.jpg"):
        with pytest.raises(OSError, match=f"{name} is not a readable image"):
            read(tmp_path / name)


# ---------------------------------------------------------------- tensors and masks


def test_levels_are_rounded_or_cut_off_as_in_the_original():
    image = torch.tensor([0.2, 99.4, 99.6, 254.9, 255.0, 300.0]).view(1, 1, 6).expand(3, 1, 6) / 255
    assert to_pixels(image)[0, :, 0].tolist() == [0, 99, 100, 255, 255, 255]
    assert to_pixels(image, truncated=True)[0, :, 0].tolist() == [0, 99, 99, 254, 255, 255]


def test_masks_that_are_nowhere_white_or_have_transparent_parts_are_refused(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY.astype(np.uint8)))
    assert np.allclose(read_mask(path, 16), GREY / 255)
    saved(path, Image.fromarray(np.dstack([COLOURS, OPACITY])))
    with pytest.raises(OSError, match="the mask a.png has transparent parts, which may mean either"):
        read_mask(path, 16)
    saved(path, Image.new("L", (16, 16), 100))
    with pytest.raises(OSError, match="the mask a.png is white nowhere"):
        read_mask(path, 16)
