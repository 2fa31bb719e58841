"""Classifiers as people bring them: each is run rightly, or refused in one line before the first image."""

import shutil
import sys

import pytest
import torch
from conftest import IMAGES, MAIN, check, flags, network, run, save_vit

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError

HEADER = "import numpy, torch\nfrom torch import nn\n\n\n"
NETWORK = (
    "def net(classes=10):\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, classes))\n\n\n"
)


def code(folder, body: str, name: str = "mine.py") -> str:
    """A file whose `build` returns a module with this `forward`, of `self.net`."""
    (folder / name).write_text(
        HEADER
        + NETWORK
        + "class Mine(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + "        self.net = net()\n\n    def forward(self, x):\n        "
        + body
        + "\n\n\ndef build():\n    return Mine()\n"
    )
    return f"{folder / name}:build"


@pytest.mark.parametrize(
    "body, message",
    [
        ("with torch.no_grad(): return self.net(x)", "has no gradient .* look for torch.no_grad"),
        ("with torch.inference_mode(): return self.net(x)", "has no gradient"),
        ("return self.net(x.detach())", "has no gradient"),
        ("return torch.from_numpy(self.net(x.detach()).detach().numpy())", "has no gradient"),
        ("return {'logits': self.net(x)}", "returns an object of type dict; expected float logits"),
        ("return self.net(x), x", "returns an object of type tuple"),
        ("return self.net(x).argmax(1)", r"returns a tensor \(5,\)"),
        ("return (100 * self.net(x)).long()", "returns a tensor .* of torch.int64"),
        ("return self.net(x) * float('nan')", "not finite"),
        ("return self.net(x[:, :1])", "fails on images"),
        (  # of one channel
            "return self.net(nn.functional.conv2d(x, torch.ones(1, 1, 3, 3)))",
            r"fails on images \(5, 3, 96, 96\) .*expected input.* to have 1 channels, but got 3",
        ),
        ("assert x.shape[-1] == 224, 'wrong side'; return self.net(x)", r"fails .* \(wrong side\); .*--res"),
        ("return self.net(x.to('meta'))", "fails on|returns"),
        ("raise KeyError('broken')", "fails on images .*broken"),
    ],
)
def test_what_cannot_be_attacked_is_refused_in_one_line(tmp_path, body, message):
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(code(tmp_path, body), 10, 96, attacked=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_classifier_without_a_gradient_may_judge(tmp_path):
    name = code(tmp_path, "with torch.no_grad(): return self.net(x)")
    assert torch.allclose(load_classifier(name, 10, 96)(IMAGES), network(10)(IMAGES))


def test_half_precision_is_refused_in_one_line(tmp_path):
    path = code(tmp_path, "return self.net(x)").removesuffix(":build")
    with open(path, "a") as file:
        file.write("\n\ndef half():\n    return Mine().half()\n")
    with pytest.raises(
        InputError, match="fails on images .* must take any number of that size in float32"
    ) as caught:
        load_classifier(f"{path}:half", 10, 96)
    assert "\n" not in str(caught.value)


def test_a_program_of_one_image(tmp_path):
    torch.export.save(torch.export.export(network(10), (IMAGES[:1],)), tmp_path / "net.pt2")
    check(tmp_path / "net.pt2", 10, network(10)(IMAGES))


# ---------------------------------------------------------------- code as Python would run it


def test_modules_beside_the_file_are_imported_by_their_names(tmp_path):
    """Modules, packages, and folders without __init__.py, also of names that this project's folders and
    commands have; imported with the file, by its function, and only when the network runs.
    """
    for name in ("common.py", "utils.py", "beside_mine.py"):
        (tmp_path / name).write_text(HEADER + NETWORK)
    for name in ("data", "diffusion", "runner/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/dataset.py").write_text("CLASSES = 10\n")
    (tmp_path / "diffusion/noise.py").write_text("SCALE = 1.0\n")
    (tmp_path / "runner/inner/deep.py").write_text("from diffusion.noise import SCALE\n")
    (tmp_path / "classifiers.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "import beside_mine, common, torch\nfrom data.dataset import CLASSES\n\n\n"
        "@dataclass\nclass Settings:\n    classes: int = CLASSES\n\n\n"
        "class Mine(torch.nn.Module):\n    def __init__(self, net):\n        super().__init__()\n"
        "        self.net = net\n\n    def forward(self, x):\n        from runner.inner import deep\n"
        "        import utils\n        assert utils.net\n        return self.net(x) * deep.SCALE\n\n\n"
        "def build():\n    from utils import net\n    return Mine(net(Settings().classes))\n"
    )
    path = list(sys.path)
    check(f"{tmp_path / 'classifiers.py'}:build", 10, network(10)(IMAGES))
    assert not {"common", "data", "diffusion.noise", "runner", "beside_mine", "classifiers"} & set(
        sys.modules
    )
    assert sys.path == path


def test_two_files_each_with_a_module_of_the_same_name(tmp_path):
    """The second does not get the first one's `net.py`, nor its package without __init__.py."""
    names = []
    for folder, classes in (("a", 7), ("b", 10)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "net.py").write_text(HEADER + NETWORK)
        (tmp_path / folder / "parts/size.py").write_text(f"CLASSES = {classes}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from net import net\nfrom parts.size import CLASSES\n\n\ndef build():\n    return net(CLASSES)\n"
        )
        names.append(f"{tmp_path / folder / 'mine.py'}:build")
    check(names[0], 7, network(7)(IMAGES))
    check(names[1], 10, network(10)(IMAGES))


def test_a_file_of_the_user_may_use_our_modules(tmp_path):
    (tmp_path / "mine.py").write_text(
        HEADER + NETWORK + "def build():\n    from diffattack.classifiers.preprocessing import Preprocessed\n"
        "    return Preprocessed(net(), None, 0.0, 1.0)\n"
    )
    check(f"{tmp_path / 'mine.py'}:build", 10, network(10)(IMAGES))


@pytest.mark.parametrize(
    "text, message",
    [
        ("import not_there_at_all\n", "ModuleNotFoundError: .*not_there_at_all"),
        ("def build(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        (
            HEADER + NETWORK + "def build():\n    net().load_state_dict({'other': torch.zeros(1)})\n",
            "RuntimeError: .*Missing key",
        ),
    ],
)
def test_code_that_fails_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(f"{tmp_path / 'mine.py'}:build", 10, 96)
    assert "\n" not in str(caught.value)


def test_data_parallel_is_unwrapped(tmp_path):
    (tmp_path / "mine.py").write_text(HEADER + NETWORK + "def build():\n    return nn.DataParallel(net())\n")
    check(f"{tmp_path / 'mine.py'}:build", 10, network(10)(IMAGES))


# ---------------------------------------------------------------- folders of transformers


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small vision transformer of two classes with names, and its image processor."""
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    save_vit(folder, id2label={0: "Polar_Bear", 1: "cat"})
    ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def test_outputs_in_another_order_are_matched_by_name(vit, capsys):
    name = f"hf:{vit}"
    same = load_classifier(name, ("polar bear", "cat"), 96)
    assert capsys.readouterr().err == ""
    other = load_classifier(name, ("cat", "polar bear"), 96)
    assert torch.equal(other(IMAGES), same(IMAGES).flip(1))
    assert "in another order than --captions; they are matched by their names" in capsys.readouterr().err
    assert torch.equal(load_classifier(name, ("dog", "cat"), 96)(IMAGES), same(IMAGES))
    assert "such as 'Polar_Bear' for 'dog'; its" in capsys.readouterr().err


def broken(vit, folder, change):
    shutil.copytree(vit, folder, dirs_exist_ok=True)
    change(folder)
    return f"hf:{folder}"


def headless(folder):
    from transformers import ViTModel

    ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)


def pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def other_sizes(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))


def other_processor(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("96", "64"))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')


@pytest.mark.parametrize(
    "change, message",
    [
        (headless, "has no weights for classifier.bias, classifier.weight, which would be random"),
        (pointer, "Git LFS pointer"),
        (cut, "no safetensors file, or not whole"),
        (other_sizes, "weights of another shape|mismatch"),
        (other_processor, r"fails on images \(5, 3, 96, 96\)"),
        (pickled, "names .'pytorch_model.bin'.; expected .safetensors files"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be loaded"),
    ],
)
def test_folders_that_are_not_whole_are_refused_in_one_line(vit, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(broken(vit, tmp_path / "broken", change), 2, 96)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- said before the first image


def test_probabilities_and_answers_that_change_are_said_at_once(data, tmp_path):
    for name, body in {
        "Soft": "return self.net(x).softmax(-1)",
        "Random": "return torch.nn.functional.dropout(self.net(x), 0.5, True)",
    }.items():
        path = code(tmp_path, body, f"{name}.py").removesuffix(":build")
        with open(path, "a") as file:
            file.write("\n\ndef thousand():\n    mine = Mine()\n    mine.net = net(1000)\n    return mine\n")
    names = f"{tmp_path}/Soft.py:thousand,{tmp_path}/Random.py:thousand"
    result = run([*MAIN, *flags(data, tmp_path / "out", "--check", "--model_name", names)])
    assert result.returncode == 0, result.stderr
    assert "Soft.py:thousand returns probabilities" in result.stderr
    assert "Random.py:thousand answers differently when asked twice" in result.stderr
