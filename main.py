"""Attacks every image of a folder in the latent space of a diffusion model, so that a classifier fails and a person sees no change.

    python main.py                                                             # the demo photographs
    python main.py --images_root demo/images --label_path demo/labels.txt --save_dir output_fixed/ --weight_mode fixed
    python main.py --pretrained_diffusion_path Manojb/stable-diffusion-2-base --images_root PHOTOS --label_path LABELS.txt

It exists to measure and improve the robustness of classifiers. `python main.py --help` lists the flags.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on image processors has nothing to do with this program

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from natsort import natsorted
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from classifiers import DEFAULT_TRANSFER_MODELS, IMAGENET_CLASSES, REGISTRY, load_classifier
from diff_latent_attack import LOSS_TERMS, AttackRecord, DiffAttack, NonFiniteLossError
from evaluate import Prediction, accuracy, attack_success, predict, psnr
from timestep_weights import SCHEDULES, WEIGHT_MODES, effective_timesteps, parse_schedule, schedule_weights
from utils import IMAGE_SUFFIXES, keep_freed_memory, read_image, write_image, write_result

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
COLLAPSED_BELOW = 1.5  # effective number of timesteps


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (python main.py --help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter, allow_abbrev=False)
    switch = dict(type=boolean, nargs="?", const=True, default=False, metavar="BOOL")

    group = parser.add_argument_group("data")
    group.add_argument("--images_root", type=Path, default="demo/images", metavar="FOLDER", help="images to attack, taken in natural order (img2 before img10)")
    group.add_argument("--label_path", type=Path, default="demo/labels.txt", metavar="FILE", help="true classes, one number a line in the order of the images, counted from 1")
    group.add_argument("--save_dir", type=Path, default="output", metavar="FOLDER", help="where results go")
    group.add_argument("--limit", type=int, default=None, metavar="K", help="attack only the first K images (default: all)")

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_diffusion_path", default="demo/tiny_diffusion", metavar="PATH", help="Stable Diffusion 1.x or 2.x: a folder in diffusers format, or a hub id")
    group.add_argument("--model_name", choices=list(REGISTRY), default="efficientnet_lite0", help="the classifier that is attacked (the surrogate)")

    group = parser.add_argument_group("timestep weights")
    group.add_argument("--weight_mode", choices=WEIGHT_MODES, default="uniform", help="uniform: the original DiffAttack; fixed: recommended; learnable: collapses; learnable_detached: never moves")
    group.add_argument("--weight_schedule", default="learned", metavar="SCHEDULE", help=f"weights of mode fixed, early to late: {', '.join(SCHEDULES)}, or numbers such as 0.1,0.1,0.2,0.2,0.4")
    group.add_argument("--weight_lr", type=float, default=1e-4, metavar="RATE", help="learning rate of the weight network in mode learnable")

    group = parser.add_argument_group("attack")
    group.add_argument("--diffusion_steps", type=int, default=20, metavar="T", help="DDIM steps between noise and image")
    group.add_argument("--start_step", type=int, default=15, metavar="S", help="the last T - S steps are attacked")
    group.add_argument("--iterations", type=int, default=30, metavar="K", help="optimisation steps on the latent")
    group.add_argument("--res", type=int, default=224, metavar="PIXELS", help="side of the square the images are resized to, a multiple of 32")
    group.add_argument("--guidance", type=float, default=2.5, metavar="SCALE", help="classifier-free guidance")
    group.add_argument("--attack_loss_weight", type=float, default=10, metavar="FACTOR", help="factor of the classifier's cross-entropy")
    group.add_argument("--cross_attn_loss_weight", type=float, default=10000, metavar="FACTOR", help="factor of the variance of the cross-attention")
    group.add_argument("--self_attn_loss_weight", type=float, default=100, metavar="FACTOR", help="factor of the change of the self-attention")
    group.add_argument("--is_apply_mask", **switch, help="change the image only where the true class is looked at")
    group.add_argument("--is_hard_mask", **switch, help="the same with a mask of zeros and ones")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu")
    group.add_argument("--seed", type=int, default=42, help="the same command with the same seed on the same machine writes identical images")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- input, checked before any model is loaded

def list_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"--images_root: there is no folder {str(folder)!r}; give a folder of images")
    images = natsorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")), key=lambda path: path.name)
    if not images:
        raise InputError(f"--images_root: no image in {str(folder)!r}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return images


def read_labels(path: Path, count: int, classes: int) -> list[int]:
    """The labels of the file, counted from 0."""
    if not path.is_file():
        raise InputError(f"--label_path: there is no file {str(path)!r}; give a text file with one class number a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--label_path: {str(path)!r} is no text file; give one class number a line") from None
    labels = []
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"\s*[+-]?\d+\s*", line):
            raise InputError(f"--label_path: line {number} of {str(path)!r} is {line.strip()[:40]!r}; expected one integer from 1 to {classes}")
        if not 1 <= int(line) <= classes:
            raise InputError(f"--label_path: line {number} of {str(path)!r} is {int(line)}; labels count from 1, so expected 1 to {classes}")
        labels.append(int(line) - 1)
    if len(labels) != count:
        raise InputError(f"--label_path: {str(path)!r} has {len(labels)} labels but --images_root has {count} images; expected one label an image")
    return labels


def check_numbers(arguments: argparse.Namespace) -> None:
    """Ranges of the numbers, and whether the schedule fits them."""
    if not arguments.diffusion_steps <= 1000 or not 1 <= arguments.start_step < arguments.diffusion_steps:
        raise InputError(f"--start_step is {arguments.start_step} and --diffusion_steps {arguments.diffusion_steps}; expected 1 <= start_step < diffusion_steps <= 1000")
    if arguments.res % 32 or arguments.res < 96:
        raise InputError(f"--res is {arguments.res}; expected a multiple of 32, at least 96, such as 224")
    for flag in ("iterations", "limit"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected at least 1")
    for flag in ("weight_lr", "guidance", "attack_loss_weight", "cross_attn_loss_weight", "self_attn_loss_weight"):
        if not (math.isfinite(getattr(arguments, flag)) and getattr(arguments, flag) >= 0):
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected a finite number, not below 0")
    try:
        schedule_weights(parse_schedule(arguments.weight_schedule), arguments.diffusion_steps - arguments.start_step)
    except ValueError as error:
        raise InputError(f"--weight_schedule: {error}") from None


def check_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name} is not available on this machine; use --device auto or --device cpu") from None
    return device


def check_save_dir(folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--save_dir: {str(folder)!r} cannot be written, because {str(existing)!r} is {'not writable' if existing.is_dir() else 'a file'}; give another folder")


def load_pipeline(path: str, device: torch.device) -> StableDiffusionPipeline:
    """The checkpoint in fp32, from a folder or the hub; safetensors only."""
    local = Path(path).is_dir()
    if local and not (Path(path) / "model_index.json").is_file():
        raise InputError(f"--pretrained_diffusion_path: {path!r} has no model_index.json; give a Stable Diffusion folder in diffusers format")
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"--pretrained_diffusion_path: there is no folder {path!r}; give a Stable Diffusion folder in diffusers format, or a hub id such as Manojb/stable-diffusion-2-base")
    diffusers_logging.set_verbosity_error()
    if local:  # a download wants its progress bar, reading a file does not
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, use_safetensors=True, safety_checker=None,
                                                           feature_extractor=None, requires_safety_checker=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        where = "cannot be loaded" if local else "is no folder here, and the model hub did not give it"
        raise InputError(f"--pretrained_diffusion_path: {path!r} {where} ({reason}); give the path of a folder that holds the checkpoint in diffusers format with safetensors weights") from None
    return pipeline.to(device)


# ---------------------------------------------------------------- run

def attack_image(attack: DiffAttack, path: Path, index: int, label: int, arguments: argparse.Namespace) -> dict:
    """Attacks one image and writes its files; returns its row of the results.

    Raises:
        OSError: the image cannot be read.
        NonFiniteLossError: a loss became NaN or infinite.
    """
    started = time.perf_counter()
    folder, stem = arguments.save_dir, f"{index:04d}"
    clean = read_image(path, arguments.res)
    with tqdm(total=arguments.iterations, desc=path.name[:24], leave=False) as bar:
        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses[:, 0].tolist())})

        adversarial = attack(to_tensor(clean), torch.tensor([label]), progress)[0]
    write_image(to_pixels(adversarial), folder / f"{stem}_adv_image.png")
    written = read_image(folder / f"{stem}_adv_image.png", arguments.res)
    device = attack.unet.device
    before, after = predict(attack.classifier, np.stack([clean, written]), np.array([label, label]), device)
    write_result(folder, index, clean, written, arguments.model_name, success=after.label != label)
    write_record(attack.record, folder / f"{stem}_record.npz")
    return {"index": index, "file": path.name, "label": label + 1, "class": IMAGENET_CLASSES[label], "before": describe(before), "after": describe(after),
            "success": after.label != label if before.label == label else None, "psnr": psnr(clean, written), "seconds": time.perf_counter() - started}


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """8-bit `(H, W, 3)` to `(1, 3, H, W)` in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """`(3, H, W)` in [0, 1] to 8-bit `(H, W, 3)`."""
    return (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def describe(prediction: Prediction) -> dict:
    return {**dataclasses.asdict(prediction), "label": prediction.label + 1, "class": IMAGENET_CLASSES[prediction.label]}


def write_record(record: AttackRecord, path: Path) -> None:
    """Saves a record with one array a field; `numpy.load` reads it."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **{field.name: np.asarray(getattr(record, field.name)) for field in dataclasses.fields(record)})
    os.replace(temporary, path)


def evaluate_classifier(name: str, classifier: torch.nn.Module, rows: list[dict], arguments: argparse.Namespace, device: torch.device) -> dict:
    """Accuracy before and after, and success among those right before, from the written files."""
    labels = np.array([row["label"] - 1 for row in rows])
    before, after = (predict(classifier, np.stack([read_image(arguments.save_dir / f"{row['index']:04d}_{kind}.png", arguments.res) for row in rows]), labels, device)
                     for kind in ("originImage", "adv_image"))
    fooled, correct = attack_success(before, after, labels)
    return {"model": name, "accuracy_before": accuracy(before, labels), "accuracy_after": accuracy(after, labels), "fooled": fooled, "correct_before": correct, "images": len(rows)}


def summarise(rows: list[dict], classifiers: list[dict], failures: list[str], weights: list[float]) -> str:
    """The aligned table that ends a run."""
    lines = table([["image", "true class", "before", "", "after", "", "success", "PSNR dB", "s"]] + [
        [row["file"], row["class"], row["before"]["class"], f"{row['before']['confidence']:.2f}", row["after"]["class"], f"{row['after']['confidence']:.2f}",
         {True: "yes", False: "no", None: "wrong before"}[row["success"]], f"{row['psnr']:.1f}", f"{row['seconds']:.0f}"] for row in rows])
    lines += ["", *table([["classifier", "role", "accuracy before", "accuracy after", "fooled of those right before"]] + [
        [c["model"], "surrogate" if i == 0 else "transfer", f"{c['accuracy_before']:.1%}", f"{c['accuracy_after']:.1%}",
         f"{c['fooled']}/{c['correct_before']}" + (f" = {c['fooled'] / c['correct_before']:.1%}" if c["correct_before"] else "")] for i, c in enumerate(classifiers)])]
    if rows:
        lines += ["", f"mean PSNR {np.mean([row['psnr'] for row in rows]):.1f} dB, mean time {np.mean([row['seconds'] for row in rows]):.1f} s an image, "
                      f"timestep weights at the end {', '.join(f'{w:.3f}' for w in weights)}"]
    lines += [f"not attacked: {failure}" for failure in failures]
    return "\n".join(lines)


def table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def advice_on_weights(mode: str, weights: torch.Tensor) -> str | None:
    """What a reader of the weights must know, in one line."""
    if mode == "learnable_detached":
        return "mode learnable_detached: the weight is detached in the loss, so no gradient reaches the weight network and unchanged weights are expected"
    if mode == "learnable" and effective_timesteps(weights) < COLLAPSED_BELOW:
        return (f"mode learnable: the weights have collapsed onto timestep {int(weights.argmax())}, because the loss is linear in them and is smallest "
                "with all weight on the smallest L_i; use --weight_mode fixed")
    return None


def run(arguments: argparse.Namespace) -> int:
    """Checks, attacks, evaluates and writes; returns the exit code: 0, or 1 if an image could not be attacked."""
    paths = list_images(arguments.images_root)
    labels = read_labels(arguments.label_path, len(paths), len(IMAGENET_CLASSES))
    check_numbers(arguments)
    device = check_device(arguments.device)
    check_save_dir(arguments.save_dir)
    torch.manual_seed(arguments.seed)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    pipeline = load_pipeline(arguments.pretrained_diffusion_path, device)
    classifier = load_classifier(arguments.model_name).to(device)
    attack = DiffAttack(
        pipeline, classifier, weight_mode=arguments.weight_mode, weight_schedule=parse_schedule(arguments.weight_schedule),
        weight_lr=arguments.weight_lr, diffusion_steps=arguments.diffusion_steps, start_step=arguments.start_step, iterations=arguments.iterations,
        guidance=arguments.guidance, attack_loss_weight=arguments.attack_loss_weight, cross_attn_loss_weight=arguments.cross_attn_loss_weight,
        self_attn_loss_weight=arguments.self_attn_loss_weight, apply_mask=arguments.is_apply_mask, hard_mask=arguments.is_hard_mask, seed=arguments.seed)
    try:
        arguments.save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save_dir: {str(arguments.save_dir)!r} cannot be made ({error.strerror}); give another folder") from None

    rows, failures = [], []
    for index, (path, label) in enumerate(tqdm(list(zip(paths, labels))[:arguments.limit], desc="images", unit="image")):
        try:
            rows.append(attack_image(attack, path, index, label, arguments))
        except (OSError, NonFiniteLossError) as error:
            failures.append(f"{path.name}: {error}")

    classifiers = []
    if rows:
        classifiers.append(evaluate_classifier(arguments.model_name, classifier, rows, arguments, device))
        for name in DEFAULT_TRANSFER_MODELS:
            if name != arguments.model_name:
                classifiers.append(evaluate_classifier(name, load_classifier(name).to(device), rows, arguments, device))
    weights = attack.controller.weights()
    text = "\n".join(filter(None, [summarise(rows, classifiers, failures, weights.tolist()), advice_on_weights(arguments.weight_mode, weights)]))
    results = {"images": rows, "classifiers": classifiers, "not_attacked": failures, "weights_at_the_end": weights.tolist(),
               "mean_seconds": float(np.mean([row["seconds"] for row in rows])) if rows else None,
               "mean_psnr": float(np.mean([row["psnr"] for row in rows])) if rows else None,
               "configuration": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
               "device": str(device), "versions": {package: version(package) for package in PACKAGES}}
    (arguments.save_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.save_dir / "log.txt").write_text("python main.py " + " ".join(sys.argv[1:]) + "\n\n" + text + "\n")
    print("\n" + text)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except InputError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
