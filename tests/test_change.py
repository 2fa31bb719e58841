"""What runs write of masks, margins and pictures on the way, and the preset of the original; as a user runs
them, on a small random checkpoint.
"""

import itertools
import json

import numpy as np
import pytest
from conftest import MAIN, flags, refusal, run, succeed
from PIL import Image
from test_compare import COMPARE

from diffattack.common.flags import parse_options
from diffattack.data.images import read_image
from diffattack.data.records import read_run
from diffattack.options import ATTACK_PRESETS, Options
from diffattack.runner.compare import CompareOptions, entries

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def masks(data, tmp_path_factory):
    """White on the left, of other sizes and kinds than the pictures."""
    folder = tmp_path_factory.mktemp("masks")
    for k in range(4):
        mask = np.zeros((40, 50), np.uint8)
        mask[:, :25] = 255
        Image.fromarray(mask).save(folder / f"img{k}.{'bmp' if k else 'png'}")
    return folder


@pytest.fixture(scope="module")
def command(data, masks):
    """With a mask, judged on the way, and with a margin that no image can reach."""
    given = f"--mask_root {masks} --judge_at 1,2 --stop_margin 1000 --transfer_models efficientnet_lite1"
    return lambda out, more="": [*MAIN, *flags(data, out, *given.split(), *more.split())]


@pytest.fixture(scope="module")
def masked(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("masked") / "out"
    result = succeed(command(out, "--figures pooled"))
    return out, result.stdout


def written(out, k):
    return [read_image(out / f"000{k}_{kind}.png", 96) for kind in ("originImage", "adv_image")]


def test_outside_its_mask_a_file_is_the_clean_picture_and_the_record_says_where_it_ended(masked):
    out, text = masked
    pairs = [written(out, k) for k in range(4)]
    assert all((clean[:, 60:] == adversarial[:, 60:]).all() for clean, adversarial in pairs)
    assert any((clean != adversarial).any() for clean, adversarial in pairs)
    rows = json.loads((out / "results.json").read_text())["images"]
    assert all(row["iterations"] == 3 and row["margin_reached"] is False for row in rows)
    assert "4 of 4 images never reached the margin of --stop_margin" in text
    assert "reconstructed" not in text and not list(out.glob("*_reconstruction.png"))


def test_pictures_on_the_way_are_judged_like_those_at_the_end(masked):
    out, text = masked
    results = json.loads((out / "results.json").read_text())
    assert [point["iteration"] for point in results["curve"]] == [1, 2, 3]
    names = {c["model"]: c for c in results["classifiers"]}
    last = results["curve"][-1]
    surrogate = next(iter(names))
    assert last["white-box, quick.py:build"] == names[surrogate]["success"]
    assert last["transfer, mean"]["value"] == results["transfer_success"]["value"]
    for name in ("PSNR dB", "SSIM", "L2", "where smooth (levels)"):
        assert last[name]["value"] == pytest.approx(results["quality"][name]["adversarial"]["value"])
    distances = [point["L2"]["value"] for point in results["curve"]]
    assert distances[0] < distances[-1]
    assert "after so many iterations" in text
    assert (out / "timestep_analysis/tradeoff.png").stat().st_size > 5000
    assert "with a point for each iteration that was judged" in (out / "report.html").read_text()


def test_a_curve_is_of_the_judges_that_a_run_began_with(command, masked):
    assert "curve_judges was" in refusal(command(masked[0], "--transfer_models efficientnet_lite2"))


def test_a_picture_whose_mask_has_changed_is_made_again(command, masks, masked):
    assert "made again" not in run(command(masked[0])).stderr
    mask = np.zeros((40, 50), np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(masks / "img2.bmp")
    result = run(command(masked[0]))
    assert result.stderr.count("img2.png is made again") == 1 and "img2.bmp has changed" in result.stderr
    clean, adversarial = written(masked[0], 2)
    assert (clean[60:] == adversarial[60:]).all()


def test_masks_that_cannot_be_meant(data, tmp_path):
    command = [*MAIN, *flags(data, tmp_path / "out", "--mask_root", tmp_path / "m")]
    assert "--mask_root: there is no mask" in refusal(command)
    (tmp_path / "m").mkdir()
    for k in (0, 1, 3):
        Image.new("L", (8, 8), 0 if k == 1 else 255).save(tmp_path / "m" / f"img{k}.png")
    assert "m/img2.png'; one all in white" in refusal(command)
    (tmp_path / "m/img2.png").write_bytes(b"")
    both = refusal([*command, "--is_apply_mask"])
    assert "both say where to change; give one of them" in both
    assert not (tmp_path / "out").exists()
    result = run(command)
    assert result.returncode == 1
    assert "not attacked: img1.png: the mask img1.png is white nowhere" in result.stdout
    assert "not attacked: img2.png: img2.png is not a" in result.stdout


def test_the_preset_is_all_that_the_original_does_and_flags_beside_it_win(data, tmp_path):
    options = "--preset diffattack --iterations 2 --limit 2".split()
    result = run([*MAIN, *flags(data, tmp_path / "out", *options)])
    assert result.returncode == 0, result.stderr
    configuration = json.loads((tmp_path / "out/run.json").read_text())
    for name, value in ATTACK_PRESETS["diffattack"].items():
        expected = 2 if name in ("iterations", "draws") else [] if value == () else value
        assert configuration[name] == expected, name
    assert len(list((tmp_path / "out").glob("*_reconstruction.png"))) == 2
    assert "reconstructed only" in result.stdout


def test_which_defaults_a_preset_sets():
    chosen = parse_options(Options, "", ["--preset", "diffattack", "--guidance", "4"])
    assert (chosen.guidance, chosen.iterations, chosen.budget, chosen.attack_through) == (4.0, 30, None, ())
    plain, least = (parse_options(Options, "", argv) for argv in ([], ["--stop_margin", "5"]))
    assert (plain.composition, plain.guidance, plain.budget) == ("residual", 1.0, "psnr=35")
    assert (plain.iterations, plain.attack_through) == (6, ("resize:0.9",))
    both = entries(parse_options(CompareOptions, "", ["--attacks", "diffattack,advad"]))
    each = (chosen, plain, *(entry.options for entry in both))
    ours, whole = (0.5, 1.5, 0.3), (0, 0, 1)
    changes = [(one.contrast_limit, one.high_pass, one.colour) for one in each]
    assert changes == [whole, ours, ours, whole]
    assert (least.iterations, least.attack_through) == (20, ())
    behind = parse_options(Options, "", ["--model_name", "efficientnet_lite0@jpeg:75"])
    assert behind.attack_through == ()  # it is attacked through its own defence


def test_runs_of_a_sweep_are_compared_over_their_iterations(data, tmp_path):
    extra = "--modes uniform,fixed --judge_at 1,2 --limit 2 --sweep contrast_limit=0.3,1"
    extra += " --transfer_models efficientnet_lite1"
    names = [f"{mode}, contrast_limit {value}" for value in ("0.3", "1") for mode in ("uniform", "fixed")]
    result = succeed([*COMPARE, *flags(data, tmp_path / "out", *extra.split())])
    assert f"{names[0]}, after so many iterations" in result.stdout
    assert "At equal visibility, over the iterations" in result.stdout
    told = json.loads((tmp_path / "out/sweep.json").read_text())
    assert list(told["curves"]) == names and "reconstruction" not in result.stdout
    assert all([point["iteration"] for point in curve] == [1, 2, 3] for curve in told["curves"].values())
    pairs = {tuple(pair["modes"]) for pair in told["at_equal_visibility_over_iterations"]}
    assert pairs == set(itertools.combinations(names, 2))
    for value in ("0.3", "1"):
        configuration = read_run(tmp_path / f"out/contrast_limit_{value}/uniform").configuration
        assert configuration["contrast_limit"] == float(value)
