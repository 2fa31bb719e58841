"""Defences against independent figures, and runs that are judged behind them or attack through them."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MAIN, classifier_result, flags, network, pictures, run
from PIL import Image
from scipy import ndimage
from scipy.stats import binomtest, norm

from diffattack.classifiers.defences import (
    ATTACK_SEED,
    Defended,
    Smoothed,
    certificate,
    defend,
    make_defence,
    split_name,
    under_attack,
)
from diffattack.classifiers.heads import SOFTMAX
from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError
from diffattack.evaluation.results import Evaluation
from diffattack.options import ModelOptions

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seen(text: str, images: torch.Tensor = PICTURES, seed: int = 0) -> torch.Tensor:
    """What a classifier behind this defence sees at one draw."""
    return make_defence(text, None)(images, torch.Generator().manual_seed(seed))


def test_jpeg_is_pillows():
    for quality in (10, 75):
        for image, shown in zip(PICTURES, seen(f"jpeg:{quality}")):
            file = io.BytesIO()
            pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
            pixels.save(file, "JPEG", quality=quality)
            expected = np.asarray(Image.open(file))
            assert np.array_equal((shown * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_bits_leave_so_many_levels():
    assert seen("bits:1").unique().tolist() == [0, 1]
    shown = seen("bits:3")
    assert len(shown.unique()) == 8 and (shown - PICTURES).abs().max() <= 0.5 / 7 + 1e-6


@pytest.mark.parametrize(
    "text, reference",
    [
        ("blur:0.8", lambda plane: ndimage.gaussian_filter(plane, 0.8, mode="mirror", truncate=4)),
        ("blur:2", lambda plane: ndimage.gaussian_filter(plane, 2, mode="mirror", truncate=4)),
        ("median:3", lambda plane: ndimage.median_filter(plane, 3, mode="mirror")),
        ("median:5", lambda plane: ndimage.median_filter(plane, 5, mode="mirror")),
    ],
)
def test_filters_are_scipys(text, reference):
    for image, shown in zip(PICTURES, seen(text)):
        for plane, result in zip(image, shown):
            np.testing.assert_allclose(result, reference(plane.numpy().astype(np.float64)), atol=1e-5)


def test_random_resizing_keeps_within_its_bounds_and_reaches_them():
    white, draws = torch.ones(1, 3, 32, 32), []
    for seed in range(2000):
        shown = seen("resize:0.75", white, seed)[0, 0]
        assert shown.shape == (32, 32) and torch.allclose(shown, shown.round(), atol=1e-5)
        rows, columns = (shown.amax(side).nonzero().flatten() for side in (1, 0))
        assert len(rows) == len(columns) and shown.sum() == pytest.approx(len(rows) ** 2)  # a square
        draws.append((len(rows), int(columns[0]), int(rows[0])))
    side, left, top = np.array(draws).T
    assert set(side) == set(range(24, 33))
    assert set(left[side == 24]) == set(top[side == 24]) == set(range(9))


def test_random_defences_are_the_mean_of_probabilities_whatever_the_batch():
    classifier = network(5)
    defended = defend(classifier, ["resize:0.5"])
    expected = torch.stack([classifier(seen("resize:0.5", seed=s)).softmax(-1) for s in range(10)]).mean(0)
    assert torch.allclose(defended(PICTURES).softmax(-1), expected, atol=1e-6)
    assert torch.allclose(defended(PICTURES[1:2]), defended(PICTURES)[1:2], atol=1e-5)


def test_defences_in_a_row_are_taken_in_their_order():
    classifier = network(5)
    both = defend(classifier, ["bits:1", "blur:2"])
    assert torch.equal(both(PICTURES), classifier(seen("blur:2", seen("bits:1"))))
    assert not torch.allclose(both(PICTURES), defend(classifier, ["blur:2", "bits:1"])(PICTURES))


@pytest.mark.parametrize("text", ["jpeg:75", "bits:2", "median:3"])
def test_without_a_gradient_the_way_back_is_the_identity(text):
    images = PICTURES.clone().requires_grad_()
    weights = torch.rand(PICTURES.shape)
    (seen(text, images) * weights).sum().backward()
    assert torch.equal(images.grad, weights)


def test_an_attack_sees_new_draws_in_each_pass_the_same_for_all_images():
    defended = Defended(network(5), [make_defence("resize:0.8", None)], attack_draws=2)
    images = torch.cat([PICTURES, PICTURES.flip(-1)]).requires_grad_()
    together = under_attack(defended, images, 2)
    for k in range(len(images)):
        assert torch.allclose(together[k], under_attack(defended, images[k : k + 1], 2)[0], atol=1e-5)
    assert not torch.allclose(together, under_attack(defended, images, 1), atol=1e-5)
    assert torch.equal(defended(images), under_attack(defended, images, 0))


def test_draws_before_draws_are_the_same_when_they_are_made_anew():
    """Of a surrogate with a random defence of its own that is attacked through another; against no
    checkpointing, and twice back through the same graph.
    """
    behind = Defended(network(5), [make_defence("smoothing:0.5", None)], attack_draws=2)
    through = Defended(behind, [make_defence("resize:0.8", None)], attack_draws=3)
    images = PICTURES.clone().requires_grad_()
    loss = under_attack(through, images, 4)[:, 1].sum()
    first, again = (torch.autograd.grad(loss, images, retain_graph=True)[0] for _ in range(2))
    logits = []
    for k in range(3):
        changed = through.changed(images, ATTACK_SEED + 4 * 3 + k)
        seeds = [ATTACK_SEED + (4 * 3 + k) * 2 + j for j in range(2)]
        logits.append(
            SOFTMAX.mean_logits([behind.classifier(behind.changed(changed, seed)) for seed in seeds])
        )
    (expected,) = torch.autograd.grad(SOFTMAX.mean_logits(logits)[:, 1].sum(), images)
    assert torch.equal(first, again) and torch.allclose(first, expected, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- smoothing


@pytest.mark.parametrize("count", [0, 40, 60, 89, 90])
def test_a_certificate_is_the_published_formula(count):
    votes = np.array([7] * 10 + [7] * count + [3] * (90 - count))
    found = certificate(votes, 0.25)
    bound = binomtest(count, 90, alternative="greater").proportion_ci(0.999, method="exact").low
    assert found["label"] == 7 and found["abstains"] == (bound <= 0.5)
    assert found["radius"] == pytest.approx(0 if bound <= 0.5 else 0.25 * norm.ppf(bound), rel=1e-9)


def test_smoothing_answers_with_the_class_most_often_seen():
    class Bright(torch.nn.Module):
        """Class 1 where the mean of the first pixel is above 0.5."""

        def forward(self, images):
            return torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0] - 0.5], 1)

    smoothed = defend(Bright(), ["smoothing:0.25"])
    images = torch.full((3, 3, 8, 8), 0.5)
    images[0], images[1] = 0.2, 0.9
    votes = torch.stack([Bright()(smoothed.changed(images, seed)).argmax(-1) for seed in range(100)])
    shares = smoothed(images).softmax(-1)
    assert isinstance(smoothed, Smoothed) and shares.argmax(-1)[:2].tolist() == [0, 1]
    np.testing.assert_allclose(shares[:, 1], votes.double().mean(0), atol=1e-6)
    found = smoothed.certify(images)
    assert found["label"][:2].tolist() == [0, 1] and found["abstains"].tolist() == [False, False, True]
    assert 0 < found["radius"][0] < 0.3 + 0.1  # the distance to the border is 0.3


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, expected",
    [
        ("efficientnet_lite0", ("efficientnet_lite0", ())),
        ("resnet@jpeg:75", ("resnet", ("jpeg:75",))),
        ("a.ts@resize:0.9@jpeg:75", ("a.ts", ("resize:0.9", "jpeg:75"))),
        ("/home/me@work/net.ts", ("/home/me@work/net.ts", ())),
        ("/home/me@work/net.py:build@denoise", ("/home/me@work/net.py:build", ("denoise",))),
    ],
)
def test_names_with_defences(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize("flag", ["--defences", "--transfer_models"])
def test_what_is_no_defence_is_refused_in_one_line(data, tmp_path, flag):
    value = "jpg:75" if flag == "--defences" else "efficientnet_lite1@jpeg:0"
    answer = run([*MAIN, *flags(data, tmp_path / "out", flag, value)])
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"{flag}: " in answer.stderr and "is no defence; expected one of jpeg:Q (whole" in answer.stderr


def test_numbers_that_a_defence_does_not_take():
    odd = "jpeg jpeg:75.5 jpeg:inf bits:9 blur:nan median:4 resize:1 smoothing:-1 diffpure:1000 denoise:3"
    for text in odd.split():
        with pytest.raises(InputError, match=f"'{text}' is no defence"):
            make_defence(text, None)
    for text in ("denoise", "diffpure:100"):
        with pytest.raises(InputError, match=f"{text} needs a diffusion model; give one as --pretrained"):
            load_classifier(f"efficientnet_lite0@{text}")


# ---------------------------------------------------------------- tables


def test_defended_rows_stand_below_their_network_and_outside_the_mean():
    after = {"a": [2, 2], "b": [2, 1], "a@jpeg:75": [2, 1], "b@jpeg:75": [1, 1], "c@bits:4": [1, 1]}
    results = [replace(classifier_result([1, 1], [1, 1], each), name=name) for name, each in after.items()]
    evaluation = Evaluation(results, {}, [])
    assert [row[:2] for row in evaluation.tables()[0]] == [
        ["classifier", "role"],
        ["a", "surrogate"],
        ["  @jpeg:75", "defended"],
        ["b", "transfer"],
        ["  @jpeg:75", "defended"],
        ["c@bits:4", "defended"],
        ["mean", "transfer"],
    ]
    assert evaluation.transfer_figures["success"].value == 0.5  # of b alone
    assert "look stronger than they are" in "\n".join(evaluation.lines())


# ---------------------------------------------------------------- as a command


def test_nothing_is_judged_behind_the_same_defence_twice():
    surrogates = ("a", "a@jpeg:75", "a@resize:0.9@bits:4@blur:1")
    options = ModelOptions(
        model_name=surrogates, transfer_models=("b",), defences=("jpeg:75", "resize:0.9@bits:4", "bits:4")
    )
    assert options.judges == (
        *("b", "a@jpeg:75", "a@resize:0.9@bits:4", "a@bits:4"),
        *("a@jpeg:75@resize:0.9@bits:4", "a@jpeg:75@bits:4", "a@resize:0.9@bits:4@blur:1@jpeg:75"),
        *("b@jpeg:75", "b@resize:0.9@bits:4", "b@bits:4"),
    )


def test_a_run_judged_behind_defences_and_judged_again(data, quick, tmp_path):
    classifiers = ["--model_name", quick, "--transfer_models", "efficientnet_lite1"]
    options = [*classifiers, "--limit", "1"]
    defences = ["--defences", "jpeg:75,resize:0.9@bits:4,denoise,diffpure:20"]
    whole = run([*MAIN, *flags(data, tmp_path / "out", *options, *defences)])
    assert whole.returncode == 0, whole.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    judged = [row["model"] for row in results["classifiers"]]
    assert len(judged) == 2 + 2 * 4 and "efficientnet_lite1@resize:0.9@bits:4" in judged
    again = [*MAIN, "--is_test", "--images_root", tmp_path / "out", "--save_dir", tmp_path / "judged"]
    again += classifiers
    answer = run([*again, *defences])
    assert answer.returncode == 2 and "needs a diffusion model" in answer.stderr
    assert answer.stderr.count("\n") == 1 and not (tmp_path / "judged").exists()
    answer = run([*again, *defences, "--pretrained_diffusion_path", data / "model"])
    assert answer.returncode == 0, answer.stderr
    evaluation = json.loads((tmp_path / "judged/evaluation.json").read_text())
    assert evaluation["classifiers"] == results["classifiers"]


def test_an_attack_through_a_defence(data, quick, tmp_path):
    through = f"{quick}@resize:0.9@jpeg:75"
    command = [*MAIN, *flags(data, tmp_path / "out", "--model_name", through, "--draws", "2", "--limit", "2")]
    whole = run(command)
    assert whole.returncode == 0, whole.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(row["model"], row["role"]) for row in results["classifiers"]] == [(through, "surrogate")]
    assert "look stronger" not in whole.stdout
    before = pictures(tmp_path / "out")
    (tmp_path / "out/0001_record.npz").unlink()
    assert run(command).returncode == 0
    assert pictures(tmp_path / "out") == before  # the draws do not depend on what was attacked before


def test_smoothing_tells_what_it_certifies(data, quick, tmp_path):
    options = ["--transfer_models", f"{quick}@smoothing:0.25", "--limit", "1"]
    whole = run([*MAIN, *flags(data, tmp_path / "out", *options)])
    assert whole.returncode == 0 and f"{quick}@smoothing:0.25: abstains on" in whole.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    told = results["classifiers"][1]["certified"]
    assert set(told) == {"clean", "adversarial"} and told["clean"]["images"] == 1
    assert results["transfer_success"] is None and math.isfinite(results["mean_psnr"])
