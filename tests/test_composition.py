"""How pictures are made of what the decoder gives: what a residual keeps, what a limit and a mask hold."""

import torch

from diffattack.data.contrast import colour_contrast, local_contrast, luminance
from diffattack.data.images import levels
from diffattack.diffusion.batch import at_rows
from diffattack.diffusion.composition import Composition, change_limits

RANDOM = torch.Generator().manual_seed(0)
CLEAN, BASE = (torch.rand(2, 3, 64, 64, generator=RANDOM) for _ in range(2))
DECODED = BASE + 0.1 * torch.randn(2, 3, 64, 64, generator=RANDOM)


def test_the_decoders_picture():
    assert torch.equal(Composition(CLEAN)(3 * DECODED - 1), (3 * DECODED - 1).clamp(0, 1))


def test_a_residual_keeps_what_the_autoencoder_loses():
    assert torch.equal(Composition(CLEAN, BASE)(BASE), CLEAN)
    assert torch.allclose(Composition(CLEAN, BASE)(DECODED), (CLEAN + DECODED - BASE).clamp(0, 1), atol=1e-6)


def test_no_pixel_changes_by_more_than_the_limit():
    limits = change_limits(CLEAN, 0.7)
    whole, colour = limits.split(1, 1)
    assert torch.allclose(whole, 1 / 255 + 0.7 * local_contrast(CLEAN))
    least = 0.3 * local_contrast(CLEAN)
    assert torch.allclose(colour, 1 / 255 + 0.7 * torch.maximum(colour_contrast(CLEAN), least))
    limited = Composition(CLEAN, BASE, limits)
    assert ((limited(1e3 * DECODED) - CLEAN).abs() <= whole + 1e-6).all()
    small = BASE + 1e-3 * limits.amin(1, keepdim=True) * torch.sign(DECODED - BASE)
    assert torch.allclose(limited(small), (CLEAN + small - BASE).clamp(0, 1), atol=1e-6)


def test_a_grey_picture_stays_almost_grey():
    """Its colours move by less than a third of what its luminance may."""
    grey = luminance(CLEAN).expand_as(CLEAN)
    picture = Composition(grey, BASE, change_limits(grey, 0.7))(BASE + 0.5 * (DECODED - BASE).sign())
    change = picture - grey
    assert (change - luminance(change)).abs().max() < 0.4 * luminance(change).abs().max()
    smooth = torch.full_like(CLEAN, 0.5)
    changed = Composition(smooth, BASE, change_limits(smooth, 1.0))(BASE + 0.5 * (DECODED - BASE).sign())
    assert (changed - smooth).abs().max() <= 1.01 / 255


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


def test_images_of_a_batch_by_themselves():
    both = Composition(CLEAN, BASE, change_limits(CLEAN, 0.5))
    assert torch.equal(at_rows(both, torch.tensor([1]))(DECODED[1:]), both(DECODED)[1:])
