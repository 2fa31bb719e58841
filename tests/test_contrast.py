"""Local contrast, and the change where a picture is smooth, against scipy's filters and by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, minimum_filter

from diffattack.data.contrast import change_where_smooth, colour_contrast, local_contrast


def slow_contrast(planes: np.ndarray) -> np.ndarray:
    """Of the planes (C, H, W) of one picture, as it is defined."""
    blurred = [[gaussian_filter(v, 2, mode="mirror") for v in (plane, plane**2)] for plane in planes]
    variance = np.mean([square - mean**2 for mean, square in blurred], 0)
    least = minimum_filter(np.sqrt(np.maximum(variance, 0)), 9, mode="nearest")
    return gaussian_filter(least, 3, mode="mirror")


def test_it_is_the_least_deviation_near_by_of_luminance_and_of_what_colours_are_without_it():
    pictures = np.random.default_rng(0).uniform(0, 1, (2, 3, 40, 56))
    pictures[1, :, :, :28] = 0.5
    ours, colours = (of(torch.from_numpy(pictures)).numpy()[:, 0] for of in (local_contrast, colour_contrast))
    for picture, contrast, colour in zip(pictures, ours, colours):
        grey = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        np.testing.assert_allclose(contrast, slow_contrast(grey[None]), atol=1e-6)
        np.testing.assert_allclose(colour, slow_contrast(picture - grey), atol=1e-6)
    assert ours[1, :, :8].max() < 1e-3 < 0.05 < ours[1, :, 50:].min()
    assert colour_contrast(torch.from_numpy(np.repeat(grey[None, None], 3, 1))).abs().max() < 1e-4


def test_a_flat_picture_has_none_whatever_its_brightness():
    for level in (0.0, 1 / 3, 1.0):
        assert local_contrast(torch.full((1, 3, 32, 32), level)).abs().max() < 1e-4


def test_the_halo_of_an_edge_is_smooth():
    """Which a window that sees the edge would take for busy."""
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 32:] = 1.0
    contrast = local_contrast(picture)[0, 0, 32]
    assert contrast.argmax() in (31, 32) and contrast[24] < 0.1 * 0.5


def test_the_change_where_smooth_is_that_of_smooth_places_alone():
    random = torch.Generator().manual_seed(0)
    clean = torch.full((2, 3, 64, 64), 0.5)
    clean[0, :, :, 32:] = torch.rand(3, 64, 32, generator=random)
    clean[1] = torch.rand(3, 64, 64, generator=random)
    other = clean.clone()
    other[0, :, :, :16] += 3 / 255  # smooth
    other[0, :, :, 48:] += 40 / 255  # not smooth
    smooth, busy = change_where_smooth(clean, other).tolist()
    share = (local_contrast(clean)[0] < 0.01).float().mean().item()
    assert smooth == pytest.approx(3 * (0.25 / share) ** 0.5, rel=1e-3) and np.isnan(busy)
