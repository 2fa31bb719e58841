"""Classifiers as people bring them: each is run rightly, or refused in one line before the first image."""

import sys

import pytest
import torch
from conftest import IMAGES, MAIN, check, flags, network, save_vit, succeed

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError

NETWORK = """import numpy
import torch
from torch import nn
from torch.nn import functional as F


def net(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, classes))


"""
CODE = """class Mine(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.net = net(classes)
        self.conv, self.norm, self.line = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(64, 10)
        self.odd, self.instance = nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4)

    def end(self, x):
        return self.line(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def forward(self, x):
        {}


def build():
    return Mine()


def thousand():
    return Mine(1000)
"""


def code(folder, body: str, name: str = "mine.py") -> str:
    """A file whose functions return a module with this `forward`."""
    (folder / name).write_text(NETWORK + CODE.format(body))
    return f"{folder / name}:build"


OF_BATCH = "says something else of an image with others beside it"


@pytest.mark.parametrize(
    "body, message",
    [
        ("with torch.no_grad(): return self.net(x)", "has no gradient .* look for torch.no_grad"),
        ("return {'logits': self.net(x)}", "returns an object of type dict; expected float logits"),
        ("return self.net(x).argmax(1)", r"returns a tensor \(5,\)"),
        ("return self.net(x) * float('nan')", "not finite"),
        ("assert x.shape[-1] == 224, 'wrong side'; return self.net(x)", r"fails .* \(wrong side\); .*--res"),
        ("return self.net.half()(x)", "fails on images .* must take any number of that size in float32"),
        # what is said of an image must not depend on the others of a batch
        ("self.norm.train(); return self.end(self.norm(self.conv(x)))", OF_BATCH),
        ("x = (x - x.min()) / (x.max() - x.min()); return self.net(x)", OF_BATCH),
        ("x = self.end(self.odd(self.conv(x))); return x + torch.tensor([-1e9] + [0.0] * 9)", OF_BATCH),
        ("x = self.end(self.conv(x)); return x + 0.1 * x.cumsum(0)", OF_BATCH),  # of the first it is the same
        ("x = self.net(x); return x - x.mean(0) if len(x) > 3 else x", OF_BATCH),
    ],
)
def test_what_cannot_be_attacked_is_refused_in_one_line(tmp_path, body, message):
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(code(tmp_path, body), 10, 96, attacked=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "body",
    [
        "return self.end(self.instance(self.norm(self.conv(x))))",
        "return F.dropout(self.end(self.conv(x)), 0.5, True)",  # random, which a warning says
        "return self.end(self.conv(x)) + torch.from_numpy(numpy.random.rand(len(x), 10)).float()",
        "return self.end(self.conv(x)) * (1 + 1e-4 * len(x))",  # no more than arithmetic's
        "return torch.zeros(len(x), 10) + 0 * x.sum()",
    ],
)
def test_what_says_of_each_image_what_it_says_of_it_alone_is_not(tmp_path, body):
    load_classifier(code(tmp_path, body), 10, 96, attacked=True)


def test_a_classifier_without_a_gradient_may_judge(tmp_path):
    name = code(tmp_path, "with torch.no_grad(): return self.net(x)")
    assert torch.allclose(load_classifier(name, 10, 96)(IMAGES), network(10)(IMAGES))


# ---------------------------------------------------------------- programs


def normalised() -> torch.nn.Module:
    nn = torch.nn
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def save(network: torch.nn.Module, path, images: int, most: int | None = None) -> str:
    """Traced as TorchScript or exported, for this number of images, or for any up to the most."""
    if path.suffix == ".ts":
        torch.jit.trace(network, IMAGES[:images], check_trace=False).save(path)
    else:
        shapes = most and ({0: torch.export.Dim("batch", min=1, max=most)},)
        torch.export.save(torch.export.export(network, (IMAGES[:images],), dynamic_shapes=shapes), path)
    return str(path)


@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_a_program_that_was_made_in_training_mode_is_refused(tmp_path, kind):
    name = save(normalised().train(), tmp_path / f"net.{kind}", 2, 64)
    for attacked in (True, False):  # a surrogate, a judge
        with pytest.raises(InputError, match="put it into eval mode, before it is exported"):
            load_classifier(name, 10, 96, attacked)


@pytest.mark.parametrize("kind, images, most", [("ts", 2, None), ("pt2", 1, None), ("pt2", 2, 4)])
def test_the_same_in_eval_mode_is_itself(tmp_path, kind, images, most):
    """One that takes a single image, or four at most, is asked one by one."""
    network, x = normalised().eval(), torch.rand(9, 3, 96, 96)
    name = save(network, tmp_path / f"net.{kind}", images, most)
    assert torch.allclose(load_classifier(name, 10, 96, True)(x), network(x), atol=1e-5)


def test_a_script_in_training_mode_is_put_into_eval_mode(tmp_path):
    """TorchScript that was compiled, and not traced, keeps its mode."""
    torch.jit.script(normalised().train()).save(tmp_path / "net.ts")
    check(f"{tmp_path}/net.ts", 10, normalised().eval()(IMAGES))


BESIDE = """from __future__ import annotations
import common, torch
from data.dataset import CLASSES

class Mine(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        from runner.inner import deep
        return self.net(x) * deep.SCALE

def build():
    from utils import net
    from diffattack.classifiers.preprocessing import Preprocessed
    return Preprocessed(Mine(net(CLASSES)), None, 0.0, 1.0)
"""


def test_modules_beside_the_file_are_imported_by_their_names(tmp_path):
    """Modules, and folders without __init__.py, also of names that this project's folders and commands have,
    beside modules of ours; imported with the file, by its function, and only when the network runs. A second
    file does not get the first one's modules.
    """
    texts = {"common.py": "", "utils.py": NETWORK, "classifiers.py": BESIDE}
    texts |= {"runner/inner/deep.py": "SCALE = 1.0\n"}
    before = list(sys.path)
    for folder, classes in (("a", 7), ("b", 10)):
        for name, text in (texts | {"data/dataset.py": f"CLASSES = {classes}\n"}).items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        check(f"{tmp_path}/{folder}/classifiers.py:build", classes, network(classes)(IMAGES))
    assert not {"common", "data", "runner", "classifiers"} & set(sys.modules) and sys.path == before


# ---------------------------------------------------------------- folders of transformers


@pytest.fixture
def vit(tmp_path):
    """A small vision transformer of two classes with names."""
    save_vit(tmp_path, id2label={0: "Polar_Bear", 1: "cat"})
    return tmp_path


def test_outputs_in_another_order_are_matched_by_name(vit, capsys):
    name = f"hf:{vit}"
    same = load_classifier(name, ("polar bear", "cat"), 96)
    assert capsys.readouterr().err == ""
    other = load_classifier(name, ("cat", "polar bear"), 96)
    assert torch.equal(other(IMAGES), same(IMAGES).flip(1))
    assert "in another order than --captions; they are matched by their names" in capsys.readouterr().err
    assert torch.equal(load_classifier(name, ("dog", "cat"), 96)(IMAGES), same(IMAGES))
    assert "such as ['Polar_Bear']; its" in capsys.readouterr().err


def headless(folder):
    from transformers import ViTModel

    ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')


@pytest.mark.parametrize(
    "change, message",
    [
        (headless, "has no weights for classifier.bias, classifier.weight, which would be random"),
        (pickled, "names .'pytorch_model.bin'.; expected .safetensors files"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be loaded"),
    ],
)
def test_folders_that_are_not_whole_are_refused_in_one_line(vit, change, message):
    change(vit)
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(f"hf:{vit}", 2, 96)
    assert "\n" not in str(caught.value)


def test_probabilities_and_answers_that_change_are_said_at_once(data, tmp_path):
    code(tmp_path, "return self.net(x).softmax(-1)", "Soft.py")
    code(tmp_path, "return F.dropout(self.net(x), 0.5, True)", "Random.py")
    names = f"{tmp_path}/Soft.py:thousand,{tmp_path}/Random.py:thousand"
    result = succeed([*MAIN, *flags(data, tmp_path / "out", "--check", "--model_name", names)])
    assert "Soft.py:thousand returns probabilities" in result.stderr
    assert "Random.py:thousand answers differently when asked twice" in result.stderr
