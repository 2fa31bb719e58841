"""Budgets: what they allow is measured with the functions that judge the written files."""

import math

import pytest
import torch

from diffattack.data.images import rounded
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.metrics import visibility

RANDOM = torch.Generator().manual_seed(0)
CLEAN = rounded(torch.rand(3, 3, 96, 96, generator=RANDOM) * 0.5 + 0.25)
NOISE = torch.randn(CLEAN.shape, generator=RANDOM)
IMAGES = CLEAN + torch.tensor([0.001, 0.05, 0.2]).view(3, 1, 1, 1) * NOISE
NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "l2": "L2"}


def measured(images: torch.Tensor, measure: str) -> list[float]:
    """Of the files that would be written."""
    pixels = ((255 * rounded(x)).byte().permute(0, 2, 3, 1).numpy() for x in (CLEAN, images))
    return [visibility(*pair)[NAMES[measure]] for pair in zip(*pixels)]


@pytest.mark.parametrize("text", ["psnr=37", "ssim=0.98", "l2=2.5", "psnr=54", "psnr=58", "l2=0.5"])
def test_pictures_are_held_within_it_and_no_further(text):
    """The last three are of less than a level, where rounding is as large as what is allowed."""
    budget = parse_budget(text)
    held = budget.hold(CLEAN, IMAGES)
    assert budget.fits(CLEAN, held).all()
    # along the same line
    factor = (held - CLEAN)[2].norm() / (IMAGES - CLEAN)[2].norm()
    assert torch.allclose(held[2], CLEAN[2] + factor * (IMAGES - CLEAN)[2], atol=1e-6)
    if text in ("psnr=54", "psnr=58", "l2=0.5"):
        assert (held[2] - CLEAN[2]).norm() > 0.1 * budget.radius(CLEAN, CLEAN)[2]
        return
    assert budget.fits(CLEAN, IMAGES).tolist() == [True, False, False]
    assert torch.allclose(held[0], IMAGES[0])  # which was within it
    for value in measured(held, budget.measure)[1:]:
        worse = value >= budget.value if budget.measure != "l2" else value <= budget.value * (1 + 1e-6)
        assert worse and value == pytest.approx(budget.value, rel=0.01)


def test_the_gradient_goes_through_what_is_held():
    images = IMAGES.clone().requires_grad_()
    parse_budget("psnr=37").hold(CLEAN, images).sum().backward()
    assert torch.allclose(images.grad[0], torch.ones(3, 96, 96)) and (images.grad[2] > 0).all()


def test_a_psnr_is_an_l2_and_an_ssim_is_read_off_the_picture():
    radius = parse_budget("psnr=37").radius(CLEAN, IMAGES)
    assert radius.tolist() == pytest.approx([math.sqrt(3 * 96 * 96) * 10 ** (-37 / 20)] * 3)
    change = IMAGES[1:2] - CLEAN[1:2]
    found = parse_budget("ssim=0.98").radius(CLEAN[1:2], CLEAN[1:2] + 0.5 * change)
    there = CLEAN[1:2] + (found / change.norm()) * change
    assert measured(torch.cat([CLEAN[:1], there, CLEAN[2:]]), "ssim")[1] == pytest.approx(0.98, abs=0.003)


def test_what_a_budget_may_be():
    assert parse_budget("l2=5.5") == Budget("l2", 5.5) and str(parse_budget("psnr=37.0")) == "psnr=37"
    for text in "37 psnr psnr= psnr=nan psnr=-1 psnr=inf ssim=1 ssim=0 l2=0 l2=inf linf=8".split():
        with pytest.raises(ValueError, match="is no budget; expected psnr=DB"):
            parse_budget(text)
