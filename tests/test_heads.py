"""Images of several classes and sigmoid heads: what is counted is what a script counts that shares no code
with the evaluation, from the written PNG files and the network alone.
"""

import json
import math
import runpy
import shutil

import diffattack.common.torchvision  # isort: skip  # noqa: F401
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MAIN, QUICK, ROOT, flags, predictions, save_vit, succeed
from PIL import Image

from diffattack.attacks.pixel import PixelAttack, Surrogates
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError
from diffattack.evaluation.predictions import ClassifierResult
from diffattack.evaluation.warnings import warnings_about_outputs

SIGMOID, CPU = Head(0.5), torch.device("cpu")
CLASSES = 20
NETWORK = """import torch


class Network(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(), torch.nn.Linear(288, 20),
        )
        with torch.no_grad():
            self.usual = torch.nn.Parameter(self.layers(torch.rand(8, 3, 96, 96)).mean(0))

    def forward(self, images):
        return 40 * (self.layers(images) - self.usual)


def make():
    return Network(0).eval()


def other():
    return Network(1).eval()
"""


def count(folder, network, labels, threshold, target=None) -> tuple[list[int], list[int]]:
    """Of a run: the images right before, and those fooled of these."""

    def seen(side, k, classes):
        picture = np.array(Image.open(folder / f"{k:04d}_{side}.png").convert("RGB"))
        logits = network(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)[0].tolist()
        return any(1 / (1 + math.exp(-logits[c])) > threshold for c in classes)

    right = [k for k, classes in enumerate(labels) if seen("originImage", k, classes)]
    if target is None:
        return right, [k for k in right if not seen("adv_image", k, labels[k])]
    right = [k for k in right if not seen("originImage", k, [target])]
    return right, [k for k in right if seen("adv_image", k, [target])]


@pytest.fixture(scope="module")
def several(data, tmp_path_factory):
    """Six photographs with one to three labels of twenty classes, and a random network of these."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "network.py").write_text(NETWORK)
    (folder / "names.txt").write_text("\n".join(f"thing {chr(97 + k)}" for k in range(CLASSES)) + "\n")
    (folder / "images").mkdir()
    for path in sorted((ROOT / "demo/images").iterdir())[:6]:
        shutil.copy(path, folder / "images")
    random = np.random.default_rng(1)
    labels = [sorted(random.choice(CLASSES - 2, 1 + k % 3, replace=False).tolist()) for k in range(6)]
    (folder / "labels.txt").write_text("".join(" ".join(map(str, one)) + "\n" for one in labels))
    return folder, labels


def attacked(data, folder, out, *extra):
    given = f"""--images_root {folder}/images --label_path {folder}/labels.txt --label_base 0 --head sigmoid
        --captions {folder}/names.txt --model_name {folder}/network.py:make --budget psnr=28
        --contrast_limit 0 --processes 1 --iterations 2"""
    result = succeed([*MAIN, *flags(data, out), *given.split(), "--attack_through", "", *map(str, extra)])
    return result, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("target, threshold", [(None, 0.5), (18, 0.52)])
def test_success_is_what_a_plain_script_counts(data, several, tmp_path, target, threshold):
    folder, labels = several
    extra = ["--threshold", threshold, "--transfer_models", f"{folder}/network.py:other"]
    extra += [] if target is None else ["--target_label", target]
    result, results = attacked(data, folder, tmp_path / "out", *extra)
    for of, function in zip(results["classifiers"], ("make", "other")):
        network = runpy.run_path(folder / "network.py")[function]()
        right, fooled = count(tmp_path / "out", network, labels, threshold, target)
        assert (of["success"]["count"], of["success"]["total"]) == (len(fooled), len(right))
        if function == "make":
            assert 0 < len(fooled) < 6
            told = {row["index"]: row["success"] for row in results["images"] if row["success"] is not None}
            assert told == {k: k in fooled for k in right}
    assert f"probability above {threshold:g}" in result.stdout
    assert ("target_confidence" in results["images"][0]["after"]) == (target is not None)
    if target is None:
        judge_again(data, folder, tmp_path, results)


def judge_again(data, folder, tmp_path, results):
    """A judge that comes later, and `--is_test`, which knows the run's head by itself, say the same."""
    mine = f"{folder}/network.py:make"
    _, later = attacked(data, folder, tmp_path / "out", "--transfer_models", f"{mine}@bits:8")
    first, again = later["classifiers"]
    assert first == results["classifiers"][0] and again["success"] == first["success"]
    command = f"""--is_test --images_root {tmp_path}/out --save_dir {tmp_path}/judged --label_base 0
        --captions {folder}/names.txt --model_name {mine} --transfer_models="""
    succeed([*MAIN, *command.split()])
    (of,) = json.loads((tmp_path / "judged/evaluation.json").read_text())["classifiers"]
    assert of["success"] == first["success"]


# ---------------------------------------------------------------- the head


LOGITS = torch.tensor([[2.0, -1.0, 0.5, -3.0], [-1.0, 40.0, 3.0, 0.2]])
LABELS, NONE = torch.tensor([[0, 2], [1, -1]]), torch.tensor([-1, -1])


def test_loss_margin_and_success_of_a_sigmoid_head():
    both = torch.stack([LOGITS, LOGITS / 2])
    expected = []
    for k, classes in enumerate(([0, 2], [1])):
        z = both[:, k, classes] / 2.0
        expected.append(F.binary_cross_entropy_with_logits(z, torch.ones_like(z)))
    assert torch.allclose(SIGMOID.cross_entropy(both, LABELS, NONE, 2.0), torch.stack(expected))
    targets = torch.tensor([3, -1])
    towards = SIGMOID.cross_entropy(LOGITS[None], LABELS, targets, 1.0)
    assert towards[0] == pytest.approx(math.log1p(math.exp(3)))
    for threshold in (0.1, 0.5, 0.9):
        head, edge = Head(threshold), math.log(threshold / (1 - threshold))
        assert head.margin(LOGITS, LABELS, NONE).tolist() == pytest.approx([edge - 2, edge - 40])
        assert head.margin(LOGITS, LABELS, targets)[0].item() == pytest.approx(-3 - edge)
    # so sure that float32 knows no difference to 1, and still with a gradient
    sure = torch.tensor([[40.0, 0.0]], requires_grad=True)
    SIGMOID.cross_entropy(sure[None], torch.tensor([[0]]), NONE[:1], 1.0).sum().backward()
    assert sure.grad[0, 0] < 0 and sure.grad[0, 1] == 0
    mean = SIGMOID.mean_logits([LOGITS, -LOGITS / 3])
    assert torch.allclose(mean.sigmoid(), (LOGITS.sigmoid() + (-LOGITS / 3).sigmoid()) / 2)


def test_an_image_that_shows_the_target_already_is_not_counted():
    before = predictions([(0, 0.9, 0.9, 0.2), (0, 0.9, 0.9, 0.7), (0, 0.9, 0.3, 0.1)])
    after = predictions([(0, 0.9, 0.9, 0.8), (0, 0.9, 0.9, 0.9), (0, 0.9, 0.1, 0.9)])
    sides = np.stack([before, after], 1)[:, None]
    result = ClassifierResult("m", np.array([0, 0, 0]), sides, np.array([1, 1, 1]), SIGMOID)
    assert result.counts[None]["success"][0].tolist() == [True, False, False]
    assert result.counts[None]["success"][1].tolist() == [True, False, False]
    counts = [result.rate(name).count for name in ("success_of_all", "accuracy_before", "accuracy_after")]
    assert counts == [3, 2, 2]


# ---------------------------------------------------------------- attacks of a library


def test_an_attack_of_a_library_sees_one_question_of_two_answers():
    network, labels = torch.nn.Flatten(), torch.tensor([[0, 2]])
    images = LOGITS[:, :, None, None]
    head = Head(0.8)
    over = LOGITS[:, [0, 2]].amax(1) - math.log(4)
    seen = Surrogates([network], labels, 1.0, head)(images)
    assert torch.equal(seen.argmax(1) == 0, over > 0)
    assert torch.allclose(F.cross_entropy(seen, torch.tensor([0, 0]), reduction="none"), F.softplus(-over))
    towards = Surrogates([network], labels, 1.0, head, target=3)(images)
    loss = F.cross_entropy(towards, torch.tensor([3, 3]), reduction="none")
    assert torch.allclose(loss, F.softplus(math.log(4) - LOGITS[:, 3]))


def test_pgd_hides_every_true_class():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3))
    pictures = torch.rand(2, 3, 32, 32).repeat_interleave(3, 2).repeat_interleave(3, 3)
    with torch.no_grad():
        network[2].weight *= 5
        network[2].bias += 0.05 - network(pictures).mean(0)
    attack = PixelAttack("torchattack:PGD(eps=8/255)", network, list("abc"), head=SIGMOID)
    result = attack(pictures, torch.tensor([[0, 1], [2, -1]]))
    after = network(result.adversarial) > 0
    assert not after[0, :2].any() and not after[1, 2] and result.record.fooled[-1].all()


# ---------------------------------------------------------------- what classifiers are


def test_one_output_is_the_logit_of_one_of_two_classes(tmp_path, capsys):
    """Of that which has its name, else of the second."""
    path = tmp_path / "one.py"
    path.write_text(QUICK.replace("1000", "1"))
    images = torch.rand(3, 3, 96, 96)
    two = load_classifier(f"{path}:build", ("benign", "malignant"), 96, attacked=True)
    one = load_classifier(f"{path}:build", ("malignant",), 96, head=SIGMOID)
    assert torch.allclose(two(images).softmax(-1)[:, 1:], one(images).sigmoid())
    assert "the logit of 'malignant' against the other" in capsys.readouterr().err
    save_vit(tmp_path, id2label={0: "pneumonia"}, problem_type="multi_label_classification")
    first = load_classifier(f"hf:{tmp_path}", ("pneumonia", "normal"), 96)(images)
    second = load_classifier(f"hf:{tmp_path}", ("normal", "pneumonia"), 96)(images)
    assert torch.equal(first, second.flip(-1)) and not first[:, 1].any() and first[:, 0].any()
    with pytest.raises(InputError, match="has 1 outputs, but there are 2 classes"):
        load_classifier(f"{path}:build", ("benign", "malignant"), 96, head=SIGMOID)


@pytest.mark.parametrize(
    "problem, head, other",
    [("multi_label_classification", SIGMOID, SOFTMAX), ("single_label_classification", SOFTMAX, SIGMOID)],
)
def test_a_model_of_transformers_whose_outputs_are_of_another_kind_is_refused(tmp_path, problem, head, other):
    save_vit(tmp_path, num_labels=3, problem_type=problem)
    load_classifier(f"hf:{tmp_path}", 3, 96, head=head)
    message = f"it is a {problem}, and the head here is {other.name}; give the --head that fits"
    with pytest.raises(InputError, match=message):
        load_classifier(f"hf:{tmp_path}", 3, 96, head=other)


def of_colours(function):
    """A classifier of three classes by the mean colour."""
    network = torch.nn.Module()
    network.forward = lambda images: function(9 * images.mean((2, 3)) - 4)
    return network


def test_probabilities_of_a_sigmoid_are_noticed():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for head, of, expected in (
        (SIGMOID, torch.sigmoid, ["take the sigmoid off"]),
        (SOFTMAX, torch.sigmoid, ["take the sigmoid off", "give --head sigmoid"]),
        (SOFTMAX, lambda z: z / 0 * 0, ["numbers that are not finite for some pictures"]),
        (SIGMOID, lambda z: z.softmax(-1), ["take the softmax off"]),
    ):
        (line,) = warnings_about_outputs("m", of_colours(of), pictures, CPU, head)
        assert all(part in line for part in expected)
        # of noise from 0 to 1, but not of everything
        assert not warnings_about_outputs("m", of_colours(lambda z: z - z.mean() + 0.5), pictures, CPU, head)
