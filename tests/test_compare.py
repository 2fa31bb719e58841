"""Paired statistics against values worked out another way, and comparisons as a process."""

import csv
import json
import signal
import sys

import numpy as np
import pytest
from conftest import classifier_result, done, flags, pictures, start, succeed, wait_for
from PIL import Image
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker
from scipy.stats import kstest

from diffattack.evaluation import statistics
from diffattack.evaluation.comparison import sentence, transfer_shares
from diffattack.evaluation.results import Evaluation, transfer_mean
from diffattack.evaluation.tables import latex


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    return statistics.paired(first.astype(float), second.astype(float), yes_or_no=True).p


COMPARE = [sys.executable, "compare.py"]


def test_mcnemar_against_its_closed_form():
    first = np.array([True] * 1 + [False] * 8 + [True] * 5)
    second = np.array([False] * 1 + [True] * 8 + [True] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 9) / 2**9)  # 1 against 8: twice the binomial tail
    assert mcnemar(first, first) == 1


def test_permutation_p_values_are_uniform_where_there_is_nothing_to_find():
    p_values = [
        statistics.paired_permutation(np.random.default_rng(seed).normal(size=12)) for seed in range(300)
    ]
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) < 0.09


def test_permutation_finds_a_planted_effect_and_is_exact():
    assert statistics.paired_permutation(np.random.default_rng(0).normal(1.5, 1, 12)) < 0.01
    # all of one sign: only 2 of the 64 signings are as extreme
    differences = np.array([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    assert statistics.paired_permutation(differences) == pytest.approx(2 / 64)
    assert statistics.paired_permutation(np.zeros(8)) == 1


def test_holm_against_a_worked_example():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("images, tests", [(11, 1), (22, 27), (1000, 30)])
def test_the_smallest_difference_is_where_mcnemar_begins_to_find_it(images, tests):
    flips = round(statistics.smallest_success_difference(images, tests) * images)
    p, p_of_one_less = (
        mcnemar(np.zeros(images, bool), np.arange(images) < count) for count in (flips, flips - 1)
    )
    assert tests * p <= 0.05 < tests * p_of_one_less
    assert statistics.smallest_success_difference(6, 27) is None  # six images are too few after correction


def test_transfer_shares_average_to_the_transfer_mean():
    surrogate = classifier_result([0] * 6, [0] * 6, [1] * 6)
    others = [
        classifier_result([0] * 6, [0, 0, 0, 0, 2, 2], [1, 0, 1, 0, 0, 1]),
        classifier_result([0] * 6, [0] * 6, [1, 1, 0, 0, 0, 0]),
    ]
    evaluation = Evaluation([surrogate, *others], {}, [])
    assert (
        transfer_shares(evaluation.transfers).mean()
        == pytest.approx(transfer_mean(others).value)
        == pytest.approx((2 / 4 + 2 / 6) / 2)
    )


def test_the_sentence_says_what_was_found():
    found = statistics.Difference(statistics.Estimate(0.5, 0.4, 0.6), 0.001, 0.004)
    figure = {"name": "SSIM", "differences": {"uniform": None, "fixed": found}}
    text = sentence("uniform", "fixed", [figure], 20)
    assert "differs from uniform in SSIM (+0.5, p = 0.004)" in text


def test_latex_is_well_formed():
    rows = [["", "uniform", "fixed"], ["white-box, efficientnet_lite0", "10/11 = 91% [62%, 98%]", "11/11"]]
    text = latex(rows, "50 % & more")
    nodes, _, _ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    (environment,) = [node for node in nodes if isinstance(node, LatexEnvironmentNode)]
    (tabular,) = [node for node in environment.nodelist if isinstance(node, LatexEnvironmentNode)]
    assert tabular.environmentname == "tabular"
    assert [line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")] == [2, 2]
    assert r"efficientnet\_lite0" in text and r"91\%" in text


def test_a_killed_comparison_goes_on_and_writes_what_single_runs_write(data, quick, whole, tmp_path):
    given = "--modes fixed,learnable --weight_lr 0.1 --transfer_models efficientnet_lite1"
    command = [*COMPARE, *flags(data, tmp_path, *given.split())]
    process = start(command)
    wait_for(lambda: (tmp_path / "learnable").is_dir() and len(done(tmp_path / "learnable")) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "comparison.md").exists()
    # records are written again when their image is judged, pictures never
    pictures_of = [p.with_name(p.name[:4] + "_adv_image.png") for p in tmp_path.glob("*/*_record.npz")]
    finished = {path: path.stat().st_mtime_ns for path in pictures_of}
    completed = succeed(command)
    assert finished and all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    for mode in ("fixed", "learnable"):
        assert pictures(tmp_path / mode) == pictures(whole(mode))  # byte for byte what main.py writes
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["modes"] == ["fixed", "learnable"] and len(results["images"]) == 4
    alone = json.loads((whole("learnable") / "results.json").read_text())["weights_at_the_end"]
    assert results["weights"]["learnable"]["end"] == alone
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert len(rows) == 4 * 2 and {row["mode"] for row in rows} == {"fixed", "learnable"}
    told = "learnable: no difference to fixed that these 4 images could show; so few images cannot show any"
    assert told in completed.stdout
    texts = [completed.stdout, *((tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "tex"))]
    for text in texts:
        assert "white-box, quick" in text and "transfer, efficientnet" in text and "HaarPSI (0 to 1)" in text
    LatexWalker(texts[-1], tolerant_parsing=False).get_latex_nodes()


def test_images_are_compared_at_once(data, whole, tmp_path):
    given = "--modes uniform,fixed --batch_size 4 --figures none"
    completed = succeed([*COMPARE, *flags(data, tmp_path, *given.split())])
    assert "and 3 more" in completed.stderr
    for k in range(4):  # as by themselves, but for rounding
        both = [Image.open(out / f"{k:04d}_adv_image.png") for out in (tmp_path / "fixed", whole("fixed"))]
        assert np.abs(np.subtract(*(np.asarray(picture, float) for picture in both))).mean() < 0.1
