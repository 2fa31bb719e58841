"""What a classifier says of an image must not depend on the others of a batch."""

import pytest
import torch
from conftest import IMAGES, network
from torch import nn

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError

BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def normalised(classes: int = 10, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.BatchNorm2d(8, **options),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def export(network: nn.Module, path, batch: int = 2) -> str:
    """Traced as TorchScript or exported, as the network is: a batch of one is of one alone."""
    images = IMAGES[:batch]
    if path.suffix == ".ts":
        torch.jit.trace(network, images, check_trace=False).save(path)
    else:
        shapes = BATCH if batch > 1 else None
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    return str(path)


@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_a_program_frozen_in_training_mode_is_refused(tmp_path, kind):
    name = export(normalised().train(), tmp_path / f"net.{kind}")
    for attacked in (True, False):  # a surrogate, a judge
        with pytest.raises(InputError, match="put it into eval mode, before it is exported") as caught:
            load_classifier(name, 10, 96, attacked)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_the_same_in_eval_mode_is_itself(tmp_path, kind, batch):
    network = normalised(dropout=0.5).eval()
    name = export(network, tmp_path / f"net.{kind}", batch)
    assert torch.allclose(load_classifier(name, 10, 96, True)(IMAGES), network(IMAGES), atol=1e-5)


def test_a_script_in_training_mode_is_put_into_eval_mode(tmp_path):
    """TorchScript that was compiled, and not traced, keeps its mode."""
    torch.jit.script(normalised().train()).save(tmp_path / "net.ts")
    classifier = load_classifier(f"{tmp_path}/net.ts", 10, 96)
    assert torch.allclose(classifier(IMAGES), normalised().eval()(IMAGES), atol=1e-5)


CODE = """import numpy
import torch
import torch.nn.functional as F
from torch import nn


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.line = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(64, 10)
        self.odd = nn.BatchNorm2d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4)

    def end(self, x):
        return self.line(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def forward(self, x):
        %s


def build():
    return Mine()
"""


def mine(folder, body: str) -> str:
    (folder / "mine.py").write_text(CODE % body)
    return f"{folder}/mine.py:build"


OF_BATCH = "says something else of an image with others beside it"


@pytest.mark.parametrize(
    "body, message",
    [
        ("x = self.conv(x); return self.end(F.batch_norm(x, None, None, training=True))", OF_BATCH),
        ("self.norm.train(); return self.end(self.norm(self.conv(x)))", OF_BATCH),
        ("return self.end(self.odd(self.conv(x)))", OF_BATCH),
        ("x = self.end(self.conv(x)); return x - x.mean(0)", OF_BATCH),
        ("x = self.end(self.conv(x)); return x.softmax(0)", OF_BATCH),
        ("return self.end(self.conv(x)) / len(x)", OF_BATCH),
        ("x = (x - x.min()) / (x.max() - x.min()); return self.end(self.conv(x))", OF_BATCH),
        ("x = x / x.amax(); return self.end(self.conv(x))", OF_BATCH),
        ("x = self.end(self.odd(self.conv(x))); return x + torch.tensor([-1e9] + [0.0] * 9)", OF_BATCH),
        ("return self.end(self.odd(self.conv(x))) + 1000", OF_BATCH),
        ("x = self.end(self.conv(x)); return x + 0.1 * x.cumsum(0)", OF_BATCH),  # of the first it is the same
        ("x = self.end(self.conv(x)); return x - x.mean(0) if len(x) > 3 else x", OF_BATCH),
        ("return self.end(self.conv(x)).squeeze()", r"returns a tensor \(10,\)"),
        ("assert len(x) > 1, 'two at least'; return self.end(self.conv(x))", r"fails .* \(two at least\)"),
    ],
)
def test_code_that_is_no_classifier_of_an_image_is_refused(tmp_path, body, message):
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(mine(tmp_path, body), 10, 96, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "return self.end(self.norm(self.conv(x)))",
        "return self.end(self.instance(self.conv(x)))",
        "return F.dropout(self.end(self.conv(x)), 0.5, True)",  # random, which a warning says
        "return self.end(self.conv(x)) + torch.from_numpy(numpy.random.rand(len(x), 10)).float()",
        "return self.end(self.conv(x)) * (1 + 1e-4 * len(x))",  # no more than arithmetic's
        "return torch.zeros(len(x), 10) + 0 * x.sum()",
    ],
)
def test_what_says_of_each_image_what_it_says_of_it_alone_is_not(tmp_path, body):
    load_classifier(mine(tmp_path, body), 10, 96, True)


def test_a_program_of_few_images_is_asked_one_by_one(tmp_path):
    net, name = network(10).eval(), tmp_path / "few.pt2"
    few = torch.export.Dim("b", min=1, max=4)
    torch.export.save(torch.export.export(net, (IMAGES[:2],), dynamic_shapes=({0: few},)), name)
    images = torch.rand(9, 3, 96, 96)
    assert torch.allclose(load_classifier(str(name), 10, 96)(images), net(images), atol=1e-5)


def test_a_program_of_one_number_of_images_is_refused(tmp_path):
    path = tmp_path / "eight.pt2"
    torch.export.save(torch.export.export(network(10).eval(), (torch.rand(8, 3, 96, 96),)), path)
    with pytest.raises(InputError, match="fails .* must take any number"):
        load_classifier(str(path), 10, 96)
