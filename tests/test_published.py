"""Figures of papers: that they are there and right, whose they are, and what a user's own line may hold."""

import csv
import json
import re

import pytest

from diffattack.classifiers.registry import ALIASES
from diffattack.common.errors import InputError
from diffattack.evaluation.other_sources import published, published_section, read_published

FIGURES = read_published()
STUDY = "timestep-weighting study"
CONVENTIONS = {
    "accuracy after attack over all images",
    "success over all images",
    "success over all images right before",
    "no rate",
}


def value(paper, attack, model_name, measure, judge="") -> float:
    names = ("paper", "attack", "model_name", "measure", "judge")
    wanted = [paper, attack, model_name, measure, judge]
    (found,) = (figure["value"] for figure in FIGURES if [figure[name] for name in names] == wanted)
    return found


def test_what_papers_report():
    mean, success = ("accuracy of black boxes, mean %", "mean of 10"), "attack success %"
    assert value("Chen et al.", "DiffAttack", "resnet", *mean) == 39.2
    assert value(STUDY, "DiffAttack, fixed:learned", "inception", *mean) == 66.1
    assert value("Li et al.", "AdvAD", "resnet", "seconds an image") == 2.201
    timms = "timm:resnet50.tv2_in1k"
    assert value("TransferAttack", "DiffAttack", timms, success, "DiffPure") == 34.3
    # of images in [0, 1]: L2 = sqrt(3 side^2 MSE); means over images of the two differ the more, the more the
    # images do
    for model_name in ("resnet", "convnext", "swin"):
        for attack in ("PGD", "DiffAttack", "Diff-PGD", "AdvAD"):
            l2, psnr = (value("Li et al.", attack, model_name, name) for name in ("L2", "PSNR dB"))
            assert l2 == pytest.approx((3 * 224**2 * 10 ** (-psnr / 10)) ** 0.5, rel=0.15)


def test_every_figure_says_where_it_is_from_and_what_it_is_a_share_of():
    names = ("paper", "table", "surrogate", "model_name", "attack", "measure", "judge")
    assert len({tuple(figure[name] for name in names) for figure in FIGURES}) == len(FIGURES) > 250
    for figure in FIGURES:
        assert figure["paper"] and figure["table"] and figure["convention"] in CONVENTIONS
        assert figure["images"] == 1000 and figure["side"] == 224
        assert figure["measure"].endswith("%") == (figure["convention"] != "no rate")
        assert not figure["measure"].endswith("%") or 0 <= figure["value"] <= 100
        assert not figure["arxiv"] or re.fullmatch(r"[0-9]{4}\.[0-9]{5}", figure["arxiv"])
        assert figure["model_name"] in ALIASES or figure["model_name"].startswith("timm:")
    # two of which no source was at hand
    assert {figure["paper"] for figure in FIGURES if not figure["checked"]} == {"Chen et al.", STUDY}


@pytest.mark.parametrize(
    "name, of_diffattack, of_transferattack",
    [
        ("timm:resnet50.tv_in1k", "the same", "may differ"),
        ("timm:resnet50.tv2_in1k", "may differ", "the same"),
        ("hf:timm/resnet50.a1_in1k", "may differ", "may differ"),
        ("resnet@jpeg:75", "the same", "may differ"),
    ],
)
def test_a_surrogate_is_matched_by_its_architecture_and_weights_may_differ(
    name, of_diffattack, of_transferattack
):
    found = published([name])
    weights = {one["paper"]: one["weights"] for one in found}
    assert set(weights) == {"Chen et al.", STUDY, "Li et al.", "TransferAttack"}
    assert (weights["Chen et al."], weights["TransferAttack"]) == (of_diffattack, of_transferattack)
    assert json.loads(json.dumps(found)) == found and not any(one["run_here"] for one in found)
    assert not published(["timm:resnet50d.ra2_in1k", "timm:resnet101.tv_in1k", "vit", "own.pt2"])


def test_every_printed_line_says_that_it_was_not_run_here_and_where_it_is_from():
    surrogates = ["resnet", "inception", "swin", "vit"]
    title, (heads, *rows, unknown) = published_section(published(surrogates), surrogates)
    assert "not run here" in title and unknown[:2] == ["vit", "no published figures known"]
    for row in rows:
        line = dict(zip(heads, row, strict=True))
        assert line[""] == "not run here" and line["images"] == "1000"
        assert " over all images" in line["convention"] and line["source"] and line["surrogate"] in surrogates


def test_a_line_is_added_and_a_broken_one_is_named(tmp_path):
    line = dict.fromkeys(FIGURES[0], "") | {"paper": "Doe et al.", "attack": "Own", "model_name": "vit"}
    line |= {"measure": "attack success %", "value": "12.5", "images": "unknown"}
    path = tmp_path / "own.csv"

    def write(*lines):  # with a mark, as spreadsheets write it
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(line))
            writer.writeheader()
            writer.writerows(lines)

    write(line)
    (found,) = published(["vit"], path)
    assert (found["attack"], found["value"], found["images"]) == ("Own", 12.5, None)
    for broken, message in (
        ({"value": "39,2"}, "could not convert string to float: '39,2'"),
        ({"model_name": "resnet-50"}, "unknown classifier 'resnet-50'"),
    ):
        write(line, line | broken)
        with pytest.raises(InputError, match=f"^{path}, line 3: {message}"):
            read_published(path)
