"""How pictures are made of what the decoder gives: what a residual keeps, what a limit and a mask hold; local
contrast, and the change where a picture is smooth, against scipy's filters.
"""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, minimum_filter

from diffattack.data.contrast import change_where_smooth, local_contrast
from diffattack.data.images import levels
from diffattack.diffusion.batch import at_rows
from diffattack.diffusion.composition import Composition, change_limits

RANDOM = torch.Generator().manual_seed(0)
CLEAN, BASE = (torch.rand(2, 3, 64, 64, generator=RANDOM) for _ in range(2))
DECODED = BASE + 0.1 * torch.randn(2, 3, 64, 64, generator=RANDOM)


def test_the_decoders_picture_and_a_residual_that_keeps_what_the_autoencoder_loses():
    assert torch.equal(Composition(CLEAN)(3 * DECODED - 1), (3 * DECODED - 1).clamp(0, 1))
    assert torch.equal(Composition(CLEAN, BASE)(BASE), CLEAN)
    assert torch.allclose(Composition(CLEAN, BASE)(DECODED), (CLEAN + DECODED - BASE).clamp(0, 1), atol=1e-6)


def around(change: torch.Tensor) -> torch.Tensor:
    """The root mean square of a change (B, 3, H, W) around each place, (B, 1, H, W)."""
    energy = change.square().mean(1, keepdim=True).numpy()
    return torch.from_numpy(gaussian_filter(energy, 4, mode="mirror", axes=(2, 3))).sqrt()


def test_around_each_place_a_change_keeps_to_the_limit():
    limits = change_limits(CLEAN, 0.7)
    masked = 1 / 255 + 0.7 * local_contrast(CLEAN)
    assert torch.allclose(limits, masked * 5 / 255 / (masked**2 + (5 / 255) ** 2).sqrt())
    limited = Composition(CLEAN, BASE, limits)
    change = DECODED - BASE
    held = change / (1 + around(change).square() / limits.square()).sqrt()
    assert torch.allclose(limited(DECODED), (CLEAN + held).clamp(0, 1), atol=1e-6)
    assert (around(limited(BASE + 1e3 * change) - CLEAN) <= 1.05 * limits).all()
    small = BASE + 1e-3 * limits * torch.sign(DECODED - BASE)
    assert torch.allclose(limited(small), (CLEAN + small - BASE).clamp(0, 1), atol=1e-6)
    of_one = at_rows(limited, torch.tensor([1]))(DECODED[1:])
    assert torch.allclose(of_one, limited(DECODED)[1:], atol=1e-6)


def test_a_smooth_picture_changes_by_a_level():
    smooth = torch.full_like(CLEAN, 0.5)
    changed = Composition(smooth, BASE, change_limits(smooth, 1.0))(BASE + 0.5 * (DECODED - BASE).sign())
    assert around(changed - smooth).max() <= 1.01 / 255


def test_a_change_loses_what_is_coarse_and_a_part_of_its_colour():
    grey = torch.full_like(CLEAN, 0.5)
    change = (Composition(grey, BASE, high_pass=2.0, colour=0.3)(DECODED) - grey).numpy()
    whole = (DECODED - BASE).numpy()
    fine = whole - gaussian_filter(whole, 2, mode="mirror", axes=(2, 3))
    luminance_of = np.einsum("bchw,c->bhw", fine, [0.299, 0.587, 0.114])[:, None]
    np.testing.assert_allclose(change, luminance_of + 0.3 * (fine - luminance_of), atol=1e-6)


def test_outside_a_mask_the_clean_picture_stays_byte_for_byte():
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :20, :30], mask[..., :20, 30:40] = 1.0, 0.5
    clean = (255 * CLEAN).round() / 255
    residual = Composition(clean, BASE, mask=mask)(DECODED)
    assert torch.equal(levels(residual)[..., 20:, :], 255 * clean[..., 20:, :])
    assert torch.equal(residual[..., :20, :30], Composition(clean, BASE)(DECODED)[..., :20, :30])
    half = (clean + 0.5 * (DECODED - BASE))[..., :20, 30:40].clamp(0, 1)
    assert torch.allclose(residual[..., :20, 30:40], half)
    decoder = Composition(clean, mask=mask)(DECODED)
    assert torch.equal(decoder[..., 20:, :], clean[..., 20:, :])


# ---------------------------------------------------------------- contrast


def slow_contrast(plane: np.ndarray) -> np.ndarray:
    """Of a plane (H, W), as it is defined."""
    mean, of_squares = (gaussian_filter(values, 2, mode="mirror") for values in (plane, plane**2))
    least = minimum_filter(np.sqrt(np.maximum(of_squares - mean**2, 0)), 9, mode="nearest")
    return gaussian_filter(least, 3, mode="mirror")


def test_it_is_the_least_deviation_near_by_of_luminance():
    pictures = np.random.default_rng(0).uniform(0, 1, (2, 3, 40, 56))
    pictures[1, :, :, :28] = 0.5
    ours = local_contrast(torch.from_numpy(pictures)).numpy()[:, 0]
    for picture, contrast in zip(pictures, ours):
        grey = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        np.testing.assert_allclose(contrast, slow_contrast(grey), atol=1e-6)
    assert ours[1, :, :8].max() < 1e-3 < 0.05 < ours[1, :, 50:].min()


def test_a_flat_picture_has_none_whatever_its_brightness_and_the_halo_of_an_edge_is_smooth():
    """Which a window that sees the edge would take for busy."""
    for level in (0.0, 1 / 3, 1.0):
        assert local_contrast(torch.full((1, 3, 32, 32), level)).abs().max() < 1e-4
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
