"""Defences against independent figures, and runs that are judged behind them or attack through them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MAIN, classifier_result, flags, network, pictures, refusal, succeed
from PIL import Image
from scipy import ndimage

from diffattack.classifiers.defences import (
    ATTACK_SEED,
    Defended,
    Smoothed,
    defend,
    make_defence,
    split_name,
    under_attack,
)
from diffattack.classifiers.heads import SOFTMAX, Head
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


@pytest.mark.parametrize("text", ["blur:0.8", "blur:2", "median:3", "median:5"])
def test_filters_are_scipys(text):
    size = float(text.split(":")[1])
    for plane, result in zip(PICTURES.flatten(0, 1).double().numpy(), seen(text).flatten(0, 1)):
        if text.startswith("blur"):
            expected = ndimage.gaussian_filter(plane, size, mode="mirror", truncate=4)
        else:
            expected = ndimage.median_filter(plane, int(size), mode="mirror")
        np.testing.assert_allclose(result, expected, atol=1e-5)


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


@pytest.mark.parametrize("head, of", [(SOFTMAX, lambda z: z.softmax(-1)), (Head(0.5), torch.sigmoid)])
def test_random_defences_are_the_mean_of_probabilities_whatever_the_batch(head, of):
    classifier = network(5)
    defended = defend(classifier, ["resize:0.5"], head=head)
    expected = torch.stack([of(classifier(seen("resize:0.5", seed=s))) for s in range(10)]).mean(0)
    assert torch.allclose(of(defended(PICTURES)), expected, atol=1e-6)
    assert torch.allclose(defended(PICTURES[1:2]), defended(PICTURES)[1:2], atol=1e-5)
    assert isinstance(defend(classifier, ["smoothing:0.1"], head=head), Smoothed) == (head is SOFTMAX)


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


def test_smoothing_answers_with_the_class_most_often_seen():
    network = torch.nn.Module()  # class 1 where the first pixel is above 0.5
    network.forward = lambda images: torch.stack([torch.full((len(images),), 0.5), images[:, 0, 0, 0]], 1)
    smoothed = defend(network, ["smoothing:0.25"])
    images = torch.tensor([0.2, 0.9, 0.5]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    votes = torch.stack([network(smoothed.changed(images, seed)).argmax(-1) for seed in range(100)])
    shares = smoothed(images).softmax(-1)
    assert isinstance(smoothed, Smoothed) and shares.argmax(-1)[:2].tolist() == [0, 1]
    np.testing.assert_allclose(shares[:, 1], votes.double().mean(0), atol=1e-6)


# ---------------------------------------------------------------- names


def test_names_with_defences():
    for name, *expected in (
        ("resnet@jpeg:75", "resnet", "jpeg:75"),
        ("a.ts@resize:0.9@jpeg:75", "a.ts", "resize:0.9", "jpeg:75"),
        ("/home/me@work/net.ts", "/home/me@work/net.ts"),
        ("/home/me@work/net.py:build@denoise", "/home/me@work/net.py:build", "denoise"),
    ):
        assert split_name(name) == (expected[0], tuple(expected[1:]))


def test_numbers_that_a_defence_does_not_take():
    odd = "jpeg jpeg:75.5 jpeg:inf bits:9 blur:nan median:4 resize:1 smoothing:-1 diffpure:1000 denoise:3"
    for text in odd.split():
        with pytest.raises(InputError, match=f"'{text}' is no defence"):
            make_defence(text, None)
    with pytest.raises(InputError, match="diffpure:100 needs a diffusion model; give one as --pretrained"):
        load_classifier("efficientnet_lite0@diffpure:100")


def test_defended_rows_stand_below_their_network_and_outside_the_mean():
    after = {"a": [2, 2], "b": [2, 1], "a@jpeg:75": [2, 1], "b@jpeg:75": [1, 1], "c@bits:4": [1, 1]}
    results = [replace(classifier_result([1, 1], [1, 1], each), name=name) for name, each in after.items()]
    evaluation = Evaluation(results, {}, [])
    rows = [" | ".join(row[:2]) for row in evaluation.tables()[0]]
    assert rows[1:4] == ["a | surrogate", "  @jpeg:75 | defended", "b | transfer"]
    assert rows[4:] == ["  @jpeg:75 | defended", "c@bits:4 | defended", "mean | transfer"]
    assert evaluation.transfer_figures["success"].value == 0.5  # of b alone
    assert "look stronger than they are" in "\n".join(evaluation.lines())


# ---------------------------------------------------------------- as a command


def test_nothing_is_judged_behind_the_same_defence_twice():
    surrogates = ("a", "a@jpeg:75", "a@resize:0.9@bits:4@blur:1")
    defences = ("jpeg:75", "resize:0.9@bits:4", "bits:4")
    options = ModelOptions(model_name=surrogates, transfer_models=("b",), defences=defences)
    expected = """b a@jpeg:75 a@resize:0.9@bits:4 a@bits:4 a@jpeg:75@resize:0.9@bits:4 a@jpeg:75@bits:4
        a@resize:0.9@bits:4@blur:1@jpeg:75 b@jpeg:75 b@resize:0.9@bits:4 b@bits:4"""
    assert options.judges == tuple(expected.split())


def test_a_run_through_a_defence_judged_behind_others_and_judged_again(data, quick, tmp_path):
    through, out = f"{quick}@resize:0.9@jpeg:75", tmp_path / "out"
    classifiers = ["--model_name", through, "--transfer_models", "efficientnet_lite1"]
    defences = ["--defences", "bits:4,resize:0.9@bits:4,denoise,diffpure:20"]
    command = [*MAIN, *flags(data, out, *classifiers, *defences, "--limit", "2")]
    succeed(command)
    results, before = json.loads((out / "results.json").read_text()), pictures(out)
    judged = {row["model"]: row["role"] for row in results["classifiers"]}
    assert len(judged) == 2 + 2 * 4 and judged["efficientnet_lite1@resize:0.9@bits:4"] == "defended"
    assert judged[through] == "surrogate"
    (out / "0001_record.npz").unlink()
    succeed(command)
    assert pictures(out) == before  # the draws do not depend on what was attacked before
    again = [*MAIN, "--is_test", "--images_root", out, "--save_dir", tmp_path / "judged"]
    again += [*classifiers, *defences]
    assert "needs a diffusion model" in refusal(again) and not (tmp_path / "judged").exists()
    succeed([*again, "--pretrained_diffusion_path", data / "model"])
    evaluation = json.loads((tmp_path / "judged/evaluation.json").read_text())
    assert evaluation["classifiers"] == results["classifiers"]
