"""Arguments of a library call that cannot be meant, of both attacks; and some that are meant in odd forms."""

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, LEAST_SIDE, network

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers import arguments

IMAGES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 4])
CLASSIFIER = network(5)


@pytest.fixture(autouse=True)
def pictures_as_users_bring_them(monkeypatch):
    monkeypatch.setattr(arguments, "LEAST_SIDE", LEAST_SIDE)


@pytest.fixture(params=["latent", "pixels"])
def attack(request, checkpoint):
    """From a classifier and class names to either attack, as small as can be."""

    def make(classifier=CLASSIFIER, class_names=CLASS_NAMES):
        if request.param == "pixels":
            return PixelAttack("torchattack:PGD(steps=1)", classifier, class_names)
        options = dict(iterations=1, start_step=19, attack_through=(), checkpointing=False)
        return DiffAttack(checkpoint().to(torch.float32), classifier, class_names, **options)

    yield make
    checkpoint().to(torch.float64)


class Answering(torch.nn.Module):
    """A classifier that wraps its logits up."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.network = wrap, CLASSIFIER

    def forward(self, images):
        return self.wrap(self.network(images))


def changed(place, value) -> torch.Tensor:
    images = IMAGES.clone()
    images[place] = value
    return images


@pytest.mark.parametrize(
    "images, message",
    [
        (2 * IMAGES - 1, r"images go from -0.9.* to .*; expected values in \[0, 1\]"),
        (changed((0, 0, 0, 0), torch.nan), "images go from nan to nan"),
        ((255 * IMAGES).byte(), r"images are a tensor \(2, 3, 96, 96\) of torch.uint8; expected floats"),
        (IMAGES.numpy(), "images are .* of type ndarray; expected floats"),
        (IMAGES[0], r"images are a tensor \(3, 96, 96\)"),
        (IMAGES.permute(0, 2, 3, 1), r"images are a tensor \(2, 96, 96, 3\)"),
        (IMAGES[:0], r"images are a tensor \(0, 3, 96, 96\)"),
        (IMAGES[..., :80, :80], r"tensor \(2, 3, 80, 80\) .* S a multiple of 32 from 96 on"),
        (IMAGES[..., :64, :64], r"tensor \(2, 3, 64, 64\)"),
    ],
)
def test_images_that_cannot_be_meant(attack, images, message):
    with pytest.raises(ValueError, match=message) as caught:
        attack()(images, LABELS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels, targets, message",
    [
        ([1, 5], None, r"labels go from 1 to 5; expected indices of classes from 0 to 4"),
        ([-1, 1], None, "labels: an image has none"),
        ([-2, 1], None, "labels go from -2 to 1"),
        ([[1, 1], [2, -1]], None, "none twice for an image"),
        (torch.eye(5).long()[LABELS], None, "no one-hot rows"),
        (torch.eye(5)[LABELS], None, "labels are a tensor .* of torch.float32; expected integers"),
        (["cat", "daisy"], None, "labels are .* of type list; expected integers"),
        (1, None, "labels are an object of type int; .* for 2 images"),
        (LABELS, [2, 4], "targets: one is a label of its image"),
        ([[1, 2], [0, -1]], [2, 4], "targets: one is a label of its image"),
        (LABELS, [2, 5], "targets go from 2 to 5"),
        (LABELS, [2], "targets are .* for 2 images"),
        (LABELS, [[2, 3], [2, 3]], "expected one class for each image"),
    ],
)
def test_classes_that_cannot_be_meant(attack, labels, targets, message):
    with pytest.raises(ValueError, match=message) as caught:
        attack()(IMAGES, labels, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "classifier, names, message",
    [
        (Answering(lambda logits: {"logits": logits}), CLASS_NAMES, "returns .* of type dict"),
        (Answering(lambda logits: logits[:, None]), CLASS_NAMES, r"returns a tensor \(1, 1, 5\)"),
        (network(10), CLASS_NAMES, "has 10 outputs, and class_names has 5 names"),
        ([CLASSIFIER, "resnet"], CLASS_NAMES, "classifier is .* of type str; expected a torch.nn.Module"),
        ([], CLASS_NAMES, "classifier is "),
    ],
)
def test_classifiers_and_names_that_cannot_be_meant(attack, classifier, names, message):
    with pytest.raises(ValueError, match=message) as caught:
        attack(classifier, names)(IMAGES, LABELS)
    assert "\n" not in str(caught.value)


def test_a_mask_that_cannot_be_meant(attack):
    for masks in (IMAGES[:, 0], 255 * IMAGES[:, :1]):
        with pytest.raises(ValueError, match="masks "):
            attack()(IMAGES, LABELS, masks=masks)


def test_what_is_meant_in_odd_forms(attack):
    """What rounding leaves outside, an input with a gradient, and labels as people have them."""
    images = changed((0, 0, 0, 0), -3e-8)
    images[0, 0, 0, 1] = 1 + 1e-7
    images.requires_grad_()
    before, targets = images.detach().clone(), torch.tensor([2, -1])
    expected = attack()(before.clamp(0, 1), LABELS, targets).adversarial
    for labels in ([1, 4], np.array([1, 4]), [[1], [4]], torch.tensor([[1, -1], [-1, 4]])):
        found = attack()(images, labels, np.array([2, -1])).adversarial
        assert not found.requires_grad and torch.equal(found, expected)
    assert torch.equal(images, before) and images.requires_grad and images.grad is None
