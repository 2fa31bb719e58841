"""main.py as a process: the demo commands, the same files twice, and every kind of bad input."""

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, ROOT, pictures, refusal, run, succeed
from natsort import natsorted
from PIL import Image

from diffattack.data.images import read_image
from diffattack.evaluation.metrics import psnr

QUICK = "--iterations 2 --limit 1 --res 128 --start_step 17 --draws 2"
MODES = ("uniform", "fixed", "learnable_detached", "learnable")


def start(command: str) -> subprocess.CompletedProcess:
    """main.py with these flags, between spaces, to a good end."""
    return succeed([*MAIN, "--figures", "none", *command.split()])


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
    assert ("the weights moved from" in last) == (mode == "learnable")
    moved = not np.allclose(results["weights_at_the_end"], record["weights"][0], atol=1e-3)
    assert moved == (mode == "learnable")


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


def test_the_same_command_writes_the_same_bytes_and_results_are_of_the_files_on_disk(runs):
    assert len(pictures(runs["uniform"])) == 5 and pictures(runs["uniform"]) == pictures(runs["again"])
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


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "one", "no_checkpoint", "sdxl"):
        (folder / name).mkdir()
    Image.new("RGB", (120, 100), "red").save(folder / "one" / "a.png")
    names = '{"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0"}'
    (folder / "sdxl/model_index.json").write_text(names)
    contents = {"ok.txt": "1\n", "high.txt": "1001\n", "file": "in the way", "three.txt": "one\ntwo\nthree\n"}
    contents |= {"bad.safetensors": "no weights"}
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


BAD_INPUT = {
    "--images_root {bad}/none": r"--images_root.*none.*folder",
    "--images_root {bad}/empty": r"--images_root: no image in .*empty",
    "--label_path {bad}/none.txt": r"--label_path.*none\.txt",
    "--label_path {bad}/high.txt": r"--label_path: line 1 is '1001';.*1 to 1000",
    "--weight_schedule rising": r"--weight_schedule: unknown schedule 'rising'.*learned, increasing, uniform",
    "--weight_schedule 0.5,-0.1,0.2,0.2,0.2": r"--weight_schedule.*non-negative",
    "--weight_schedule 0.5": r"--weight_schedule.*cannot be stretched to 5",
    "--start_step 20": r"--start_step is 20.*start_step < diffusion_steps",
    "--res 225": r"--res is 225.*multiple of 32",
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
    "--target_label 1001": r"--target_label is '1001'; expected an integer from 1 to 1000",
    "--target_label 1": r"target of a\.png, 1, is its own label",
    "--target_label TargetClass": r"--target_label TargetClass: a\.png has no TargetClass",
    "--logit_temperature 0": r"--logit_temperature is 0\.0; expected .* above 0",
    "--device cuda:99": r"--device cuda:99 is not available",
    "--model_name resnet": r"expected timm and torchvision installed",
    "--defences jpg:75": r"--defences: .*is no defence; expected one of jpeg:Q",
    "--transfer_models efficientnet_lite1@jpeg:0": r"--transfer_models: .*is no defence; expected",
    # the picture, and how far it goes
    "--composition decoder": r"goes with --budget none --contrast_limit 0",
    "--inversion diffattack": r"cuts bytes off, which no --budget knows; give exact",
    "--contrast_limit much": r"--contrast_limit: invalid float value: 'much'",
    "--budget 37": r"--budget: '37' is no budget",
    "--budget none": r"momentum needs a --budget",
    "--attack_through resize:2": r"--attack_through: 'resize:2' is no defence",
    "--model_name efficientnet_lite0@foo:1": r"--model_name: .foo:1. is no defence",
    "--judge_at 99": r"--judge_at goes beyond the 6 of --iterations",
    # shared out
    "--weight_mode learnable --shard 0/2": r"--weight_mode learnable trains one weight network",
    "--weight_mode learnable --processes 2": r"--weight_mode learnable .* in one process",
    "--overwrite --shard 0/2": r"--overwrite with --shard or a launcher",
    "--shard 2/2": r"--shard is '2/2'; expected K/N",
    "--batch_size 0": r"--batch_size is 0; expected at least 1",
    "--merge": r"--merge: there is no run in",
    # other attacks; what is no literal is never executed
    "--attack torchattack:PGD(eps=__import__('os').mkdir('executed'))": r"with literals",
    "--attack PGD": r"is no attack",
    "--attack torchattack:NoSuch": r"NoSuch is no attack of torchattack that can attack any classifier",
    "--attack torchattack:PGD(epsilon=0.1)": r"expected arguments like its defaults, eps=0.0313725",
    "--attack torchattack:SSA --res 96": r"is written for images of 224 pixels; give --res 224",
    "--attack torchattack:PGD --iterations 20": r"--iterations goes with --attack diffattack alone",
}
BAD_COMPARISONS = {
    "--modes fixed": r"at least two modes",
    "--modes fixed,fixed": r"none of them twice",
    "--modes uniform,fast": r"unknown mode 'fast'",
    "--overwrite": r"for main\.py",
    "--shard 0/2": r"trains one weight network on all images",
    "--sweep weight_mode=uniform,fixed": r"no flag of the attack that takes a number",
    "--sweep structure_share=0,-1": r"structure_share is -1\.0; expected a finite number, not below 0",
    "--sweep structure_share=1,1": r"at least two values, none of them twice",
    "--structure_share 1 --sweep self_attn_loss_weight=0,1": r"--structure_share replaces",
    "--attacks diffattack,torchattack:PGD --modes uniform,minimax": r"give one of them",
    "--attack torchattack:PGD": r"takes --modes or --attacks",
    "--attacks diffattack,torchattack:PGD --sweep structure_share=0,1": r"of diffattack alone",
    "--sweep budget=loud=40,30": r"is no budget",
    "--sweep seed=1,2 --page": r"leave --sweep out",
    "--judged nowhere.csv": r"--judged: ",
}
BAD = [("main", *row) for row in BAD_INPUT.items()] + [("compare", *row) for row in BAD_COMPARISONS.items()]


@pytest.mark.parametrize("program, given, message", BAD)
def test_bad_input_is_answered_in_one_line(bad, program, given, message, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = given.format(bad=bad).split()
    for flag, value in {"images_root": "one", "label_path": "ok.txt", "save_dir": "output"}.items():
        command += [] if f"--{flag}" in command else [f"--{flag}", f"{bad}/{value}"]
    assert importlib.import_module(program).main(command) == 2
    stdout, stderr = capfd.readouterr()
    assert re.fullmatch(rf"{program}\.py: error: [^\n]+\n", stderr) and re.search(message, stderr), stderr
    assert stdout == "" and not (bad / "output").exists() and not (ROOT / "executed").exists()


# ---------------------------------------------------------------- an existing folder


def test_judges_stand_in_the_place_of_the_surrogate_with_a_note(runs, tmp_path):
    judge = f"--is_test --images_root {runs['fixed']} --save_dir {tmp_path}"
    judged = start(f"{judge} --model_name efficientnet_lite1")
    assert "made on efficientnet_lite0; judges" in judged.stderr


@pytest.mark.slow
def test_a_folder_of_the_original_tool_is_evaluated(tmp_path):
    """The second image was changed until nothing is left of it; then its partner is missing."""
    out, judged = tmp_path / "out", tmp_path / "judged"
    out.mkdir()
    sources = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)[:3]
    for k, source in enumerate(sources):
        clean = read_image(source, 128)
        adversarial = np.full_like(clean, 90) if k == 1 else clean
        for kind, picture in (("originImage", clean), ("adv_image", adversarial)):
            Image.fromarray(picture).save(out / f"{k:04d}_{kind}.png")
        (out / f"{k:04d}_diff_resnet_image_Fail.png").write_bytes(b"")
    labels = (ROOT / "demo/labels.txt").read_text().split()[:3]
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    command = f"--is_test --images_root {out} --label_path {tmp_path}/labels.txt --save_dir"
    result = start(f"{command} {judged} --transfer_models efficientnet_lite2")
    found = json.loads((judged / "evaluation.json").read_text())
    surrogate, transfer = found["classifiers"]
    assert surrogate["success"]["count"] == transfer["success"]["count"] == 1
    assert surrogate["success"]["total"] == 3 and surrogate["accuracy_reconstructed"] is None
    assert "reconstructed" not in result.stdout and found["warnings"] == []
    assert found["quality"]["PSNR dB"]["by_image"][::2] == [None, None]
    assert result.stdout.strip() in (judged / "evaluation.txt").read_text()
    (out / "0001_adv_image.png").unlink()
    refused = refusal([*MAIN, *f"{command} {tmp_path}/other".split()])
    assert "0001_adv_image.png or its originImage is missing" in refused
    assert not (tmp_path / "other").exists()
