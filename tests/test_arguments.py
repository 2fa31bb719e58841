"""Arguments of a library call that cannot be meant, of both attacks; and some that are meant in odd forms."""

from types import SimpleNamespace

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
    "images, labels, targets, error, message",
    [
        (
            2 * IMAGES - 1,
            LABELS,
            None,
            ValueError,
            r"images go from -0.9.* to .*; expected values in \[0, 1\]",
        ),
        (255 * IMAGES, LABELS, None, ValueError, "images go from .* to 25"),
        (changed((0, 0, 0, 0), torch.nan), LABELS, None, ValueError, "images go from nan to nan"),
        (
            (255 * IMAGES).byte(),
            LABELS,
            None,
            ValueError,
            r"images are a tensor \(2, 3, 96, 96\) of torch.uint8",
        ),
        (IMAGES.numpy(), LABELS, None, ValueError, "images are .* of type ndarray; expected floats"),
        (IMAGES[0], LABELS[:1], None, ValueError, r"images are a tensor \(3, 96, 96\)"),
        (IMAGES[:, :1], LABELS, None, ValueError, r"images are a tensor \(2, 1, 96, 96\)"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, None, ValueError, r"images are a tensor \(2, 96, 96, 3\)"),
        (IMAGES[:0], LABELS[:0], None, ValueError, r"images are a tensor \(0, 3, 96, 96\)"),
        (
            IMAGES[..., :80, :80],
            LABELS,
            None,
            ValueError,
            "images are 80 x 80; .* a multiple of 32, at least 96",
        ),
        (IMAGES[..., :64, :64], LABELS, None, ValueError, "images are 64 x 64"),
        (IMAGES[..., :64, :], LABELS, None, ValueError, "images are 64 x 96; expected squares"),
        (IMAGES, [1, 5], None, ValueError, r"labels: image 1 has \[5\]; expected classes from 0 to 4"),
        (IMAGES, [-1, 1], None, ValueError, "labels: image 0 has none"),
        (IMAGES, [-2, 1], None, ValueError, r"labels: image 0 has \[-2\]"),
        (IMAGES, [[1, 1], [2, -1]], None, ValueError, "labels: image 0 has a class twice"),
        (IMAGES, torch.eye(5).long()[LABELS], None, ValueError, "class twice; .* not one-hot"),
        (
            IMAGES,
            torch.eye(5)[LABELS],
            None,
            TypeError,
            "labels are a tensor .* of torch.float32; expected integers",
        ),
        (IMAGES, torch.eye(5)[LABELS] > 0, None, TypeError, "labels are a tensor .* of torch.bool"),
        (IMAGES, ["cat", "daisy"], None, TypeError, "labels are .* of type list; expected integers"),
        (IMAGES, [1], None, ValueError, r"labels are \(1,\) for 2 images"),
        (IMAGES, 1, None, ValueError, r"labels are \(\) for 2 images"),
        (IMAGES, LABELS, [2, 4], ValueError, r"targets: that of image \[1\] is its own label"),
        (IMAGES, [[1, 2], [0, -1]], [2, 4], ValueError, r"targets: that of image \[0\] is its own label"),
        (IMAGES, LABELS, [2, 5], ValueError, r"targets: image 1 has \[5\]"),
        (IMAGES, LABELS, [2], ValueError, "targets are .* for 2 images"),
        (IMAGES, LABELS, [[2, 3], [2, 3]], ValueError, "expected one class for each image"),
    ],
)
def test_images_and_classes_that_cannot_be_meant(attack, images, labels, targets, error, message):
    with pytest.raises(error, match=message) as caught:
        attack()(images, labels, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("masks", [IMAGES[:, 0], 255 * IMAGES[:, :1], IMAGES[:, :1].numpy()])
def test_masks_that_cannot_be_meant(attack, masks):
    with pytest.raises(ValueError, match="masks "):
        attack()(IMAGES, LABELS, masks=masks)


@pytest.mark.parametrize(
    "classifier, names, error, message",
    [
        (Answering(lambda logits: {"logits": logits}), CLASS_NAMES, ValueError, "returns .* of type dict"),
        (Answering(lambda logits: (logits, None)), CLASS_NAMES, ValueError, "returns .* of type tuple"),
        (Answering(lambda x: SimpleNamespace(logits=x)), CLASS_NAMES, ValueError, "expected float logits"),
        (Answering(lambda logits: logits[:, None]), CLASS_NAMES, ValueError, r"returns a tensor \(1, 1, 5\)"),
        (network(10), CLASS_NAMES, ValueError, "has 10 outputs, and class_names has 5 names"),
        (CLASSIFIER, range(1000), ValueError, "has 5 outputs, and class_names has 1000 names"),
        (lambda images: images, CLASS_NAMES, TypeError, "classifier is .* of type function"),
        ([CLASSIFIER, "resnet"], CLASS_NAMES, TypeError, "classifier has .* of type str in it"),
        ([], CLASS_NAMES, TypeError, "classifier is .* of type list"),
        (CLASSIFIER, "a cat", TypeError, "class_names is the text 'a cat'; expected a name for each class"),
    ],
)
def test_classifiers_and_names_that_cannot_be_meant(attack, classifier, names, error, message):
    with pytest.raises(error, match=message) as caught:
        attack(classifier, names)(IMAGES, LABELS)
    assert "\n" not in str(caught.value)


def test_what_rounding_leaves_outside_and_an_input_with_a_gradient(attack):
    images = changed((0, 0, 0, 0), -3e-8)
    images[0, 0, 0, 1] = 1 + 1e-7
    images.requires_grad_()
    before = images.detach().clone()
    found = attack()(images, LABELS).adversarial
    assert torch.equal(images, before) and images.requires_grad and images.grad is None
    assert not found.requires_grad and torch.equal(found, attack()(before.clamp(0, 1), LABELS).adversarial)


@pytest.mark.parametrize("labels", [[1, 4], np.array([1, 4]), [[1], [4]], torch.tensor([[1, -1], [-1, 4]])])
def test_labels_in_the_forms_that_people_have_them_in(attack, labels):
    targets = np.array([2, -1])
    found = attack()(IMAGES, labels, targets).adversarial
    assert torch.equal(found, attack()(IMAGES, LABELS, torch.tensor([2, -1])).adversarial)
