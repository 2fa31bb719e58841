"""Figures of papers: that they are there and right, whose they are, and what a user's own line may hold."""

import csv
import json
import re

import pytest

from diffattack.classifiers.registry import ALIASES
from diffattack.common.errors import InputError
from diffattack.evaluation.other_sources import (
    PUBLISHED,
    PUBLISHED_REMARK,
    published,
    published_section,
    read_published,
)
from diffattack.evaluation.tables import as_text, markdown

FIGURES = read_published()
MEAN, SUCCESS = ("accuracy of black boxes, mean %", "mean of 10"), ("attack success %", "white-box")
JUDGES = "VGG16 MobileNetV2 InceptionV3 ViT PiT Visformer Swin AT HGD RS NRP DiffPure".split()


def value(paper, attack, model_name, column) -> float:
    (found,) = (
        figure["value"]
        for figure in FIGURES
        if [figure[name] for name in ("paper", "attack", "model_name", "measure", "judge")]
        == [paper, attack, model_name, *column]
    )
    return found


CONVENTIONS = {
    "accuracy after attack over all images",
    "success over all images",
    "success over all images right before",
    "no rate",
}


# ---------------------------------------------------------------- the figures


@pytest.mark.parametrize(
    "model_name, accuracy, fid",
    [
        ("resnet", 39.2, 62.6),
        ("vgg", 38.2, 63.9),
        ("mobile", 40.5, 62.9),
        ("inception", 65.4, 62.3),
        ("convnext", 22.2, 73.3),
        ("swin", 38.8, 65.5),
    ],
)
def test_diffattack(model_name, accuracy, fid):
    assert value("Chen et al.", "DiffAttack", model_name, MEAN) == accuracy
    assert value("Chen et al.", "DiffAttack", model_name, ("FID", "")) == fid


@pytest.mark.parametrize(
    "attack, success, others",
    [
        ("PGD", 98.6, {"L2": 8.17, "PSNR dB": 33.53, "SSIM": 0.883}),
        ("ACA", 89.8, {"seconds an image": 82.239}),
        (
            "DiffAttack",
            96.6,
            {
                "seconds an image": 34.954,
                "L2": 30.51,
                "PSNR dB": 22.63,
                "SSIM": 0.675,
                "FID": 55.29,
                "LPIPS": 0.113,
            },
        ),
        ("Diff-PGD", 92.1, {"seconds an image": 6.057, "PSNR dB": 30.95}),
        ("AdvAD", 99.7, {"seconds an image": 2.201, "L2": 1.06}),
    ],
)
def test_advad(attack, success, others):
    assert value("Li et al.", attack, "resnet", SUCCESS) == success
    for measure, expected in others.items():
        assert value("Li et al.", attack, "resnet", (measure, "")) == expected


def test_transferattack():
    expected = [51.3, 51.3, 47.1, 30.7, 44.3, 44.5, 47.1, 45.7, 39.0, 39.7, 59.2, 34.3]
    found = [
        value("TransferAttack", "DiffAttack", "timm:resnet50.tv2_in1k", (SUCCESS[0], judge))
        for judge in JUDGES
    ]
    assert found == expected


@pytest.mark.parametrize(
    "attack, model_name, accuracy",
    [
        ("DiffAttack, uniform", "inception", 65.4),
        ("DiffAttack, learnable_detached", "inception", 66.6),
        ("DiffAttack, fixed:learned", "inception", 66.1),
        ("DiffAttack, uniform", "resnet", 38.6),
    ],
)
def test_the_fork(attack, model_name, accuracy):
    assert value("timestep-weighting study", attack, model_name, MEAN) == accuracy


def test_the_forks_means_are_those_of_its_ten_black_boxes():
    logs = {
        (figure["attack"], figure["model_name"]): []
        for figure in FIGURES
        if figure["paper"] == "timestep-weighting study" and figure["checked"]
    }
    assert len(logs) == 3
    for figure in FIGURES:
        if figure["measure"] == "accuracy after attack %" and figure["judge"] != "white-box":
            logs[figure["attack"], figure["model_name"]].append(figure["value"])
    for (attack, model_name), values in logs.items():
        mean = value("timestep-weighting study", attack, model_name, MEAN)
        assert len(values) == 10 and abs(sum(values) / 10 - mean) < 0.0501


def test_l2_and_psnr_are_of_the_same_pictures():
    # of images in [0, 1]: L2 = sqrt(3 side^2 MSE); means over images of the two differ the more, the more the
    # images do
    for model_name in ("resnet", "convnext", "swin"):
        for attack in ("PGD", "DiffAttack", "Diff-PGD", "AdvAD"):
            l2 = value("Li et al.", attack, model_name, ("L2", ""))
            psnr = value("Li et al.", attack, model_name, ("PSNR dB", ""))
            assert l2 == pytest.approx((3 * 224**2 * 10 ** (-psnr / 10)) ** 0.5, rel=0.15)


def test_every_figure_says_where_it_is_from_and_what_it_is_a_share_of():
    assert len(FIGURES) > 250
    names = ("paper", "table", "surrogate", "model_name", "attack", "measure", "judge")
    keys = {tuple(figure[name] for name in names) for figure in FIGURES}
    assert len(keys) == len(FIGURES)  # none is there twice
    for figure in FIGURES:
        assert figure["paper"] and figure["table"] and figure["convention"] in CONVENTIONS
        assert figure["images"] == 1000 and figure["side"] == 224
        assert figure["measure"].endswith("%") == (figure["convention"] != "no rate")
        assert not figure["measure"].endswith("%") or 0 <= figure["value"] <= 100
        assert not figure["arxiv"] or re.fullmatch(r"[0-9]{4}\.[0-9]{5}", figure["arxiv"])
        assert figure["model_name"] in ALIASES or figure["model_name"].startswith("timm:")
    # two of which no source was at hand
    assert {figure["paper"] for figure in FIGURES if not figure["checked"]} == {
        "Chen et al.",
        "timestep-weighting study",
    }


# ---------------------------------------------------------------- whose they are


def papers(*surrogates) -> set[str]:
    return {one["paper"] for one in published(surrogates)}


@pytest.mark.parametrize(
    "name", ["resnet", "timm:resnet50.tv_in1k", "timm:resnet50", "hf:timm/resnet50.a1_in1k", "resnet@jpeg:75"]
)
def test_a_surrogate_is_matched_by_its_architecture(name):
    assert papers(name) == {"Chen et al.", "timestep-weighting study", "Li et al.", "TransferAttack"}


@pytest.mark.parametrize(
    "name, of_diffattack, of_transferattack",
    [
        ("resnet", "the same", "may differ"),
        ("timm:resnet50.tv_in1k", "the same", "may differ"),
        ("timm:resnet50.tv2_in1k", "may differ", "the same"),
        ("timm:resnet50", "may differ", "may differ"),
        ("resnet@jpeg:75", "the same", "may differ"),
    ],
)
def test_whether_the_weights_are_the_papers(name, of_diffattack, of_transferattack):
    weights = {one["paper"]: one["weights"] for one in published([name])}
    assert (weights["Chen et al."], weights["TransferAttack"]) == (of_diffattack, of_transferattack)


def test_timms_weights_may_differ_from_the_papers():
    assert {one["weights"] for one in published(["swin", "convnext", "mobile"])} == {"may differ"}
    assert {one["weights"] for one in published(["vgg", "inception"])} == {"the same"}


def test_another_architecture_is_not_matched():
    assert not published(["timm:resnet50d.ra2_in1k", "timm:resnet101.tv_in1k", "vit", "own.pt2"])


def test_an_unknown_surrogate_is_one_line():
    surrogates = ["efficientnet_lite0", "resnet", "vit"]
    _, rows = published_section(published(surrogates), surrogates)
    assert [row[:2] for row in rows[-2:]] == [
        [name, "no published figures known"] for name in ("efficientnet_lite0", "vit")
    ]
    with pytest.raises(InputError, match="unknown classifier 'resnet1'"):
        published(["resnet1"])


# ---------------------------------------------------------------- what is printed


def test_every_printed_line_says_that_it_was_not_run_here_and_where_it_is_from():
    surrogates = ["resnet", "inception", "swin"]
    title, rows = published_section(published(surrogates), surrogates)
    assert "not run here" in title and {len(row) for row in rows} == {len(rows[0])}
    for row in rows[1:]:
        line = dict(zip(rows[0], row))
        assert line[""] == "not run here" and line["images"] == "1000"
        assert " over all images" in line["convention"] and line["source"] and line["surrogate"] in surrogates
    text = as_text([(title, rows)], [PUBLISHED_REMARK])
    assert "34.954" in text and "0.675" in text
    assert (
        "| DiffAttack | not run here | attack success % white-box 92.3; attack success % VGG16 51.3; attack "
        "success % MobileNetV2 51.3; "
    ) in markdown("Figures", [(title, rows)], [])


def test_the_same_for_json():
    found = published(["resnet"])
    assert json.loads(json.dumps(found)) == found
    first = found[0]
    assert (first["value"], first["images"], first["year"], first["run_here"]) == (39.2, 1000, 2024, False)
    assert {one["year"] for one in found} == {2024, None}


# ---------------------------------------------------------------- a user's own line

LINE = {
    "paper": "Doe et al.",
    "venue": "",
    "year": "2025",
    "arxiv": "",
    "table": "Table 2",
    "attack": "Own",
    "surrogate": "ViT-B/16",
    "model_name": "vit",
    "measure": "attack success %",
    "judge": "white-box",
    "value": "12.5",
    "images": "unknown",
    "side": "unknown",
    "convention": "unknown",
    "checked": "yes",
    "notes": "",
}


def write(path, *lines, columns=tuple(LINE)):
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with a mark, as spreadsheets write it
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([line[name] for name in columns] for line in lines)
    return path


def test_a_line_is_added(tmp_path):
    (found,) = published(["vit"], write(tmp_path / "own.csv", LINE))
    assert (found["attack"], found["value"], found["images"]) == ("Own", 12.5, None)


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"value": "39,2"}, "could not convert string to float: '39,2'"),
        ({"model_name": "resnet-50"}, "unknown classifier 'resnet-50'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, broken, message):
    path = write(tmp_path / "own.csv", {**LINE, "attack": "first"}, {**LINE, **broken})
    with pytest.raises(InputError) as raised:
        read_published(path)
    assert str(raised.value).startswith(f"{path}, line 3: {message}") and "\n" not in str(raised.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "own.csv"
    with pytest.raises(InputError, match="own.csv, line 1: .*No such file"):
        read_published(path)
    columns = [name for name in LINE if name != "value"]
    with pytest.raises(
        InputError, match="line 2: 'value'; expected a number as value, and the other columns"
    ):
        read_published(write(path, LINE, columns=columns))
    write(path, LINE).open("a").write("Doe et al., 2025\n")
    with pytest.raises(InputError, match="line 3: "):
        read_published(path)


def test_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PUBLISHED.is_absolute() and read_published() == FIGURES
