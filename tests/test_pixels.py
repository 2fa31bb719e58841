"""Wrong pixels without a word: colour profiles, 16 bits, animations, and what libraries say of broken files.
Every picture is a file that a common program could have written.
"""

import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from conftest import MAIN, ROOT, flags
from PIL import Image, ImageCms

from common.errors import relay_findings
from data.images import read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SHADES = np.tile(np.linspace(20, 235, 16).round(), (16, 1))
RGB = np.stack([SHADES, SHADES.T, SHADES[::-1]], -1).astype(np.uint8)


@pytest.fixture(autouse=True)
def findings_are_said_anew():
    import common.errors

    common.errors._found.cache_clear()
    common.errors._said.clear()
    relay_findings(None)


def swapped() -> bytes:
    """sRGB with the primaries of red and blue exchanged, so that numbers mean other colours."""
    profile = bytearray(SRGB)
    count = struct.unpack(">I", profile[128:132])[0]
    for k in range(count):
        place = 132 + 12 * k
        name = bytes(profile[place : place + 4])
        if name in (b"rXYZ", b"bXYZ"):
            profile[place : place + 4] = b"bXYZ" if name == b"rXYZ" else b"rXYZ"
    return bytes(profile)


def profile_of_greys(gamma: float) -> bytes:
    """A grey profile of version 2 with a pure power as its curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(256 * gamma))
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(8 + 4 + 67 + 3)
    tags, place, data = [], 128 + 4 + 36, b""
    for name, content in ((b"desc", text), (b"wtpt", white), (b"kTRC", curve)):
        content += bytes(-len(content) % 4)
        tags.append(struct.pack(">4s2I", name, place + len(data), len(content)))
        data += content
    head = struct.pack(">I4sI4s4s4s", place + len(data), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(tags)) + b"".join(tags) + data


def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path, image.size[0]).astype(int)


def chunked(path, kind: bytes, content: bytes, after: bytes = b"IHDR"):
    """Puts a chunk into a PNG."""
    data = path.read_bytes()
    place = data.index(after) - 4
    place += 12 + struct.unpack(">I", data[place : place + 4])[0]
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data[:place] + chunk + data[place:])
    return path


# ---------------------------------------------------------------- colour profiles


@pytest.mark.parametrize(
    "suffix, options",
    [("jpg", {"quality": 100, "subsampling": 0}), ("png", {}), ("tif", {}), ("webp", {"lossless": True})],
)
def test_colours_are_those_of_the_profile(tmp_path, suffix, options):
    image = Image.fromarray(np.full((16, 16, 3), (171, 147, 139), np.uint8))
    read = saved(tmp_path / f"a.{suffix}", image, icc_profile=swapped(), **options)
    assert abs(read - (139, 147, 171)).max() <= 2


def test_an_srgb_profile_changes_nothing(tmp_path):
    assert np.array_equal(saved(tmp_path / "a.png", Image.fromarray(RGB), icc_profile=SRGB), RGB)


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB with a transparent colour"])
def test_a_profile_beside_opacity_and_palettes(tmp_path, mode):
    image = Image.fromarray(np.full((16, 16, 3), (171, 147, 139), np.uint8))
    options = {"icc_profile": swapped()}
    expected = np.array((139, 147, 171))
    if mode == "RGBA":
        image.putalpha(128)
        expected = expected * 128 / 255 + 127
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        options["transparency"] = (1, 2, 3)
    assert abs(saved(tmp_path / "a.png", image, **options) - expected).max() <= 2


def test_grey_pictures_with_a_profile_of_their_own_or_of_colours(tmp_path, capsys):
    grey = Image.fromarray(SHADES.astype(np.uint8))
    linear = saved(tmp_path / "a.png", grey, icc_profile=profile_of_greys(1.0))[..., 0]
    light = SHADES / 255
    expected = 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)
    assert abs(linear - expected).max() <= 2
    assert abs(saved(tmp_path / "b.png", grey, icc_profile=swapped())[..., 0] - SHADES).max() <= 2
    assert capsys.readouterr().err == ""


def test_ink_with_a_profile(tmp_path, capsys):
    """There is no CMYK profile to be had everywhere: one that does not fit is said, and ignored."""
    ink = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (0, 255, 255, 0)])  # red
    read = saved(tmp_path / "a.jpg", ink, icc_profile=SRGB, quality=100)
    assert read[..., 0].min() > 245 and read[..., 1:].max() < 10
    reason = "it is for RGB colours, and the picture has CMYK"
    assert capsys.readouterr().err == f"note: a.jpg: its colour profile is ignored, since {reason}\n"


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], b"\0" * 500])
def test_a_broken_profile_is_said_and_ignored(tmp_path, capsys, profile):
    assert np.array_equal(saved(tmp_path / "a.png", Image.fromarray(RGB), icc_profile=profile), RGB)
    said = capsys.readouterr().err
    assert said.startswith("note: a.png: its colour profile is ignored, since it") and said.count("\n") == 1


def test_gamma_of_png_without_a_profile(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    linear = chunked(tmp_path / "a.png", b"gAMA", struct.pack(">I", 100000))
    expected = 255 * (RGB / 255) ** (1 / 2.2)
    assert abs(read_image(linear, 16) - expected).max() <= 1
    Image.fromarray(RGB).save(tmp_path / "b.png")
    usual = chunked(tmp_path / "b.png", b"gAMA", struct.pack(">I", 45455))
    assert np.array_equal(read_image(usual, 16), RGB)


# ---------------------------------------------------------------- more than 8 bits

DEEP = RGB.astype(np.uint16)
BIG = np.tile(RGB, (8, 8, 1))  # JPEG 2000 wants more pixels


def deep_png(path, values, significant=None):
    channels = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(values.shape[-1] if values.ndim == 3 else 1)
    cv2.imwrite(str(path), values if channels is None else np.ascontiguousarray(values[..., channels]))
    return (
        path if significant is None else chunked(path, b"sBIT", bytes([significant] * (3 if channels else 1)))
    )


WRITERS = {
    "png": deep_png,
    "tif": lambda path, values: tifffile.imwrite(path, values, photometric="rgb"),
    "big.tif": lambda path, values: tifffile.imwrite(path, values, photometric="rgb", byteorder=">"),
    "planar.tif": lambda path, values: tifffile.imwrite(
        path, values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    ),
    "zip.tif": lambda path, values: tifffile.imwrite(
        path, values, photometric="rgb", compression="zlib", compressionargs={"level": 6}
    ),
    "lzw.tif": lambda path, values: cv2.imwrite(
        str(path), values[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW]
    ),
    "ppm": lambda path, values: path.write_bytes(b"P6\n128 128\n65535\n" + values.astype(">u2").tobytes()),
    "jp2": lambda path, values: cv2.imwrite(
        str(path), values[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_all_16_bits_are_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, BIG.astype(np.uint16) * 257)
    assert abs(read_image(path, 128).astype(int) - BIG).max() <= 1
    WRITERS[kind](path, BIG.astype(np.uint16) // 4 * 257)  # dark, but scaled
    assert abs(read_image(path, 128).astype(int) - BIG // 4).max() <= 1


@pytest.mark.parametrize("kind", WRITERS)
def test_12_bits_of_16_are_refused_with_both_readings(tmp_path, kind):
    values = BIG.astype(np.uint16) * 16 + 3
    values[5, 5] = 65535  # a hot pixel
    WRITERS[kind](tmp_path / f"a.{kind}", values)
    readings = "cannot be shown: .*12 or fewer.*with 12 bits its mean is .* with 16 it is"
    with pytest.raises(OSError, match=readings):
        read_image(tmp_path / f"a.{kind}", 128)


def test_12_bits_are_read_where_the_file_says_so(tmp_path):
    values = DEEP * 16 + 3
    expected = (values * (255 / 4095)).round()
    tags = [(341, "H", 3, (4095, 4095, 4095), False)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=tags)
    assert abs(read_image(tmp_path / "a.tif", 16) - expected).max() <= 1
    assert abs(read_image(deep_png(tmp_path / "a.png", values, 12), 16) - expected).max() <= 1
    grey = values[..., 0]
    assert abs(read_image(deep_png(tmp_path / "g.png", grey, 12), 16)[..., 0] - expected[..., 0]).max() <= 1
    (tmp_path / "a.ppm").write_bytes(b"P6\n# made\n16 16\n4095\n" + values.astype(">u2").tobytes())
    assert abs(read_image(tmp_path / "a.ppm", 16) - expected).max() <= 1


def test_significant_bits_that_are_scaled_as_png_says(tmp_path):
    values = DEEP * 16  # of 12 bits
    scaled = (values << 4) | (values >> 8)
    assert abs(read_image(deep_png(tmp_path / "a.png", scaled, 12), 16).astype(int) - RGB).max() <= 1
    dark = scaled // 16 // 16 * 16
    assert read_image(deep_png(tmp_path / "d.png", dark, 12), 16).max() <= 16


def test_values_above_what_the_file_calls_white_are_refused(tmp_path):
    tags = [(341, "H", 3, (4095, 4095, 4095), False)]
    tifffile.imwrite(tmp_path / "a.tif", DEEP * 257, photometric="rgb", extratags=tags)
    with pytest.raises(OSError, match="says that 4095 is white, and has values up to"):
        read_image(tmp_path / "a.tif", 16)


@pytest.mark.parametrize("channels", ["RGBA", "LA"])
def test_16_bits_with_opacity(tmp_path, channels):
    alpha = np.full((16, 16, 1), 128 * 257, np.uint16)
    if channels == "RGBA":
        deep_png(tmp_path / "a.png", np.concatenate([DEEP * 257, alpha], -1))
        expected = RGB.astype(float) * 128 / 255 + 127
    else:
        values = np.concatenate([DEEP[..., :1] * 257, alpha], -1).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        path = tmp_path / "a.png"
        Image.new("L", (16, 16)).save(path)
        data = path.read_bytes()
        header = struct.pack(">2I5B", 16, 16, 16, 4, 0, 0, 0)
        pieces = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        path.write_bytes(
            data[:8]
            + b"".join(
                struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in pieces
            )
        )
        expected = RGB[..., :1].astype(float) * 128 / 255 + 127
    assert abs(read_image(tmp_path / "a.png", 16) - expected).max() <= 2


def test_16_bits_are_turned_and_have_their_profile(tmp_path):
    tags = [(274, "H", 1, 6, True), (34675, 7, len(swapped()), swapped(), True)]
    tifffile.imwrite(tmp_path / "a.tif", DEEP * 257, photometric="rgb", extratags=tags)
    upright = np.rot90(RGB, -1)
    assert abs(read_image(tmp_path / "a.tif", 16).astype(int) - upright[..., ::-1]).max() <= 3


# ---------------------------------------------------------------- frames and warnings


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_frames_are_said_once(tmp_path, capsys, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("black", "red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    for _ in range(2):
        assert read_image(tmp_path / f"a.{suffix}", 16).max() == 0
    assert capsys.readouterr().err == f"note: a.{suffix} has 3 frames or pages, of which the first is taken\n"


def test_a_phones_photo_with_its_preview_is_a_photo(tmp_path, capsys):
    photo = Image.fromarray(RGB)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photo.resize((8, 8))])
    read_image(tmp_path / "a.jpg", 16)
    assert capsys.readouterr().err == ""


def test_warnings_of_a_kind_are_one_line(tmp_path, capsys):
    for name in "ab":
        image = Image.fromarray(RGB)
        exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\xff\xff\xff\xff"  # ends in the middle of a tag
        image.save(tmp_path / f"{name}.jpg", exif=exif)
        read_image(tmp_path / f"{name}.jpg", 16)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: a.jpg: ")


def test_pipes_and_folders_are_no_pictures(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png", "none.png"):
        with pytest.raises(OSError, match=f"{name} is not a readable image"):
            read_image(tmp_path / name, 16)


def test_what_processes_find_in_files_is_said_once(data, quick, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for k in range(4):
        frames = [Image.open(data / f"images/img{k}.png"), Image.new("RGB", (96, 96))]
        frames[0].save(images / f"img{k}.png", save_all=True, append_images=frames[1:])
    command = flags(
        data, tmp_path / "out", "--images_root", images, "--model_name", quick, "--processes", "2"
    )
    result = subprocess.run([*MAIN, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [result.stderr.count(f"img{k}.png has 2 frames") for k in range(4)] == [1] * 4
