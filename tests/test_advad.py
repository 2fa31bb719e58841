"""AdvAD beside its own formulas, step by step with the noise that cancels in ours."""

import math

import pytest
import torch

from diffattack.attacks.advad import advad, noise_levels
from diffattack.classifiers.registry import load_classifier


def plain_advad(images, labels, classifier, eps, steps, targets=None) -> torch.Tensor:
    """As the paper writes it: values from -1 to 1, a latent `x_t` with its noise, DDIM steps, and guidance by
    the gradient on `x_t` of what the noise before predicts.
    """
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    alphas = [float(alphas[k * (1000 // steps)]) for k in range(steps)]
    clean, noise = 2 * images - 1, torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noise = before = noise.double()
    x = math.sqrt(alphas[-1]) * clean + math.sqrt(1 - alphas[-1]) * noise
    bound = 2 * eps * math.sqrt(alphas[-1] / (1 - alphas[-1]))
    for k in reversed(range(steps)):
        alpha, lower = alphas[k], alphas[k - 1] if k else 1.0
        x = x.detach().requires_grad_()
        predicted = (x - math.sqrt(1 - alpha) * before) / math.sqrt(alpha)
        probabilities = classifier((predicted / 2 + 0.5).clamp(0, 1)).softmax(-1)
        if targets is None:
            goal = (1 - probabilities.gather(1, labels[:, None])).log()
        else:
            goal = probabilities.gather(1, targets[:, None]).log()
        guidance = -math.sqrt(1 - alpha) * torch.autograd.grad(goal.sum(), x)[0]
        before = noise + guidance.clamp(-bound, bound)
        image = (x - math.sqrt(1 - alpha) * before) / math.sqrt(alpha)
        x = math.sqrt(lower) * image + math.sqrt(1 - lower) * before
    return (x / 2 + 0.5).clamp(0, 1).detach()


@pytest.mark.parametrize("targets", [None, torch.tensor([3, 1])])
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_the_path_is_the_papers(steps, targets):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 5))
    network = torch.nn.Sequential(network, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).double()
    images, labels = torch.rand(2, 3, 24, 24, dtype=torch.float64), torch.tensor([0, 2])

    def classifier(x: torch.Tensor) -> torch.Tensor:
        return 100 * network(x)  # so that some values are clamped, and some are not

    settings = {"eps": 4 / 255, "steps": steps, "targets": targets}
    ours = advad(images, labels, classifier, **settings)
    assert (ours - images).abs().max() > 1e-4
    assert torch.allclose(ours, plain_advad(images, labels, classifier, **settings), atol=1e-9, rtol=0)


def test_no_value_changes_by_more_than_eps():
    classifier = load_classifier("efficientnet_lite0")
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    change = advad(
        images, classifier(images).argmax(-1), lambda x: 1e4 * classifier(x), eps=2 / 255, steps=10
    )
    assert (change - images).abs().max() * 255 <= 2.001
    assert len(noise_levels(10)) == 10 and noise_levels(1000)[0] == pytest.approx(0.01, rel=1e-3)
