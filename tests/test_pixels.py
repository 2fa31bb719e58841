"""Pictures of more than 8 bits, animations, and what libraries say of files; each from a real file."""

import io
import os
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from diffattack.common.errors import said_of_images
from diffattack.common.parallel import run_in_processes
from diffattack.data.images import read_image

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (64, 64, 3), np.uint8)
OPACITY = RANDOM.integers(0, 256, (64, 64, 1), np.uint8)
TWELVE = RANDOM.integers(0, 4096, (64, 64, 3)).astype(np.uint16)  # twelve bits


def read(path) -> np.ndarray:
    return read_image(path, 64).astype(int)


@pytest.fixture
def said(capsys):
    said_of_images.clear()
    return lambda: capsys.readouterr().err


def png(path, values, significant=None):
    """Written by libpng; with an sBIT chunk where it is given."""
    content = imagecodecs.png_encode(np.ascontiguousarray(values))
    if significant is not None:
        chunk = b"sBIT" + significant
        chunk = struct.pack(">I", len(significant)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        content = content[:33] + chunk + content[33:]
    path.write_bytes(content)
    return path


def tiff(path, values, **options):
    tifffile.imwrite(path, values, **{"photometric": "rgb", **options})
    return path


def over_white(colours, opacity):
    return (colours.astype(float) * opacity + 255.0 * (255 - opacity)) / 255


# ---------------------------------------------------------------- full range, as before


@pytest.mark.parametrize("darker", [1, 20, 200])
def test_eight_bits_made_sixteen_are_what_they_were_however_dark(tmp_path, darker):
    dark = COLOURS // darker
    for factor in (257, 256):
        deep = dark.astype(np.uint16) * factor
        assert abs(read(png(tmp_path / "a.png", deep)) - dark).max() <= 1
        assert abs(read(tiff(tmp_path / "a.tif", deep)) - dark).max() <= 1
        assert abs(read(png(tmp_path / "g.png", deep[..., 0])) - dark[..., :1]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib", "predictor": True, "byteorder": ">"},
        {"tile": (16, 16)},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "zlib", "predictor": True},
        {"bigtiff": True},
    ],
)
def test_tiffs_of_sixteen_bits_of_every_layout(tmp_path, options):
    deep = RANDOM.integers(0, 65536, (64, 64, 3)).astype(np.uint16)
    written = np.moveaxis(deep, 2, 0).copy() if "planarconfig" in options else deep
    assert abs(read(tiff(tmp_path / "a.tif", written, **options)) - deep / 257).max() <= 0.51


def test_opacity_of_sixteen_bits_is_laid_over_white(tmp_path):
    both = np.dstack([COLOURS, OPACITY]).astype(np.uint16) * 257
    expected = over_white(COLOURS, OPACITY)
    assert abs(read(png(tmp_path / "a.png", both)) - expected).max() <= 1
    assert abs(read(tiff(tmp_path / "a.tif", both, extrasamples=["unassalpha"])) - expected).max() <= 1
    multiplied = both.copy()
    multiplied[..., :3] = (both[..., :3] * (OPACITY / 255)).round()
    path = tiff(tmp_path / "m.tif", multiplied, extrasamples=["assocalpha"])
    assert abs(read(path) - expected).max() <= 1
    other = tiff(tmp_path / "x.tif", both, extrasamples=["unspecified"])  # no opacity, whatever it is
    assert abs(read(other) - COLOURS).max() <= 1
    grey = np.dstack([both[..., 0], both[..., 3]])
    expected = over_white(COLOURS[..., :1], OPACITY)
    assert abs(read(png(tmp_path / "g.png", grey)) - expected).max() <= 1
    path = tiff(
        tmp_path / "g.tif", grey, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"
    )
    assert abs(read(path) - expected).max() <= 1


def test_a_colour_of_sixteen_bits_that_is_clear(tmp_path):
    """tRNS means that very colour, not those of the same upper bytes."""
    deep = np.full((64, 64, 3), 40000, np.uint16)
    deep[:32] += 1
    chunk = b"tRNS" + struct.pack(">3H", 40000, 40000, 40000)
    chunk = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = imagecodecs.png_encode(deep)
    place = content.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(content[:place] + chunk + content[place:])
    shown = read(tmp_path / "a.png")
    assert shown[0, 0].tolist() == [156] * 3 and shown[63, 63].tolist() == [255] * 3


def test_rotation_of_sixteen_bits(tmp_path):
    deep = np.zeros((64, 64, 3), np.uint16)
    deep[:32] = 65535  # turned clockwise the upper half is the right one
    shown = read(tiff(tmp_path / "a.tif", deep, extratags=[(274, "H", 1, 6, True)]))
    assert shown[32, 60].tolist() == [255] * 3 and shown[32, 4].tolist() == [0] * 3


def test_white_is_zero_and_inks(tmp_path):
    grey = np.tile(np.linspace(0, 65535, 64), (64, 1)).round().astype(np.uint16)
    shown = read(tiff(tmp_path / "a.tif", grey, photometric="miniswhite"))
    assert abs(shown[..., 0] - (65535 - grey.astype(int)) / 257).max() <= 1
    ink = RANDOM.integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "8.tif")
    deep = tiff(tmp_path / "16.tif", ink.astype(np.uint16) * 257, photometric="separated")
    assert abs(read(deep) - read(tmp_path / "8.tif")).max() <= 1


SMALL = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_bands_that_do_not_say_which_are_colours_are_refused(tmp_path, kind):
    values = SMALL.astype(kind) * {"u1": 1, "u2": 257, "f4": 1 / 255}[kind]
    tifffile.imwrite(tmp_path / "a.tif", values.astype(kind), photometric="minisblack", planarconfig="contig")
    with pytest.raises(OSError, match="3 bands of grey and does not say which are red"):
        read_image(tmp_path / "a.tif", 8)


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_smaller_copy_in_front_is_not_the_picture(tmp_path, kind):
    values = SMALL.astype(kind) * (257 if kind == "u2" else 1)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(np.zeros((4, 4, 3), kind), photometric="rgb", subfiletype=1)
        tiff.write(values, photometric="rgb", subfiletype=0)
    assert np.array_equal(read_image(tmp_path / "a.tif", 8), SMALL)


@pytest.mark.parametrize("suffix", ["png", "tga", "tif", "16.tif"])
def test_opacity_that_is_nowhere_is_none(tmp_path, suffix, said):
    path, values = tmp_path / f"a.{suffix}", np.dstack([SMALL, np.zeros((8, 8), np.uint8)])
    if suffix == "16.tif":  # whose opacity is of 8 bits
        values = np.dstack([SMALL.astype("u2") * 257, np.full((8, 8), 255, "u2")])
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=["unassalpha"])
    else:
        Image.fromarray(values).save(path)
    assert np.array_equal(read_image(path, 8), SMALL)
    assert "transparent all over" in said()


def test_floats_in_colour(tmp_path):
    for values in (COLOURS / 255, COLOURS.astype(float)):
        for kind in (np.float32, np.float64):
            assert abs(read(tiff(tmp_path / "a.tif", values.astype(kind))) - COLOURS).max() <= 1
    values = (COLOURS / 255).astype(np.float32)
    values[3, 5] = 40  # a highlight, or a hot pixel
    shown = read(tiff(tmp_path / "a.tif", values))
    assert abs(shown - COLOURS).max(-1)[5:].max() <= 1 and shown[3, 5].tolist() == [255] * 3
    with pytest.raises(OSError, match="neither 1 nor 255"):
        read(tiff(tmp_path / "a.tif", (10 * (COLOURS / 255)).astype(np.float32)))


# ---------------------------------------------------------------- fewer bits than there are


def hot(values):
    values = values.copy()
    values[7, 9] = 65535
    return values


@pytest.mark.parametrize("change", [lambda values: values, hot], ids=["as it is", "with a hot pixel"])
@pytest.mark.parametrize("kind", ["a.png", "a.tif", "g.png", "g.tif", "alpha.png", "a.ppm", "a.jp2"])
def test_twelve_bits_in_sixteen_are_refused_with_both_readings(tmp_path, kind, change):
    path, values = tmp_path / kind, change(TWELVE)
    if kind == "a.ppm":
        path.write_bytes(b"P6\n64 64\n65535\n" + values.astype(">u2").tobytes())
    elif kind == "a.jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True))
    elif kind == "alpha.png":
        png(path, np.dstack([values, np.full((64, 64), 65535, np.uint16)]))
    else:
        values = values if kind[0] == "a" else values[..., 0]
        if kind.endswith("png"):
            png(path, values)
        else:
            tiff(path, values, photometric="rgb" if kind[0] == "a" else "minisblack")
    message = "cannot be shown: .*12 or fewer.*over 0 to 65535 its mean is .* over 0 to 4095 it is 12"
    with pytest.raises(OSError, match=message):
        read(path)


def test_fourteen_bits_and_a_scale_bar(tmp_path):
    with pytest.raises(OSError, match="14 or fewer"):
        read(png(tmp_path / "a.png", TWELVE * 4))
    values = TWELVE.copy()
    values[50:54, 10:50] = 65535
    with pytest.raises(OSError, match="12 or fewer but for 160 pixels"):
        read(png(tmp_path / "a.png", values))


def test_a_picture_with_a_few_bright_places_is_a_dark_picture(tmp_path):
    values = RANDOM.integers(0, 3000, (64, 64, 3)).astype(np.uint16)
    values[20:24, 20:24] = RANDOM.integers(20000, 65536, (4, 4, 3))  # lamps
    assert abs(read(png(tmp_path / "a.png", values)) - values / 257).max() <= 0.51


@pytest.mark.parametrize("tag", [281, 341])
def test_what_a_tiff_says_its_largest_number_is(tmp_path, tag):
    for values in (TWELVE, hot(TWELVE)):
        extra = [(tag, "H", 3, (4095, 4095, 4095), True)]
        shown = read(tiff(tmp_path / "a.tif", values, extratags=extra))
        assert abs(shown - (values / 4095 * 255).clip(0, 255)).max() <= 0.51
    with pytest.raises(OSError, match="12 or fewer"):  # what its pixels reach says nothing of the range
        read(tiff(tmp_path / "a.tif", TWELVE // 2, extratags=[(tag, "H", 3, (2047 - 9,) * 3, True)]))


def test_what_a_png_says_its_bits_are(tmp_path):
    """By the format they are the upper ones; a file that has them below breaks it, and means them."""
    below = read(png(tmp_path / "a.png", TWELVE, bytes([12, 12, 12])))
    assert abs(below - TWELVE / 4095 * 255).max() <= 0.51
    dark = TWELVE // 32
    for upper in (dark << 4, dark << 4 | dark >> 8, (dark * 65535 / 4095).round().astype(np.uint16)):
        assert abs(read(png(tmp_path / "a.png", upper, bytes([12, 12, 12]))) - upper / 257).max() <= 0.51


def test_formats_that_know_their_bits(tmp_path):
    expected = TWELVE / 4095 * 255
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 # twelve bits\n64 64\n4095\n" + TWELVE.astype(">u2").tobytes())
    assert abs(read(path) - expected).max() <= 0.51
    path.write_bytes(b"P3\n64 64\n4095\n# plain\n" + " ".join(map(str, TWELVE.ravel())).encode())
    assert abs(read(path) - expected).max() <= 0.51
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n64 64\n4095\n" + (TWELVE[..., 0] // 8).astype(">u2").tobytes())
    assert abs(read(path) - (TWELVE[..., :1] // 8) / 4095 * 255).max() <= 0.51  # dark, and said to be
    path = tmp_path / "a.jp2"
    for values in (TWELVE, TWELVE[..., 0]):
        content = imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(values), level=0, bitspersample=12, reversible=True
        )
        path.write_bytes(content)
        expected = np.atleast_3d(values) / 4095 * 255
        assert abs(read(path) - expected).max() <= 0.51


# ---------------------------------------------------------------- what is said


FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("black", "red", "blue")]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif", "tif"])
def test_frames_that_are_not_taken_are_said_once_a_picture(tmp_path, said, suffix):
    for name in ("a", "b"):
        path = tmp_path / f"{name}.{suffix}"
        FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
        for _ in range(2):
            assert read(path).max() <= 4
    text = said()
    what = "pages" if suffix == "tif" else "frames"
    for name in ("a", "b"):
        assert text.count(f"/{name}.{suffix}: it has 3 {what}, of which the first is taken") == 1
    assert text.count("\n") == 2


def test_photographs_with_something_beside_them_are_no_animations(tmp_path, said):
    FRAMES[1].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=FRAMES[2:], quality=95)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.format == "MPO" and file.n_frames == 2
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(COLOURS, photometric="rgb")
        file.write(COLOURS[::4, ::4], photometric="rgb", subfiletype=1)  # a thumbnail
    FRAMES[1].save(tmp_path / "a.gif")
    for name in ("a.jpg", "a.tif", "a.gif"):
        read(tmp_path / name)
    assert said() == ""


def test_an_animation_that_is_cut_short_is_said(tmp_path, said):
    noise = [Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    noise[0].save(tmp_path / "a.gif", save_all=True, append_images=noise[1:])
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: len(content) * 2 // 3])
    read(tmp_path / "a.gif")
    assert "of which the first is taken" in said()


def test_what_libraries_warn_of_is_one_line_a_kind(tmp_path, said, recwarn, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(buffer.getvalue())
        read(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    for name in ("c.png", "d.png"):
        Image.fromarray(COLOURS).save(tmp_path / name)
        read(tmp_path / name)
    lines = said().splitlines()
    assert len(lines) == 2 and not recwarn.list
    assert "a.jpg: Corrupt EXIF data" in lines[0] and "c.png: Image size (4096 pixels)" in lines[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path in (png(tmp_path / "e.png", TWELVE), tiff(tmp_path / "f.tif", TWELVE.astype(np.float32))):
        with pytest.raises(OSError, match=f"{path.name} is not a readable image .*4096|64 x 64"):
            read(path)


def test_what_is_no_file_neither_hangs_nor_ends_in_a_traceback(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, message in (
        ("fifo.jpg", "no ordinary file"),
        ("folder.jpg", "a folder"),
        ("none.jpg", "No such"),
    ):
        with pytest.raises(OSError, match=f"{name} is not a readable image .*{message}"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "tif", "8.tif", "jp2", "ppm", "gif", "webp", "jpg"])
def test_damaged_files_are_refused_or_shown_and_nothing_else(tmp_path, suffix, capfd):
    """Whatever a decoder stumbles over."""
    path = tmp_path / f"a.{suffix}"
    deep = RANDOM.integers(0, 65536, (64, 64, 3)).astype(np.uint16)
    if suffix == "png":
        png(path, deep)
    elif suffix == "tif":
        tiff(path, deep, compression="lzw", predictor=True)
    elif suffix == "8.tif":
        tiff(path, COLOURS, compression="lzw")  # which Pillow has libtiff read
    elif suffix == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(deep, level=0))
    elif suffix == "ppm":
        path.write_bytes(b"P6\n64 64\n65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(COLOURS).save(path)
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
    assert all(line.startswith("note: ") for line in capfd.readouterr().err.splitlines())


def read_all(paths) -> None:
    for path in paths:
        read_image(path, 32)


@pytest.mark.slow
def test_of_several_processes_each_picture_is_said_once_by_the_one_that_started_them(tmp_path, capfd):
    said_of_images.clear()
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    paths = [tmp_path / name for name in ("a.gif", "b.gif", "c.jpg", "d.jpg")]
    for path in paths[:2]:
        FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
    for path in paths[2:]:
        path.write_bytes(buffer.getvalue())
    run_in_processes(read_all, [(paths,), (paths[::-1],)])
    read_all(paths)  # as where a process was killed
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert sum("3 frames" in line for line in lines) == 2 and sum("EXIF" in line for line in lines) == 1
    assert len(lines) == 3 and all(line.startswith("note: ") for line in lines)
