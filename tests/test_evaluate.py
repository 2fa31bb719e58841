"""Figures against values worked out another way, and each warning on a case made for it."""

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, classifier_result

from diffattack.data.images import Pictures
from diffattack.evaluation import statistics
from diffattack.evaluation.judges import Judges, judge
from diffattack.evaluation.metrics import psnr, visibility
from diffattack.evaluation.results import Evaluation, evaluation_of, transfer_mean
from diffattack.evaluation.statistics import mean_over_images, means_over_images, share
from diffattack.evaluation.warnings import has_gradient, warnings_about_gradients, warnings_about_outputs

CPU = torch.device("cpu")


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    "count, total, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 12, 0, 0.2425)]
)
def test_wilson_against_published_examples(count, total, low, high):
    """Newcombe (1998), Statistics in Medicine 17, table I; of none in 12 z^2 / (12 + z^2)."""
    assert (share(count, total).low, share(count, total).high) == pytest.approx((low, high), abs=5e-5)
    assert str(share(10, 11)) == "10/11 = 91% [62%, 98%]" and str(share(0, 0)) == "0/0"


@pytest.mark.parametrize("block", [2**20, 500])
def test_intervals_of_means_are_those_of_a_slow_bootstrap(monkeypatch, block):
    monkeypatch.setattr(statistics, "BLOCK", block)
    values = np.random.default_rng(3).normal(3, 2, (2, 57))
    chosen = np.random.default_rng(statistics.SEED).integers(0, 57, (statistics.RESAMPLES, 57))
    for row, estimate in zip(values, means_over_images(dict(enumerate(values))).values()):
        expected = np.percentile(row[chosen].mean(1), [2.5, 97.5])
        assert estimate.value == pytest.approx(row.mean(), rel=1e-12)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), rel=1e-12)
        assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * row.std() / np.sqrt(57), rel=0.1)


def test_what_is_not_finite_is_in_no_mean_and_one_image_or_none_has_no_interval():
    values = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([1.0, np.inf, 3.0])}
    assert means_over_images(values) == {name: mean_over_images(each) for name, each in values.items()}
    assert mean_over_images(values["b"]) == mean_over_images(np.array([1.0, 3.0]))
    for few in ([7.0, np.nan], []):
        found = mean_over_images(np.array(few))
        assert np.isnan([found.low, found.high]).all() and np.isnan(found.value) != bool(few)


# ---------------------------------------------------------------- success


def test_rates_on_a_table_made_by_hand():
    """Six images of class 3: wrong before; fooled; already fooled by the reconstruction; not fooled; wrong
    before, right after; fooled.
    """
    r = classifier_result(
        [3] * 6, before=[7, 3, 3, 3, 8, 3], reconstructed=[7, 3, 5, 3, 3, 3], after=[7, 5, 5, 3, 3, 9]
    )
    figures = r.figures[None]
    assert [figures[f"accuracy_{side}"].count for side in ("before", "reconstructed", "after")] == [4, 4, 2]
    assert (r.success.count, r.success.total) == (3, 4)
    alone, of_all = figures["success_of_attack_alone"], figures["success_of_all"]
    assert (alone.count, alone.total) == (2, 3)
    assert (of_all.count, of_all.total) == (4, 6)  # all but those that are right after


def test_all_three_rates_and_their_means_are_in_the_json():
    """Two transfer classifiers of four images of class 3, one wrong before and after."""
    first = classifier_result([3] * 4, before=[7, 3, 3, 3], after=[7, 5, 3, 3])
    second = classifier_result([3] * 4, before=[3, 3, 3, 3], after=[5, 5, 5, 3])
    found = Evaluation([first, first, second], {}, []).as_dict()
    rates = [found["classifiers"][1][name].value for name in ("success", "success_of_all")]
    assert rates == pytest.approx([1 / 3, 2 / 4])
    means = ("transfer_success", "transfer_success_of_all", "transfer_accuracy_after")
    assert [found[name].value for name in means] == pytest.approx([(1 / 3 + 3 / 4) / 2, 5 / 8, 3 / 8])


def test_several_labels_and_targets():
    """Images of classes 3 and 4, of 5 alone twice, the last two with the targets 7 and 8."""
    several = [[3, 4], [5, -1], [5, -1]]
    r = classifier_result(several, before=[4, 5, 5], after=[3, 6, 7])
    assert r.counts[None]["success"][0].all() and r.counts[None]["success"][1].tolist() == [False, True, True]
    sides = {"before": [4, 5, 5], "after": [9, 6, 8], "reconstructed": [4, 7, 5]}
    r = classifier_result(several, **sides, targets=[-1, 7, 8])
    assert r.counts[None]["success"][1].tolist() == [True, False, True]
    assert r.counts[None]["success_of_reconstruction"][1].tolist() == [False, True, False]
    # the third is given its target though it was wrong before, the last was given its target before
    r = classifier_result([3] * 4, before=[3, 3, 7, 9], after=[9, 5, 9, 9], targets=[9] * 4)
    assert (r.success.count, r.success.total) == (1, 2) and r.rate("success_of_all").count == 3


def test_all_surrogates_at_once():
    first, second = (
        classifier_result([0] * 5, [0, 0, 0, 0, 1], [1, 1, 0, 1, 1]),
        classifier_result([0] * 5, [0, 0, 0, 2, 0], [1, 0, 1, 1, 1]),
    )
    evaluation = Evaluation([first, second, first], {}, [], surrogates=2)
    joint = evaluation.joint_success  # right before by both: the first three; fooled by both: the first
    assert (joint.count, joint.total) == (1, 3)
    rows = evaluation.tables()[0]
    roles = ["surrogate", "surrogate", "transfer", "surrogate", "transfer"]
    assert [row[1] for row in rows[1:]] == roles and rows[4][0] == "all at once" and rows[4][4][:3] == "1/3"


def test_transfer_mean_is_of_rates_and_resamples_images_for_all_classifiers_at_once():
    first = classifier_result([0] * 40, [0] * 40, [1] * 10 + [0] * 30)
    second = classifier_result([0] * 40, [0] * 20 + [1] * 20, [1] * 10 + [0] * 30)
    mean = transfer_mean([first, second])
    assert mean.value == pytest.approx((10 / 40 + 10 / 20) / 2)
    same, one = transfer_mean([first, first]), share(10, 40)  # no narrower than one: the images are the same
    assert same.value == 0.25 and same.high - same.low == pytest.approx(one.high - one.low, rel=0.15)


def test_visibility_against_closed_forms():
    clean = np.full((32, 32, 3), 100, np.uint8)
    same, found = visibility(clean, clean), visibility(clean, clean + 5)
    assert (same["PSNR dB"], same["L1 (levels)"], same["Linf (levels)"], same["L2"]) == (np.inf, 0, 0, 0)
    assert found["PSNR dB"] == psnr(clean, clean + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert found["L1 (levels)"] == pytest.approx(5, abs=1e-5)
    assert found["Linf (levels)"] == pytest.approx(5, abs=1e-5)
    assert found["L2"] == pytest.approx(5 / 255 * np.sqrt(32 * 32 * 3))
    # on constant pictures only the luminance term of SSIM is left; float32 leaves 2e-4
    c1, a, b = 0.01**2, 100 / 255, 105 / 255
    assert same["SSIM"] == pytest.approx(1, abs=5e-4)
    assert found["SSIM"] == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=5e-4)


# ---------------------------------------------------------------- warnings


class Steps(torch.nn.Module):
    """Rounds its input, so that it has no gradient."""

    def forward(self, x):
        return (x * 8).round().flatten(1)[:, :5]


PIXELS = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)


def about_gradients(classifier) -> list[str]:
    gradients = [has_gradient(classifier, picture, np.zeros(1, int), CPU) for picture in PIXELS]
    return warnings_about_gradients("m", gradients)


def test_gradients_of_exactly_zero_are_noticed_and_nothing_is_where_nothing_is_wrong():
    """The other warnings are those of whole runs (test_trust, test_heads, test_classifiers_of_the_field)."""
    (line,) = about_gradients(Steps())
    assert "exactly zero at image 1, 2, 3" in line and "\n" not in line
    classifier = TinyClassifier().eval()
    assert not about_gradients(classifier) and not warnings_about_outputs("m", classifier, PIXELS, CPU)


def test_the_surrogate_is_never_a_transfer_classifier():
    loaded = {"s": TinyClassifier().eval(), "t": TinyClassifier().eval()}
    names = [str(k) for k in range(5)]
    judges = Judges(("s",), ("s", "t"), names, CPU, "efficientnet_lite2", loaded.__getitem__)
    pictures = Pictures(PIXELS, PIXELS, np.zeros(3, int))
    found = evaluation_of(judge(judges, pictures), judges, pictures.labels, np.full(3, -1))
    assert [c.name for c in found.classifiers] == ["s", "t"] == [judges.names[0], found.transfers[0].name]
    assert any("s is a surrogate" in warning for warning in found.warnings)
    assert found.classifiers[0].rate("success_of_attack_alone") is None
