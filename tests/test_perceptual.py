"""Measures of visibility beside slow versions, closed forms and published values; what the legend says of
them; and that nothing is downloaded unasked.
"""

import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffattack.data.images import read_image
from diffattack.evaluation.metrics import (
    colour_difference,
    feature_network,
    features_of,
    lpips,
    measures,
    perceptual,
    quality_of,
    visibility,
)
from diffattack.evaluation.tables import MEASURES, legend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return read_image(sorted((ROOT / "demo/images").iterdir())[0], 192)


def noisy(picture: np.ndarray, levels: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, levels, picture.shape)
    return (picture + noise).clip(0, 255).round().astype(np.uint8)


def test_equal_pictures_are_at_the_ends_of_the_ranges(photograph):
    ends = {"MS-SSIM": 1, "FSIMc": 1, "HaarPSI": 1, "GMSD": 0, "CIEDE2000": 0}
    for picture in (photograph, np.zeros_like(photograph)):
        assert perceptual(picture, picture) == pytest.approx(ends, abs=1e-6)


def test_measures_go_where_the_legend_says(photograph):
    """Twice the noise is further from the clean picture by every measure, and within its range."""
    less, more = (
        visibility(photograph, other) | perceptual(photograph, other)
        for other in (noisy(photograph, 4), noisy(photograph, 8))
    )
    for name, little, much in ((name, less[name], more[name]) for name in less):
        direction, limits = MEASURES[name]
        assert (little > much) == (direction == "higher"), name
        ends = [float(word) for word in limits.split(",")[0].split() if word[-1].isdigit()]
        low, high = (*ends, math.inf)[:2]
        assert low < little < high and low < much < high, name


def test_ms_ssim_of_constant_pictures_and_of_small_ones():
    """Of constant pictures only the luminance of the coarsest scale is left, to the power of its weight."""
    a, b, c1 = 60 / 255, 190 / 255, 0.01**2
    clean, other = (np.full((176, 176, 3), value, np.uint8) for value in (60, 190))
    expected = ((2 * a * b + c1) / (a**2 + b**2 + c1)) ** 0.1333
    assert perceptual(clean, other)["MS-SSIM"] == pytest.approx(expected, abs=1e-3)
    assert "MS-SSIM" in perceptual(clean[:161, :161], other[:161, :161])
    assert "MS-SSIM" not in perceptual(clean[:160], other[:160])


def slow_gmsd(clean: np.ndarray, other: np.ndarray) -> float:
    """Xue et al. (2014), pixel by pixel: luminance, means of 2 x 2, Prewitt's gradients, their similarity,
    and its standard deviation; zeros beyond the border.
    """

    def magnitudes(picture):
        luminance = picture / 255 @ np.array([0.299, 0.587, 0.114])
        halved = (luminance[::2] + luminance[1::2]) / 2
        small = np.pad((halved[:, ::2] + halved[:, 1::2]) / 2, 1)
        found = np.empty((small.shape[0] - 2, small.shape[1] - 2))
        for y, x in np.ndindex(found.shape):
            window = small[y : y + 3, x : x + 3]
            across, down = (window[:, 0] - window[:, 2]).sum() / 3, (window[0] - window[2]).sum() / 3
            found[y, x] = math.hypot(across, down)
        return found

    a, b, constant = magnitudes(clean), magnitudes(other), 170 / 255**2
    return ((2 * a * b + constant) / (a**2 + b**2 + constant)).std()


def test_gmsd_against_a_slow_version(photograph):
    clean = photograph[40:88, 40:88]
    other = noisy(clean, 12)
    assert perceptual(clean, other)["GMSD"] == pytest.approx(slow_gmsd(clean, other), rel=1e-4)


def slow_ciede2000(first, second) -> float:
    """Of two colours in CIELAB, as Sharma, Wu and Dalal (2005) write it out."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean_chroma = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * math.sqrt(mean_chroma**7 / (mean_chroma**7 + 25**7))
    c1, c2 = math.hypot(stretch * a1, b1), math.hypot(stretch * a2, b2)
    h1, h2 = (math.degrees(math.atan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = 0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    if c1 * c2 and h2 - h1 == 180:
        turn = 180
    hue_difference = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2))
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    if c1 * c2 == 0:
        hue = h1 + h2
    elif abs(h1 - h2) <= 180:
        hue = (h1 + h2) / 2
    else:
        hue = (h1 + h2 + (360 if h1 + h2 < 360 else -360)) / 2
    t = 1 + sum(
        factor * math.cos(math.radians(times * hue + shift))
        for factor, times, shift in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    )
    s_l = 1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    turning = 60 * math.exp(-(((hue - 275) / 25) ** 2))  # twice 30 degrees
    r_t = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7)) * math.sin(math.radians(turning))
    x, y, z = (l2 - l1) / s_l, (c2 - c1) / s_c, hue_difference / s_h
    return math.sqrt(x**2 + y**2 + z**2 + r_t * y * z)


@pytest.mark.parametrize(
    "first, second, published",
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_of_published_pairs(first, second, published):
    """Sharma, Wu and Dalal (2005), table 1: what the next test compares with."""
    assert slow_ciede2000(first, second) == pytest.approx(published, abs=5e-5)


def lab(pixel: np.ndarray) -> np.ndarray:
    """CIELAB of an sRGB pixel (IEC 61966-2-1), white D65."""
    linear = np.where(pixel <= 0.04045, pixel / 12.92, ((pixel + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    scaled = xyz / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled * 29**2 / (3 * 6**2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_ciede2000_is_the_mean_over_the_pixels(photograph):
    clean = photograph[::24, ::24]
    other = noisy(clean, 10)
    each = [
        slow_ciede2000(lab(a), lab(b)) for a, b in zip(clean.reshape(-1, 3) / 255, other.reshape(-1, 3) / 255)
    ]
    assert colour_difference(clean, other) == pytest.approx(np.mean(each), rel=2e-3)


# ---------------------------------------------------------------- the table


def test_every_row_of_the_table_is_in_the_legend(photograph):
    clean = np.stack([photograph[:96, :96], photograph[96:, 96:]])
    other = np.stack([noisy(p, 3) for p in clean])
    network = feature_network([])
    features = [features_of(network, side, CPU) for side in (clean, other)]
    each = [measures(*pair, CPU) for pair in zip(clean, other)]
    quality = quality_of(
        [{name: np.array([one[name] for one in each]) for name in each[0]}], features, network
    )
    higher, lower = legend(quality)
    for name in quality:
        known = name.split(",")[0].removesuffix(" (levels)")
        assert f" {known} (" in (higher if MEASURES[name.split(",")[0]][0] == "higher" else lower), name
    assert "MS-SSIM" not in higher  # these are too small
    assert quality["GMSD"].by_image.shape == (2,)


def test_nothing_is_downloaded_unasked(monkeypatch, tmp_path):
    """Not even where torch-fidelity is installed, and a network is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    extractor.URL_INCEPTION_V3 = "https://example.org/inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, extractor.__name__, extractor)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads"))
    picture = np.zeros((64, 64, 3), np.uint8)
    assert lpips(picture, picture, CPU) == {}
    assert feature_network(["efficientnet_lite2@jpeg:75"]) == "efficientnet_lite1"  # no surrogate
