"""Classifiers whose answer about an image depends on others: none is attacked or believed."""

import pytest
import torch

from classifiers.registry import load_classifier
from common.errors import ClassifierError

NETWORK = """import torch
import torch.nn.functional as F


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)]
    return torch.nn.Sequential(*layers)


class Training(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        self.inner.train()
        return self.inner(x)


class OverBatch(Training):
    def forward(self, x):
        logits = self.inner.eval()(x)
        return logits - logits.mean(0)


class Flat(Training):
    def forward(self, x):
        return F.batch_norm(x.mean((2, 3)), None, None, training=True).repeat(1, 2)[:, :4]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "nets.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    image = torch.rand(2, 3, 64, 64)
    for mode in ("train", "eval"):
        network = getattr(space["network"](), mode)()
        traced = torch.jit.trace(network, image)
        torch.jit.save(torch.jit.freeze(traced.eval()) if mode == "eval" else traced, folder / f"{mode}.ts")
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(network, (image,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / f"{mode}.pt2")
    return folder


@pytest.mark.parametrize(
    "name", ["train.ts", "train.pt2", "nets.py:Training", "nets.py:OverBatch", "nets.py:Flat"]
)
@pytest.mark.parametrize("attacked", [True, False])
def test_answers_that_depend_on_the_batch_are_refused(files, name, attacked):
    with pytest.raises(ClassifierError, match="call .eval.. before it is exported") as caught:
        load_classifier(f"{files}/{name}", 4, 64, attacked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["eval.ts", "eval.pt2", "nets.py:network"])
def test_networks_in_eval_mode_are_taken(files, name):
    classifier = load_classifier(f"{files}/{name}", 4, 64, True)
    images = torch.rand(3, 3, 64, 64)
    assert torch.allclose(classifier(images)[1:2], classifier(images[1:2]), atol=1e-5)
