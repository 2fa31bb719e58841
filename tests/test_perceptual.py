"""Measures of visibility and distances of sets of pictures beside slow versions, closed forms and published
values; and that nothing is downloaded unasked.
"""

import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TinyClassifier
from scipy.ndimage import prewitt

from diffattack.data.images import read_image
from diffattack.evaluation import metrics, statistics
from diffattack.evaluation.metrics import perceptual, visibility
from diffattack.evaluation.statistics import frechet_distance, kernel_distance
from diffattack.evaluation.tables import MEASURES

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
    """Xue et al. (2014): luminance, means of 2 x 2, Prewitt's gradients, their similarity, and its standard
    deviation; zeros beyond the border.
    """

    def magnitudes(picture):
        luminance = picture / 255 @ np.array([0.299, 0.587, 0.114])
        small = luminance.reshape(luminance.shape[0] // 2, 2, -1, 2).mean((1, 3))
        return np.hypot(*(prewitt(small, axis, mode="constant") / 3 for axis in (0, 1)))

    a, b, constant = magnitudes(clean), magnitudes(other), 170 / 255**2
    return ((2 * a * b + constant) / (a**2 + b**2 + constant)).std()


def test_gmsd_against_a_slow_version(photograph):
    clean = photograph[40:88, 40:88]
    other = noisy(clean, 12)
    assert perceptual(clean, other)["GMSD"] == pytest.approx(slow_gmsd(clean, other), rel=1e-4)


def test_ciede2000_is_the_mean_over_the_pixels():
    """Of colours of which it was worked out as Sharma, Wu and Dalal (2005) write it, from sRGB at D65."""
    colours = {((255, 0, 0), (0, 255, 0)): 86.6135, ((0, 0, 255), (255, 255, 0)): 103.4276}
    colours |= {((120, 90, 60), (125, 88, 66)): 4.8258, ((200, 200, 200), (190, 200, 215)): 7.2470}
    clean, other = (np.array([[pair[side] for pair in colours]], np.uint8) for side in (0, 1))
    for k, expected in enumerate(colours.values()):
        assert metrics.colour_difference(clean[:, k : k + 1], other[:, k : k + 1]) == pytest.approx(
            expected, rel=2e-3
        )
    assert metrics.colour_difference(clean, other) == pytest.approx(np.mean([*colours.values()]), rel=2e-3)


# ---------------------------------------------------------------- distances of sets of pictures


@pytest.mark.parametrize("rows", [1024, 7])
def test_the_kernel_distance_is_that_of_all_pairs(monkeypatch, rows):
    monkeypatch.setattr(statistics, "ROWS", rows)
    clean, other = np.random.default_rng(0).normal(size=(2, 20, 24))
    for shift in (0, 0.4):
        both = np.concatenate([clean, other + shift])
        kernel = np.array([[(x @ y / 24 + 1) ** 3 for y in both] for x in both])
        within = sum(part.sum() - part.trace() for part in (kernel[:20, :20], kernel[20:, 20:])) / (20 * 19)
        expected = within - 2 * kernel[:20, 20:].mean()
        assert kernel_distance(clean, other + shift) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dimension", [5, 200])  # 200: more than there are images
def test_frechet_distance_of_two_gaussians(monkeypatch, dimension):
    monkeypatch.setattr(statistics, "ROWS", 30)
    noise = np.random.default_rng(0).normal(size=(2, 100, dimension))
    a, b = noise[0], 2 * noise[1] + 1
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second) - 2 * common
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_features_are_what_the_last_linear_layer_sees():
    classifier, x = TinyClassifier().eval(), torch.rand(2, 3, 32, 32)
    assert torch.allclose(5 * classifier.layers[-1](metrics.last_features(classifier)(x)), classifier(x))


def test_an_image_that_stays_as_it_was_is_in_no_mean_of_visibility():
    visible = np.array([[[30.0, 2.0]], [[np.inf, 0.0]], [[40.0, 1.0]]])  # (images, sides, measures)
    features = np.random.default_rng(0).random((3, 2, 4))
    quality = metrics.quality_of(["PSNR dB", "L2"], visible, features, "net")
    assert quality["PSNR dB"].adversarial.value == 35 and quality["L2"].adversarial.value == 1.5
    assert quality["L2"].note == "of the 2 of 3 images that were changed" and len(quality["L2"].by_image) == 3
    alone = metrics.quality_of(["PSNR dB", "L2"], visible[1:2], features[1:2], "net")
    assert np.isnan(alone["PSNR dB"].adversarial.value)


def test_nothing_is_downloaded_unasked(monkeypatch, tmp_path):
    """Not even where torch-fidelity is installed, and a network is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    extractor.URL_INCEPTION_V3 = "https://example.org/inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, extractor.__name__, extractor)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads"))
    picture = np.zeros((64, 64, 3), np.uint8)
    assert metrics.lpips(picture, picture, CPU) == {}
    assert metrics.feature_network(["efficientnet_lite2@jpeg:75"]) == "efficientnet_lite1"  # no surrogate
