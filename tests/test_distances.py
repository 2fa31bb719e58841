"""Distances of sets of pictures against their plain versions; in blocks, too."""

import numpy as np
import pytest
import torch
from conftest import TinyClassifier

from diffattack.evaluation import metrics
from diffattack.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    last_features,
    quality_of,
)


@pytest.mark.parametrize("rows", [1024, 7])
def test_the_kernel_distance_is_that_of_all_pairs(monkeypatch, rows):
    monkeypatch.setattr(metrics, "ROWS", rows)
    from torchmetrics.image.kid import poly_mmd

    torch.manual_seed(0)
    clean, same = torch.randn(50, 24), torch.randn(50, 24)
    for other in (same, same + 0.4):
        expected = float(poly_mmd(clean.double(), other.double()))
        assert kernel_distance(clean, other) == pytest.approx(expected, abs=1e-9)
    assert kernel_distance(clean, same + 0.4) > 10 * abs(kernel_distance(clean, same))


@pytest.mark.parametrize("dimension", [5, 500])  # 500: the path through the span of the features
def test_frechet_distance_of_two_gaussians(monkeypatch, dimension):
    monkeypatch.setattr(metrics, "ROWS", 30)
    random = torch.Generator().manual_seed(0)
    count = 100
    a, b = (
        torch.randn(count, dimension, generator=random, dtype=torch.float64) * scale + shift
        for scale, shift in ((1, 0), (2, 1))
    )
    mean, covariance = [x.mean(0).numpy() for x in (a, b)], [np.cov(x.T.numpy()) for x in (a, b)]
    values, vectors = np.linalg.eigh(covariance[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    expected = (
        np.square(mean[0] - mean[1]).sum()
        + np.trace(covariance[0])
        + np.trace(covariance[1])
        - 2 * np.sqrt(np.linalg.eigvalsh(root @ covariance[1] @ root).clip(0)).sum()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_features_are_what_the_last_linear_layer_sees():
    classifier = TinyClassifier().eval()
    features = last_features(classifier)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(5 * classifier.layers[-1](features(x)), classifier(x))


def test_an_image_that_stays_as_it_was_is_in_no_mean_of_visibility():
    by_image = {"PSNR dB": np.array([30.0, np.inf, 40.0]), "L2": np.array([2.0, 0.0, 1.0])}
    features = torch.rand(2, 3, 4)
    quality = quality_of([by_image], features, "net")
    assert quality["PSNR dB"].adversarial.value == 35 and quality["L2"].adversarial.value == 1.5
    assert quality["L2"].note == "of the 2 of 3 images that were changed" and len(quality["L2"].by_image) == 3
    alone = quality_of([{name: values[1:2] for name, values in by_image.items()}], features, "n")
    assert np.isnan(alone["PSNR dB"].adversarial.value)
