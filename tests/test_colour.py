"""Colour profiles, each in a real file; what a picture should look like is worked out by Pillow's ImageCms,
or by hand.
"""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from diffattack.common.errors import said_of_images
from diffattack.data.images import read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ADOBE = imagecodecs.cms_profile("adobergb")
LINEAR_GREY = imagecodecs.cms_profile("gray", gamma=1.0)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def swapped() -> bytes:
    """sRGB with the primaries of red and blue exchanged, so that a viewer shows red as blue."""
    return SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def all_black() -> bytes:
    """A profile whose white point and primaries were lost."""
    profile = bytearray(SRGB)
    for name in (b"rXYZ", b"gXYZ", b"bXYZ"):
        entry = SRGB.index(name)
        place = int.from_bytes(SRGB[entry + 4 : entry + 8], "big")
        profile[place + 8 : place + 20] = bytes(12)
    return bytes(profile)


def inks() -> bytes:
    """A CMYK profile by hand, as ICC.1:2001 has it: L* falls with the inks and from 100 to 0 with black, a*
    and b* are those of no colour but where cyan or yellow are.
    """
    table = bytearray()
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    light = 0 if k else 255 - 60 * (c + m + y)
                    table += bytes([light, 128 + 60 * (m - c) * (1 - k), 128 + 60 * (y - c) * (1 - k)])
    ramp = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0"
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    )
    lut += 4 * ramp + bytes(table) + 3 * ramp
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1, 0.8249)))
    parts, tags, place = (
        [(b"desc", text), (b"wtpt", white), (b"A2B0", lut), (b"A2B1", lut)],
        b"",
        128 + 4 + 4 * 12,
    )
    body = b""
    for name, content in parts:
        content += bytes(-len(content) % 4)
        tags += name + struct.pack(">2I", place, len(content))
        body, place = body + content, place + len(content)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", place, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp"
    )
    head += bytes(28) + struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + tags + body


def expected(image: Image.Image, profile: bytes) -> np.ndarray:
    """As Pillow converts it, into RGB."""
    shown = ImageCms.profileToProfile(
        image,
        io.BytesIO(profile),
        io.BytesIO(SRGB),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return np.asarray(shown).astype(int)


def read(path) -> np.ndarray:
    return read_image(path, 16).astype(int)


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def said(capsys):
    said_of_images.clear()
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
def test_a_profile_is_followed_whatever_the_format(tmp_path, said, suffix):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(COLOURS), icc_profile=swapped(), **options)
    with Image.open(path) as file:
        assert abs(read(path) - expected(file.convert("RGB"), swapped())).max() <= 1
    assert abs(read(path)[..., ::-1] - read(saved(path, Image.fromarray(COLOURS), **options))).mean() < 12
    assert said() == ""


@pytest.mark.parametrize("profile", [SRGB, imagecodecs.cms_profile("srgb")])
def test_srgb_leaves_every_number_as_it_is(tmp_path, profile):
    assert np.array_equal(
        read(saved(tmp_path / "a.png", Image.fromarray(COLOURS), icc_profile=profile)), COLOURS
    )


def test_inks_of_a_press_with_and_without_adobes_inversion(tmp_path):
    ink = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), np.uint8), "CMYK")
    for name in ("a.tif", "a.jpg"):
        options = {"quality": 100} if name.endswith("jpg") else {}
        path = saved(tmp_path / name, ink, icc_profile=inks(), **options)
        with Image.open(path) as file:
            assert abs(read(path) - expected(file, inks())).max() <= 1
    plain = saved(tmp_path / "plain.tif", ink)
    assert abs(read(path) - read(plain)).mean() > 20


def test_grey_with_a_profile_of_grey(tmp_path, said):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for name in ("a.png", "a.jpg"):
        path = saved(tmp_path / name, grey, icc_profile=LINEAR_GREY)
        shown = read(path)[..., 0].ravel()
        assert abs(shown[64] - 137) <= 2 and shown[255] == 255  # 64/255 of the light, by sRGB's curve
    assert said() == ""


def test_palette_and_opacity(tmp_path):
    """Opacity is no colour: it is kept, and laid over white afterwards."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(0, (0, 0, 8, 16))
    path = saved(tmp_path / "a.png", image, icc_profile=swapped(), transparency=0)
    shown = read(path)
    assert shown[8, 2].tolist() == [255, 255, 255] and shown[8, 13, 2] > 200 > 60 > shown[8, 13, 0]
    opaque = np.dstack([COLOURS, np.full((16, 16), 128, np.uint8)])
    path = saved(tmp_path / "b.png", Image.fromarray(opaque), icc_profile=swapped())
    half = (expected(Image.fromarray(COLOURS), swapped()) * 128 + 255 * 127) / 255
    assert abs(read(path) - half).max() <= 1


@pytest.mark.parametrize(
    "profile, mode, message",
    [
        (b"rubbish", "RGB", "broken and ignored"),
        (SRGB[:200], "RGB", "broken and ignored"),
        (all_black(), "RGB", "makes white dark"),
        (LINEAR_GREY, "RGB", "is of GRAY and its pixels are RGB, so it is ignored"),
        (ADOBE, "L", "is of RGB and its pixels are GRAY, so it is ignored"),
    ],
)
def test_a_profile_that_cannot_be_used_is_said_once_and_ignored(tmp_path, said, profile, mode, message):
    image = Image.fromarray(COLOURS).convert(mode)
    path = saved(tmp_path / "a.png", image, icc_profile=profile)
    for _ in range(2):
        assert np.array_equal(read(path), np.asarray(image.convert("RGB")))
    text = said()
    assert (
        text.count("note: ") == 1 and f"{tmp_path.name}/a.png: its colour profile" in text and message in text
    )


def test_a_profile_that_cannot_be_unpacked_is_said(tmp_path, said):
    path = saved(tmp_path / "a.png", Image.fromarray(COLOURS))
    assert np.array_equal(read(with_chunk(path, b"iCCP", b"name\0\0no stream")), COLOURS)
    assert "a.png: its colour profile is broken and ignored" in said()


def test_grey_that_says_srgb_is_grey(tmp_path, said):
    image = Image.fromarray(COLOURS).convert("L")
    assert np.array_equal(
        read(saved(tmp_path / "a.jpg", image, icc_profile=SRGB, quality=100)),
        read(saved(tmp_path / "b.jpg", image, quality=100)),
    )
    assert said() == ""


def test_dark_colours_of_16_bits_keep_their_precision(tmp_path):
    """Light that is not coded by a curve: in 8 bits all of these would be 0 or 1."""
    linear = imagecodecs.cms_profile(
        "rgb", whitepoint=[0.3127, 0.329, 1], primaries=[0.64, 0.33, 1, 0.3, 0.6, 1, 0.15, 0.06, 1], gamma=1.0
    )
    light = np.linspace(0, 65535, 256).round().reshape(16, 16).astype(np.uint16)
    light[0] = np.linspace(0, 400, 16)
    values = np.dstack([light] * 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", iccprofile=linear)
    x = values / 65535
    curve = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert abs(read(tmp_path / "a.tif") - curve).max() <= 1.1


def with_chunk(path, name: bytes, content: bytes):
    """A PNG with one more chunk, after its header."""
    data = path.read_bytes()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


def test_gamma_of_a_png(tmp_path):
    light = saved(tmp_path / "a.png", Image.fromarray(COLOURS))
    x = COLOURS / 255
    curve = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert abs(read(with_chunk(light, b"gAMA", struct.pack(">I", 100000))) - curve).max() <= 2
    usual = with_chunk(saved(tmp_path / "b.png", Image.fromarray(COLOURS)), b"gAMA", struct.pack(">I", 45455))
    assert np.array_equal(read(usual), COLOURS)
    named = with_chunk(saved(tmp_path / "c.png", Image.fromarray(COLOURS)), b"sRGB", b"\0")
    assert np.array_equal(read(with_chunk(named, b"gAMA", struct.pack(">I", 100000))), COLOURS)
    grey = Image.fromarray(COLOURS[..., 0])
    grey = with_chunk(saved(tmp_path / "d.png", grey), b"gAMA", struct.pack(">I", 100000))
    assert abs(read(grey)[..., 0] - curve[..., 0]).max() <= 2


def test_gamma_of_grey_with_opacity_in_16_bits(tmp_path, said):
    light = np.full((16, 16, 2), 65535, np.uint16)
    light[..., 0] = 16448
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(light))
    path = with_chunk(tmp_path / "a.png", b"gAMA", struct.pack(">I", 100000))
    assert abs(read(path) - 137).max() <= 1 and said() == ""


def test_colours_that_are_coded_by_numbers(tmp_path, said):
    wide = with_chunk(saved(tmp_path / "p3.png", Image.fromarray(COLOURS)), b"cICP", bytes([12, 13, 0, 1]))
    grey = with_chunk(
        saved(tmp_path / "g.png", Image.fromarray(COLOURS).convert("L").convert("RGB")),
        b"cICP",
        bytes([12, 13, 0, 1]),
    )
    assert abs(read(wide) - COLOURS).max() > 20
    assert abs(read(grey) - np.asarray(Image.open(grey))).max() <= 1  # the same curve and white
    usual = with_chunk(saved(tmp_path / "b.png", Image.fromarray(COLOURS)), b"cICP", bytes([1, 13, 0, 1]))
    assert np.array_equal(read(usual), COLOURS) and said() == ""
    hdr = with_chunk(saved(tmp_path / "hdr.png", Image.fromarray(COLOURS)), b"cICP", bytes([9, 16, 0, 1]))
    read(hdr)
    assert "hdr.png: its colours are coded" in said()


def test_adobe_rgb_by_exif_alone_is_said(tmp_path, said):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    path = saved(tmp_path / "_DSC1.jpg", Image.fromarray(COLOURS), exif=exif)
    read(path)
    assert "_DSC1.jpg: its EXIF data says Adobe RGB" in said()


def test_profile_of_a_bitmap(tmp_path):
    plain = saved(tmp_path / "a.bmp", Image.fromarray(COLOURS)).read_bytes()
    pixels = plain[54:]
    header = struct.pack("<IiiHHIIiiII", 124, 16, 16, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    header = header.ljust(56, b"\0") + b"DEBM" + bytes(52)
    header += struct.pack("<3I", 124 + len(pixels), len(swapped()), 0)
    size = 14 + len(header) + len(pixels) + len(swapped())
    head = b"BM" + struct.pack("<IHHI", size, 0, 0, 14 + len(header))
    (tmp_path / "a.bmp").write_bytes(head + header + pixels + swapped())
    assert abs(read(tmp_path / "a.bmp") - expected(Image.fromarray(COLOURS), swapped())).max() <= 1


def test_profile_of_a_jpeg_2000(tmp_path):
    plain = saved(tmp_path / "a.jp2", Image.fromarray(COLOURS), irreversible=False).read_bytes()
    place = plain.index(b"colr") - 4
    length = int.from_bytes(plain[place : place + 4], "big")
    box = struct.pack(">I", 11 + len(swapped())) + b"colr\2\0\0" + swapped()
    header = plain.index(b"jp2h") - 4
    size = int.from_bytes(plain[header : header + 4], "big") + len(box) - length
    content = (
        plain[:header] + struct.pack(">I", size) + plain[header + 4 : place] + box + plain[place + length :]
    )
    (tmp_path / "a.jp2").write_bytes(content)
    assert abs(read(tmp_path / "a.jp2") - expected(Image.fromarray(COLOURS), swapped())).max() <= 1
