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

    def make(classifier=CLASSIFIER):
        if request.param == "pixels":
            return PixelAttack("torchattack:PGD(steps=1)", classifier, CLASS_NAMES)
        options = dict(iterations=1, start_step=19, attack_through=(), checkpointing=False)
        return DiffAttack(checkpoint().to(torch.float32), classifier, CLASS_NAMES, **options)

    yield make
    checkpoint().to(torch.float64)


def changed(place, value) -> torch.Tensor:
    images = IMAGES.clone()
    images[place] = value
    return images


IMAGE_ROWS = [
    (2 * IMAGES - 1, r"images go from -0.9.* to .*; expected values in \[0, 1\]"),
    (changed((0, 0, 0, 0), torch.nan), "images go from nan to nan"),
    ((255 * IMAGES).byte(), r"images are a tensor \(2, 3, 96, 96\) of torch.uint8; expected floats"),
    (IMAGES[0], r"images are a tensor \(3, 96, 96\)"),
    (IMAGES[..., :80, :80], r"tensor \(2, 3, 80, 80\) .* S a multiple of 32 from 96 on"),
]
CLASS_ROWS = [
    ([1, 5], None, r"labels go from 1 to 5; expected indices of classes from 0 to 4"),
    ([-1, 1], None, "labels: an image has none"),
    ([[1, 1], [2, -1]], None, "none twice for an image"),
    (torch.eye(5).long()[LABELS], None, "no one-hot rows"),
    (["cat", "daisy"], None, "labels are .* of type list; expected integers"),
    (LABELS, [2, 4], "targets: one is a label of its image"),
    (LABELS, [2, 5], "targets go from 2 to 5"),
    (LABELS, [2], "targets are .* for 2 images"),
]
MASK_ROWS = [(IMAGES[:, 0], "masks "), (255 * IMAGES[:, :1], "masks ")]


def of_logits(wrap) -> torch.nn.Module:
    classifier = torch.nn.Module()
    classifier.forward = lambda images: wrap(CLASSIFIER(images))
    return classifier


CLASSIFIER_ROWS = [
    (of_logits(lambda logits: {"logits": logits}), "returns .* of type dict"),
    (of_logits(lambda logits: logits[:, None]), r"returns a tensor \(1, 1, 5\)"),
    (network(10), "has 10 outputs, and class_names has 5 names"),
    ([CLASSIFIER, "resnet"], "classifier is .* of type str; expected a torch.nn.Module"),
]
ROWS = [
    *((message, CLASSIFIER, images, LABELS, {}) for images, message in IMAGE_ROWS),
    *((message, CLASSIFIER, IMAGES, labels, {"targets": to}) for labels, to, message in CLASS_ROWS),
    *((message, CLASSIFIER, IMAGES, LABELS, {"masks": masks}) for masks, message in MASK_ROWS),
    *((message, classifier, IMAGES, LABELS, {}) for classifier, message in CLASSIFIER_ROWS),
]


@pytest.mark.parametrize("message, classifier, images, labels, more", ROWS, ids=[row[0] for row in ROWS])
def test_what_cannot_be_meant_is_refused_in_one_line(attack, message, classifier, images, labels, more):
    with pytest.raises(ValueError, match=message) as caught:
        attack(classifier)(images, labels, **more)
    assert "\n" not in str(caught.value)


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
