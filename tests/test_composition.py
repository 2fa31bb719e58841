"""How pictures are made of what the decoder gives: what a residual keeps, what a limit and a mask hold."""

import torch

from data.contrast import local_contrast
from data.images import levels
from diffusion.composition import Composition, change_limit

RANDOM = torch.Generator().manual_seed(0)
CLEAN, BASE = (torch.rand(2, 3, 64, 64, generator=RANDOM) for _ in range(2))
DECODED = BASE + 0.1 * torch.randn(2, 3, 64, 64, generator=RANDOM)


def test_the_decoders_picture():
    assert torch.equal(Composition(CLEAN)(3 * DECODED - 1), (3 * DECODED - 1).clamp(0, 1))


def test_a_residual_keeps_what_the_autoencoder_loses():
    assert torch.equal(Composition(CLEAN, BASE)(BASE), CLEAN)
    assert torch.allclose(Composition(CLEAN, BASE)(DECODED), (CLEAN + DECODED - BASE).clamp(0, 1), atol=1e-6)


def test_no_pixel_changes_by_more_than_the_limit():
    limit = change_limit(CLEAN, 0.7)
    assert torch.allclose(limit, 1 / 255 + 0.7 * local_contrast(CLEAN))
    limited = Composition(CLEAN, BASE, limit)
    assert ((limited(1e3 * DECODED) - CLEAN).abs() <= limit + 1e-6).all()
    small = BASE + 1e-3 * limit * torch.sign(DECODED - BASE)
    assert torch.allclose(limited(small), (CLEAN + small - BASE).clamp(0, 1), atol=1e-7)


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
    both = Composition(CLEAN, BASE, change_limit(CLEAN, 0.5))
    assert torch.equal(both.keep(torch.tensor([1]))(DECODED[1:]), both(DECODED)[1:])
