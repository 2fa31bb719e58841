import numpy as np
import pytest
import torch
from natsort import natsorted

from classifiers import IMAGENET_CLASSES, REGISTRY, load_classifier
from conftest import ROOT
from evaluate import predict
from utils import read_image


def test_imagenet_names():
    assert len(IMAGENET_CLASSES) == len(set(IMAGENET_CLASSES)) == 1000
    assert [IMAGENET_CLASSES[i] for i in (0, 281, 388, 967, 999)] == ["tench", "tabby", "giant panda", "espresso", "toilet tissue"]


@pytest.mark.parametrize("name", REGISTRY)
def test_inputs_are_normalised_as_the_weights_expect(name):
    classifier = load_classifier(name)
    x = torch.rand(2, 3, classifier.size, classifier.size)
    assert torch.allclose(classifier(x), classifier.network((255 * x - 127) / 128), atol=1e-4)


@pytest.mark.parametrize("name", REGISTRY)
def test_gradients_reach_images_of_any_size(name):
    x = torch.rand(1, 3, 192, 192, requires_grad=True)
    load_classifier(name)(x)[0, 5].backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", REGISTRY)
def test_every_demo_image_is_classified_correctly(name):
    paths = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)
    labels = np.loadtxt(ROOT / "demo/labels.txt", dtype=int) - 1
    assert len(paths) == len(labels) >= 11 and len(set(labels.tolist())) == len(labels)
    predictions = predict(load_classifier(name), np.stack([read_image(path, 224) for path in paths]), labels, torch.device("cpu"))
    assert [p.label for p in predictions] == labels.tolist()
