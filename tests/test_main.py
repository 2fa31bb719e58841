"""main.py as a process: the demo commands, the same files twice, and every kind of bad input."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAIN, ROOT, run
from natsort import natsorted
from PIL import Image

import main
from diffattack.data.images import read_image
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr

QUICK = "--iterations 2 --limit 1 --res 128 --start_step 17 --draws 2"
MODES = ("uniform", "fixed", "learnable_detached", "learnable")


def start(command: str) -> subprocess.CompletedProcess:
    """main.py with these flags, between spaces."""
    return run([*MAIN, "--figures", "none", *command.split()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each weight mode on one demo image, and `uniform` a second time."""
    folders = {}
    for name in (*MODES, "again"):
        folders[name] = tmp_path_factory.mktemp(name)
        mode = "uniform" if name == "again" else name
        result = start(
            f"--images_root demo/images --label_path demo/labels.txt --save_dir {folders[name]}/ "
            f"--weight_mode {mode} {QUICK} {'--weight_lr 0.3' * (mode == 'learnable')}"
        )
        assert result.returncode == 0, result.stderr
        (folders[name] / "stdout").write_text(result.stdout)
    return folders


@pytest.mark.parametrize("mode", MODES)
def test_a_run_writes_its_files_and_its_table(runs, mode):
    folder = runs[mode]
    names = sorted(path.name for path in folder.glob("0*"))
    outcome = re.search("(ATKSuccess|Fail)", " ".join(names))[1]
    pictures = ["adv_image", "diff_absolute", f"diff_efficientnet_lite0_image_{outcome}", "diff_relative"]
    files = [*(f"{name}.png" for name in pictures), "judged.npz", "originImage.png", "record.npz"]
    assert names == [f"0000_{name}" for name in files]
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # strict
    table, log = (folder / "stdout").read_text(), (folder / "log.txt").read_text()
    assert results["configuration"]["weight_mode"] == mode
    assert results["versions"]["torch"].startswith("2.13.0")
    assert [one["model"] for one in results["classifiers"]] == [f"efficientnet_lite{k}" for k in range(3)]
    assert table.strip() in log
    (row,) = results["images"]
    assert row["file"] in table and row["class"] in table and row["before"]["label"] == row["label"]
    record = np.load(folder / "0000_record.npz")
    assert record["layer_losses"].shape == (2, 3, 8, 1)
    last = "\n".join(table.splitlines()[-6:])
    assert ("unchanged weights are expected" in last) == (mode == "learnable_detached")
    moved = re.search(r"mode learnable: in \d+ steps? the weights moved from (.+) to (.+), by", last)
    assert bool(moved) == (mode == "learnable")
    if moved:
        ends = [[float(weight) for weight in numbers.split(", ")] for numbers in moved.groups()]
        assert ends[0] == pytest.approx(record["weights"][0], abs=1e-3)
        assert ends[1] == pytest.approx(results["weights_at_the_end"], abs=1e-3) and ends[0] != ends[1]


def test_the_table_of_images_has_what_the_json_has(runs):
    (row,) = json.loads((runs["fixed"] / "results.json").read_text())["images"]
    with open(runs["fixed"] / "images.csv", newline="") as file:
        (image,) = csv.DictReader(file)
    assert image["file"] == row["file"] and int(image["label"]) == row["label"]
    for name, sides in row["predictions"].items():
        assert int(image[f"predicted {name}"]) == sides["after"]["label"]
        right, fooled = (sides[side]["label"] == row["label"] for side in ("before", "after"))
        assert image[f"fooled {name}"] == (str(int(not fooled)) if right else "")
    assert float(image["PSNR dB"]) == row["quality"]["PSNR dB"] and float(image["seconds"]) == row["seconds"]


def test_the_same_command_writes_the_same_bytes(runs):
    images = sorted(path.name for path in runs["uniform"].glob("*.png"))
    assert len(images) == 5
    for name in images:
        assert (runs["uniform"] / name).read_bytes() == (runs["again"] / name).read_bytes(), name


def test_results_are_of_the_files_on_disk(runs):
    (row,) = json.loads((runs["fixed"] / "results.json").read_text())["images"]
    pair = (read_image(runs["fixed"] / f"0000_{kind}.png", 128) for kind in ("originImage", "adv_image"))
    assert row["psnr"] == pytest.approx(psnr(*pair))


@pytest.mark.parametrize("command", ["main.py", "compare.py", "utils.py", "benchmark.py"])
def test_a_command_starts_by_itself(command):
    """Others of these tests are forked from a process that has imported the libraries."""
    result = run([sys.executable, command, "--help"], anew=True)
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {command}") and result.stderr == ""


def test_help_groups_the_flags_and_says_each_default():
    text, common = (" ".join(run([*MAIN, *how]).stdout.split()) for how in (("--help", "all"), ("--help",)))
    assert "--budget" in common and "--seed" not in common and "--help all" in common
    for part in ("data:", "timestep weights:", "machine:", "(default: 10000)", "(default: learned)"):
        assert part in text


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "one", "no_checkpoint", "sdxl"):
        (folder / name).mkdir()
    Image.new("RGB", (120, 100), "red").save(folder / "one" / "a.png")
    names = '{"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0"}'
    (folder / "sdxl/model_index.json").write_text(names)
    for name, content in {
        "ok.txt": "1\n",
        "high.txt": "1001\n",
        "file": "in the way",
        "bad.safetensors": "no weights",
        "three.txt": "one\ntwo\nthree\n",
    }.items():
        (folder / name).write_text(content)
    return folder


BAD_INPUT = {
    "--images_root {bad}/none": r"--images_root.*none.*folder",
    "--images_root {bad}/empty": r"--images_root: no image in .*empty",
    "--label_path {bad}/none.txt": r"--label_path.*none\.txt",
    "--label_path {bad}/high.txt": r"--label_path: line 1 is '1001';.*1 to 1000",
    "--weight_schedule rising": r"--weight_schedule: unknown schedule 'rising'.*learned, increasing, uniform",
    "--weight_schedule 0.5,-0.1,0.2,0.2,0.2": r"--weight_schedule.*non-negative",
    "--weight_schedule 0,0,0,0,0": r"--weight_schedule.*all be zero",
    "--weight_schedule 0.5": r"--weight_schedule.*cannot be stretched to 5",
    "--start_step 20": r"--start_step is 20.*start_step < diffusion_steps",
    "--res 225": r"--res is 225.*multiple of 32",
    "--pretrained_diffusion_path ./no/such/model": r"--pretrained_diffusion_path.*no/such/model",
    "--check --pretrained_diffusion_path {bad}/no_checkpoint": r"no_checkpoint.*model_index\.json",
    "--pretrained_diffusion_path Manojb/stable-diffusion-2-base": r"hub.*give a folder in diffusers format",
    "--pretrained_diffusion_path {bad}/sdxl": r"StableDiffusionXLPipeline.*Stable Diffusion 1",
    "--pretrained_diffusion_path {bad}/bad.safetensors": r"bad\.safetensors' cannot be loaded",
    "--save_dir {bad}/file/out": r"--save_dir.*cannot be written.*file",
    "--is_apply_mask perhaps": r"--is_apply_mask: invalid boolean value: .perhaps",
    "--iteration 5": r"unrecognized arguments: --iteration",
    "--model_name resnet1": r"--model_name: unknown classifier 'resnet1'; expected .*docs/",
    "--captions {bad}/three.txt": r"'efficientnet_lite0' has 1000 outputs, but there are 3 classes",
    "--dataset_name cub_200_2011": r"--dataset_name cub_200_2011 needs --captions .*classes\.txt",
    "--target_label cat": r"--target_label: expected a label, or TargetClass",
    "--target_label TargetClass": r"--target_label TargetClass: a\.png has no TargetClass",
    "--logit_temperature 0": r"--logit_temperature is 0\.0; expected .* above 0",
    "--device cuda:99": r"--device cuda:99 is not available",
}


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_answered_in_one_line(bad, given, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = given.format(bad=bad).split()
    for flag, value in {"images_root": "one", "label_path": "ok.txt", "save_dir": "output"}.items():
        command += [] if f"--{flag}" in command else [f"--{flag}", f"{bad}/{value}"]
    assert main.main(command) == 2
    stdout, stderr = capfd.readouterr()
    assert re.fullmatch(r"main\.py: error: [^\n]+\n", stderr), stderr
    assert re.search(BAD_INPUT[given], stderr), stderr
    assert stdout == "" and not (bad / "output").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_only_its_image(tmp_path):
    result = start(
        f"--save_dir {tmp_path} --limit 2 --iterations 2 --res 96 --start_step 18 "
        "--cross_attn_loss_weight 1e300"
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    line = r"not attacked: \w+\.jpg: the total loss is not finite in iteration 1\n"
    assert len(re.findall(line, result.stdout)) == 2 and not list(tmp_path.glob("*.png"))
    assert json.loads((tmp_path / "results.json").read_text())["images"] == []


@pytest.mark.slow
def test_unreadable_images_are_listed_and_the_others_run(tmp_path):
    source = sorted((ROOT / "demo/images").iterdir())[0]
    (tmp_path / "in").mkdir()
    shutil.copy(source, tmp_path / "in" / f"img2{source.suffix}")
    (tmp_path / "in" / "img10.png").write_text("not an image")
    Image.fromarray(read_image(source, 128)).save(tmp_path / "whole.png")
    (tmp_path / "in" / "img11.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    (tmp_path / "labels.txt").write_text("3\n4\n5\n")
    result = start(
        f"--images_root {tmp_path}/in --label_path {tmp_path}/labels.txt --save_dir {tmp_path}/out "
        "--iterations 1 --res 96 --is_hard_mask --weight_mode learnable"
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert all(f"not attacked: img{k}.png" in result.stdout for k in (10, 11))
    assert {path.name[:4] for path in (tmp_path / "out").glob("*.png")} == {"0000"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["file"] for row in results["images"]] == [f"img2{source.suffix}"]
    assert len(results["not_attacked"]) == 2 and results["configuration"]["is_hard_mask"] is True


# ---------------------------------------------------------------- an existing folder


def test_a_run_knows_its_own_labels(runs, tmp_path):
    command = (
        f"--is_test --images_root {runs['fixed']} --save_dir {tmp_path} --transfer_models efficientnet_lite1"
    )
    result = start(command)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["images"]
    (expected,) = json.loads((runs["fixed"] / "results.json").read_text())["images"]
    assert (row["label"], row["class"]) == (expected["label"], expected["class"])
    assert row["after"]["label"] == expected["after"]["label"]
    other = f"--is_test --images_root {runs['fixed']} --model_name efficientnet_lite1"
    assert "made on efficientnet_lite0; judges" in start(f"{other} --save_dir {tmp_path}/other").stderr


@pytest.fixture
def original(tmp_path):
    """A folder as the original tool leaves it: the second image was changed until nothing is left of it."""
    (tmp_path / "out").mkdir()
    sources = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)[:3]
    labels = (ROOT / "demo/labels.txt").read_text().split()[:3]
    for k, source in enumerate(sources):
        clean = read_image(source, 128)
        adversarial = np.full_like(clean, 90) if k == 1 else clean
        for kind, picture in (("originImage", clean), ("adv_image", adversarial)):
            Image.fromarray(picture).save(tmp_path / "out" / f"{k:04d}_{kind}.png")
        (tmp_path / "out" / f"{k:04d}_diff_resnet_image_Fail.png").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    return tmp_path


JUDGE = "--is_test --images_root {0}/out --label_path {0}/labels.txt --save_dir {0}/judged"


def test_a_folder_of_the_original_tool_is_evaluated(original):
    result = start(f"{JUDGE.format(original)} --transfer_models efficientnet_lite2")
    assert result.returncode == 0, result.stderr
    found = json.loads((original / "judged" / "evaluation.json").read_text())
    surrogate, transfer = found["classifiers"]
    assert surrogate["success"]["count"] == transfer["success"]["count"] == 1
    assert surrogate["success"]["total"] == 3 and surrogate["accuracy_reconstructed"] is None
    assert "reconstructed" not in result.stdout and found["warnings"] == []
    assert found["quality"]["PSNR dB"]["by_image"][::2] == [None, None]
    assert result.stdout.strip() in (original / "judged" / "evaluation.txt").read_text()


def test_a_missing_partner_is_named(original):
    (original / "out" / "0001_adv_image.png").unlink()
    result = start(JUDGE.format(original))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "0001_adv_image.png or its originImage is missing" in result.stderr
    assert not (original / "judged").exists()


def test_a_folder_of_fp16_weights_alone_is_loaded(data, tmp_path):
    whole = load_pipeline(str(data / "model"), torch.device("cpu"))
    whole.save_pretrained(tmp_path / "half", variant="fp16")
    assert all(".fp16." in path.name for path in (tmp_path / "half").rglob("*.safetensors"))
    half = load_pipeline(str(tmp_path / "half"), torch.device("cpu"))
    assert torch.equal(half.unet.conv_in.weight, whole.unet.conv_in.weight)
    assert half.unet.dtype == torch.float32
