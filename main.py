"""Attacks every image of a folder in the latent space of a diffusion model, so that a classifier fails and a person sees no change.

    python main.py                                                             # the demo photographs
    python main.py --images_root demo/images --label_path demo/labels.txt --save_dir output_fixed/ --weight_mode fixed
    python main.py --pretrained_diffusion_path Manojb/stable-diffusion-2-base --images_root PHOTOS --label_path LABELS.txt
    accelerate launch --num_processes 8 main.py ...                            # the images shared out over processes, one GPU each

A finished image is never lost and never attacked twice: after an interruption the same command goes on with what is missing.
It exists to measure and improve the robustness of classifiers. `python main.py --help` lists the flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from natsort import natsorted
from PIL import Image
from tqdm import tqdm

from attentionControl import AttentionControlEdit
from classifiers import DEFAULT_TRANSFER_MODELS, IMAGENET_CLASSES, REGISTRY, load_classifier
from diff_latent_attack import LOSS_TERMS, AttackRecord, DiffAttack, Inversion, NonFiniteLossError, free_memory
from report import write_page
from evaluate import Evaluation, Pictures, Prediction, doubts_about_rounding, evaluate, predict, psnr, table
from timestep_weights import SCHEDULES, WEIGHT_MODES, effective_timesteps, parse_schedule, schedule_weights
from utils import (ANALYSIS, IMAGE_SUFFIXES, Run, draw_folders, keep_freed_memory, read_image, read_run, replacing, timestep_rows, to_pixels, to_tensor, write_image,
                   write_result)

if TYPE_CHECKING:  # diffusers takes seconds to import, and bad input is answered without it
    from diffusers import StableDiffusionPipeline

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on image processors has nothing to do with this program

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy", "torchmetrics", "pillow")
COLLAPSED_BELOW = 1.5  # effective number of timesteps
LARGEST_BATCH, MEMORY_SHARE = 16, 0.8  # of the batch that is found from what the first image took of the free memory
# Flags that do not change what an image's files hold, so that a run may go on with others.
NOT_OF_THE_RESULT = ("save_dir", "limit", "device", "batch_size", "compile", "shard", "overwrite", "transfer_models", "is_test", "figures")
RUN_FILES = ("run.json", "results.json", "log.txt", "report.html")


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


class RunError(Exception):
    """A run cannot go on; the message says why, in one line, and what is done stays done."""


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (python {self.prog} --help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def classifier_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REGISTRY:
            raise argparse.ArgumentTypeError(f"unknown classifier {name!r}; expected some of {', '.join(REGISTRY)}")
    return names


def make_parser(description: str) -> ArgumentParser:
    """The flags that main.py and compare.py share."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    switch = dict(type=boolean, nargs="?", const=True, default=False, metavar="BOOL")

    group = parser.add_argument_group("data")
    group.add_argument("--images_root", type=Path, default="demo/images", metavar="FOLDER", help="images to attack, taken in natural order (img2 before img10)")
    group.add_argument("--label_path", type=Path, default="demo/labels.txt", metavar="FILE", help="true classes, one number a line in the order of the images, counted from 1")
    group.add_argument("--save_dir", type=Path, default="output", metavar="FOLDER", help="where results go; a run that was interrupted goes on here")
    group.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run in --save_dir first")
    group.add_argument("--is_test", **switch, help="attack nothing: evaluate the folder --images_root of an earlier run, of this tool or of the original DiffAttack")
    group.add_argument("--figures", choices=("all", "pooled", "none"), default="all", help="draw at the end: each image's figures and those pooled over the images, with the page report.html; only the pooled ones and the page; nothing")
    group.add_argument("--limit", type=int, default=None, metavar="K", help="attack only the first K images (default: all)")

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_diffusion_path", default="demo/tiny_diffusion", metavar="PATH", help="Stable Diffusion 1.x or 2.x: a folder in diffusers format, or a hub id")
    group.add_argument("--model_name", choices=list(REGISTRY), default="efficientnet_lite0", help="the classifier that is attacked (the surrogate)")

    group.add_argument("--transfer_models", type=classifier_names, default=",".join(DEFAULT_TRANSFER_MODELS), metavar="NAMES", help='classifiers that judge whether the attack transfers, separated by commas; "" for none')

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
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="precision of the diffusion model; auto: bf16 on a GPU that has it, else fp32. Losses and optimisers are fp32")
    group.add_argument("--batch_size", type=int, default=None, metavar="B", help="images at once (default: on a GPU found from its free memory, else 1; 1 in the learnable modes)")
    group.add_argument("--compile", action="store_true", help="compile the networks with torch.compile, for a GPU: minutes at the start (on two CPU cores more than a quarter of an hour)")
    group.add_argument("--shard", default="0/1", metavar="K/N", help="attack the K-th of N equal parts of the images, K from 0, as on the K-th of N machines; the same command without it then prints the table of all")
    group.add_argument("--seed", type=int, default=42, help="the same command with the same seed on the same machine writes identical images")
    return parser


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
    for flag in ("iterations", "limit", "batch_size"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected at least 1")
    for flag in ("weight_lr", "guidance", "attack_loss_weight", "cross_attn_loss_weight", "self_attn_loss_weight"):
        if not (math.isfinite(getattr(arguments, flag)) and getattr(arguments, flag) >= 0):
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected a finite number, not below 0")
    try:
        schedule_weights(parse_schedule(arguments.weight_schedule), arguments.diffusion_steps - arguments.start_step)
    except ValueError as error:
        raise InputError(f"--weight_schedule: {error}") from None


def check_shards(arguments: argparse.Namespace, processes: int, process: int) -> tuple[int, int]:
    """Which part of the images is this process's, over all machines and processes: part k of n takes the images k, k + n, ..."""
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard is {arguments.shard!r}; expected K/N with K from 0 to N - 1, such as 0/8")
    shard, shards = int(match[1]), int(match[2])
    if arguments.overwrite and shards > 1:
        raise InputError("--overwrite with --shard would delete what the other shards have done; empty --save_dir first")
    if arguments.weight_mode == "learnable" and shards * processes > 1:
        raise InputError("--weight_mode learnable trains one weight network on all images, one after the other; run it without --shard and in one process")
    return shard * processes + process, shards * processes


def check_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of the diffusion model."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and half) else torch.float32


def check_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name} is not available on this machine; use --device auto or --device cpu") from None
    return device


def set_up(device: torch.device) -> None:
    """What makes the device fast: memory that is kept on a CPU, TF32 on CUDA; and, there, the same algorithms in every run."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def check_save_dir(folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--save_dir: {str(folder)!r} cannot be written, because {str(existing)!r} is {'not writable' if existing.is_dir() else 'a file'}; give another folder")


def load_pipeline(path: str, device: torch.device, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The checkpoint from a folder or the hub; safetensors only.

    On a CPU the networks are laid out channels-last: on two cores an iteration on the small model then took 1.39 s instead of 1.54.
    """
    local = Path(path).is_dir()
    if local and not (Path(path) / "model_index.json").is_file():
        raise InputError(f"--pretrained_diffusion_path: {path!r} has no model_index.json; give a Stable Diffusion folder in diffusers format")
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"--pretrained_diffusion_path: there is no folder {path!r}; give a Stable Diffusion folder in diffusers format, or a hub id such as Manojb/stable-diffusion-2-base")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    if local:  # a download wants its progress bar, reading a file does not
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, safety_checker=None,
                                                           feature_extractor=None, requires_safety_checker=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        where = "cannot be loaded" if local else "is no folder here, and the model hub did not give it"
        raise InputError(f"--pretrained_diffusion_path: {path!r} {where} ({reason}); give the path of a folder that holds the checkpoint in diffusers format with safetensors weights") from None
    if device.type == "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def compile_networks(pipeline: StableDiffusionPipeline, classifier: torch.nn.Module) -> None:
    for network in (pipeline.unet, pipeline.vae.decoder, classifier):
        network.compile()


# ---------------------------------------------------------------- the folder of a run

def configuration_of(arguments: argparse.Namespace, dtype: torch.dtype, names: list[str], labels: list[int]) -> dict:
    """All that the files of a run depend on."""
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key not in NOT_OF_THE_RESULT}
    return flags | {"dtype": str(dtype).removeprefix("torch."), "images": names, "labels": [label + 1 for label in labels]}


def check_folder(folder: Path, configuration: dict) -> None:
    """Raises InputError if the folder holds a run of another configuration."""
    path = folder / "run.json"
    if not path.exists():
        if next(folder.glob("*_record.npz"), None):
            raise InputError(f"--save_dir: {str(folder)!r} holds results but no run.json that says of what; give another folder, or --overwrite to start over")
        return
    found = json.loads(path.read_text())
    differing = [f"{key} was {shortened(found.get(key))} and is {shortened(configuration.get(key))}"
                 for key in sorted({*found, *configuration}) if found.get(key) != configuration.get(key)]
    if differing:
        raise InputError(f"--save_dir: {str(folder)!r} holds a run of another configuration: {'; '.join(differing)}; give another folder, or --overwrite to start over")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save_dir: {str(folder)!r} cannot be made ({error.strerror}); give another folder") from None


def claim_folder(folder: Path, configuration: dict) -> None:
    """Writes run.json; of several processes that start at once one wins, and the others compare."""
    mine = folder / f"run.{os.getpid()}.partial"
    mine.write_text(json.dumps(configuration, indent=2) + "\n")
    try:
        os.link(mine, folder / "run.json")
    except FileExistsError:
        check_folder(folder, configuration)
    finally:
        mine.unlink()


def clear_folder(folder: Path) -> None:
    """Deletes what a run writes, and nothing else."""
    for path in folder.iterdir():
        if path.name in RUN_FILES or re.fullmatch(r"\d{4,}_\w+\.(png|npz|txt)(\.partial)?", path.name):
            path.unlink()
    for path in (folder / ANALYSIS).glob("*"):
        if re.fullmatch(r"\w+\.(png|pdf)(\.partial)?", path.name):
            path.unlink()


def shortened(value: object) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."


def record_path(folder: Path, index: int) -> Path:
    """An image's record is written last: where it is, the image is finished."""
    return folder / f"{index:04d}_record.npz"


def failure_path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}_failed.txt"


def write_failure(folder: Path, index: int, path: Path, error: Exception) -> None:
    with replacing(failure_path(folder, index)) as temporary:
        temporary.write_text(f"{path.name}: {error}\n")


def read_failures(folder: Path, indices: Sequence[int]) -> list[str]:
    return [failure_path(folder, index).read_text().strip() for index in indices if failure_path(folder, index).exists()]


def read_rows(folder: Path, indices: Sequence[int]) -> list[dict]:
    """The rows of the results of all finished images, from their records."""
    rows = []
    for index in indices:
        if record_path(folder, index).exists():
            with np.load(record_path(folder, index)) as record:
                rows.append(json.loads(str(record["row"])))
    return rows


def read_finished(folder: Path, indices: Sequence[int]) -> Run:
    """The records of finished images, with what the figures need."""
    try:
        return read_run(folder, indices)
    except ValueError as error:
        raise RunError(str(error)) from None


# ---------------------------------------------------------------- run

def attack_images(attack: DiffAttack, batch: list[tuple[int, Path, int]], clean: list[np.ndarray], arguments: argparse.Namespace, inversion: Inversion | None = None,
                  seconds: float = 0.0) -> None:
    """Attacks the images of a batch (index, path, label), read as `clean`, at once and writes their files.

    Their inversion can be given with the seconds it took.

    Raises:
        NonFiniteLossError: a loss of the image at `index` of the batch became NaN or infinite.
        OSError: a file cannot be written.
    """
    started = time.perf_counter() - seconds
    labels = [label for _, _, label in batch]
    with tqdm(total=arguments.iterations, desc=batch[0][1].name[:24] + (f" and {len(batch) - 1} more" if len(batch) > 1 else ""), leave=False) as bar:
        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses.mean(1).tolist())})

        if inversion is None:
            inversion = attack.invert(torch.cat([to_tensor(picture) for picture in clean]), torch.tensor(labels))
        adversarial = attack.attack(inversion, progress)
    for k, (index, path, label) in enumerate(batch):
        adversarial_path = arguments.save_dir / f"{index:04d}_adv_image.png"
        write_image(to_pixels(adversarial[k]), adversarial_path)
        write_image(to_pixels(attack.reconstruction[k]), arguments.save_dir / f"{index:04d}_reconstruction.png")
        written = read_image(adversarial_path, arguments.res)
        before, after = predict(attack.classifier, np.stack([clean[k], written]), np.array([label, label]), attack.unet.device)
        with torch.no_grad():
            as_tensor = attack.classifier(adversarial[k:k + 1].float()).argmax().item()  # of interest only where the file says otherwise
        write_result(arguments.save_dir, index, clean[k], written, arguments.model_name, success=after.label != label)
        row = {"index": index, "file": path.name, "label": label + 1, "class": IMAGENET_CLASSES[label], "before": describe(before), "after": describe(after),
               "success": after.label != label if before.label == label else None, "fooled_as_tensor": as_tensor != label, "psnr": psnr(clean[k], written),
               "seconds": (time.perf_counter() - started) / len(batch)}
        write_record(attack.record.of_image(k), attack.controller.state(), row, record_path(arguments.save_dir, index))


def describe(prediction: Prediction) -> dict:
    return {**dataclasses.asdict(prediction), "label": prediction.label + 1, "class": IMAGENET_CLASSES[prediction.label]}


def write_record(record: AttackRecord, controller_state: torch.Tensor, row: dict, path: Path) -> None:
    """Saves a record with one array a field, the row of the results and the weights' state after the image; `numpy.load` reads it."""
    fields = {field.name: np.asarray(getattr(record, field.name)) for field in dataclasses.fields(record)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **fields, controller_state=controller_state.numpy(), row=np.array(json.dumps(row)))


def read_pictures(folder: Path, rows: list[dict], size: int) -> Pictures:
    """The written files of the images of the results."""
    clean, adversarial, reconstructed = (np.stack([read_image(folder / f"{row['index']:04d}_{kind}.png", size) for row in rows])
                                         for kind in ("originImage", "adv_image", "reconstruction"))
    return Pictures(clean, adversarial, np.array([row["label"] - 1 for row in rows]), reconstructed)


def summarise(rows: list[dict], evaluation: Evaluation | None, failures: list[str], weights: list[float]) -> str:
    """The aligned tables that end a run."""
    lines = table([["image", "true class", "before", "", "after", "", "success", "PSNR dB", "s"]] + [
        [row["file"], row["class"], row["before"]["class"], f"{row['before']['confidence']:.2f}", row["after"]["class"], f"{row['after']['confidence']:.2f}",
         {True: "yes", False: "no", None: "wrong before"}[row["success"]], f"{row['psnr']:.1f}", f"{row['seconds']:.0f}"] for row in rows])
    if evaluation is not None:
        lines += ["", *evaluation.lines(), "", f"mean PSNR {np.mean([row['psnr'] for row in rows]):.1f} dB, mean time {np.mean([row['seconds'] for row in rows]):.1f} s an image, "
                  f"timestep weights at the end {', '.join(f'{w:.3f}' for w in weights)}"]
    lines += [f"not attacked: {failure}" for failure in failures]
    return "\n".join(lines)


def advice_on_weights(mode: str, weights: torch.Tensor) -> str | None:
    """What a reader of the weights must know, in one line."""
    if mode == "learnable_detached":
        return "mode learnable_detached: the weight is detached in the loss, so no gradient reaches the weight network and unchanged weights are expected"
    if mode == "learnable" and effective_timesteps(weights) < COLLAPSED_BELOW:
        return (f"mode learnable: the weights have collapsed onto timestep {int(weights.argmax())}, because the loss is linear in them and is smallest "
                "with all weight on the smallest L_i; use --weight_mode fixed")
    return None


class Runner:
    """Attacks images in batches as large as memory allows, and remembers what fitted."""

    def __init__(self, attack: DiffAttack, arguments: argparse.Namespace):
        self.attack, self.arguments, self.device = attack, arguments, attack.unet.device
        self.find_batch = arguments.batch_size is None and self.device.type == "cuda" and not arguments.weight_mode.startswith("learnable")
        self.batch_size = arguments.batch_size or 1

    def run(self, work: list[tuple[int, Path, int]], bar: tqdm) -> None:
        """Attacks the images (index, path, label); of one that fails, a file says why.

        Raises:
            RunError: memory does not suffice for one image.
            OSError: a file cannot be written.
        """
        while work:
            batch, clean = self.next_batch(work, bar)
            state = self.attack.controller.state()
            try:
                if batch:
                    attack_images(self.attack, batch, clean, self.arguments)
                    bar.update(len(batch))
                    self.grow()
                continue
            except NonFiniteLossError as error:
                self.fail(batch.pop(error.index), error, bar)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.shrink(str(error))
            work[:0] = batch                                # to be attacked again, as if it had not been begun
            self.attack.controller.load_state(state)

    def next_batch(self, work: list[tuple[int, Path, int]], bar: tqdm) -> tuple[list[tuple[int, Path, int]], list[np.ndarray]]:
        """Takes the next images that can be read off the work, and reads them."""
        batch, clean = [], []
        while work and len(batch) < self.batch_size:
            item = work.pop(0)
            failure_path(self.arguments.save_dir, item[0]).unlink(missing_ok=True)  # of an earlier run
            try:
                clean.append(read_image(item[1], self.arguments.res))
                batch.append(item)
            except OSError as error:
                self.fail(item, error, bar)
        return batch, clean

    def fail(self, item: tuple[int, Path, int], error: Exception, bar: tqdm) -> None:
        write_failure(self.arguments.save_dir, item[0], item[1], error)
        bar.update()

    def shrink(self, reason: str) -> None:
        """After an out-of-memory error: half the batch, then one timestep's graph at a time, then no more."""
        clear_device_cache(garbage_collection=True)
        self.find_batch = False
        if self.batch_size > 1:
            self.batch_size //= 2
            tqdm.write(f"out of memory: going on with --batch_size {self.batch_size}", file=sys.stderr)
        elif not self.attack.checkpointing:
            self.attack.checkpointing = True
            tqdm.write("out of memory: going on with the graph of one timestep at a time, which takes more time", file=sys.stderr)
        else:
            smaller = int(self.arguments.res * 0.7) // 32 * 32
            advice = f"--res {smaller} needs half of it" if smaller >= 96 else "this model needs more memory than there is"
            raise RunError(f"out of memory with one image and the graph of one timestep at a time at --res {self.arguments.res} ({' '.join(reason.split())[:160]}); "
                           f"{advice}; the images done so far are complete")

    def grow(self) -> None:
        """After the first image: as many at once as its peak fits into the memory that is free."""
        if self.find_batch:
            self.find_batch = False
            used, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            self.batch_size = int(np.clip(MEMORY_SHARE * free_memory(self.device) // max(1, peak - used), 1, LARGEST_BATCH))


def run(arguments: argparse.Namespace) -> int:
    """Checks, attacks, evaluates and writes; returns the exit code: 0, or 1 if an image could not be attacked."""
    paths = list_images(arguments.images_root)
    labels = read_labels(arguments.label_path, len(paths), len(IMAGENET_CLASSES))
    check_numbers(arguments)
    processes, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    part, parts = check_shards(arguments, processes, process)
    device = check_device(arguments.device if processes == 1 else process_device(arguments.device))
    dtype = check_dtype(arguments.dtype, device)
    check_save_dir(arguments.save_dir)
    configuration = configuration_of(arguments, dtype, [path.name for path in paths], labels)
    if not arguments.overwrite:
        check_folder(arguments.save_dir, configuration)
    torch.manual_seed(arguments.seed)
    set_up(device)
    pipeline, classifier = load_networks(arguments, device, dtype)
    attack = make_attack(arguments, pipeline, classifier)

    make_folder(arguments.save_dir)
    if arguments.overwrite:
        if process == 0:
            clear_folder(arguments.save_dir)
        if processes > 1:
            PartialState().wait_for_everyone()
    claim_folder(arguments.save_dir, configuration)

    selected = range(len(paths))[:arguments.limit]
    mine = [(index, paths[index], labels[index]) for index in selected if index % parts == part]
    missing = [item for item in mine if not record_path(arguments.save_dir, item[0]).exists()]
    if len(missing) < len(mine):
        print(f"going on with an earlier run: {len(mine) - len(missing)} of {len(mine)} images are done", file=sys.stderr)
        restore_weights(attack, arguments.save_dir, max(set(mine) - set(missing))[0])
    with tqdm(total=len(mine), initial=len(mine) - len(missing), desc="images", unit="image", position=process) as bar:
        Runner(attack, arguments).run(missing, bar)
    if processes > 1:
        PartialState().wait_for_everyone()
        if process > 0:
            return 0
    return report(arguments, selected, classifier, attack.controller, device)


def load_networks(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[StableDiffusionPipeline, torch.nn.Module]:
    """The diffusion model and the surrogate."""
    pipeline, classifier = load_pipeline(arguments.pretrained_diffusion_path, device, dtype), load_classifier(arguments.model_name).to(device)
    if arguments.compile:
        compile_networks(pipeline, classifier)
    return pipeline, classifier


def make_attack(arguments: argparse.Namespace, pipeline: StableDiffusionPipeline, classifier: torch.nn.Module) -> DiffAttack:
    return DiffAttack(
        pipeline, classifier, weight_mode=arguments.weight_mode, weight_schedule=parse_schedule(arguments.weight_schedule),
        weight_lr=arguments.weight_lr, diffusion_steps=arguments.diffusion_steps, start_step=arguments.start_step, iterations=arguments.iterations,
        guidance=arguments.guidance, attack_loss_weight=arguments.attack_loss_weight, cross_attn_loss_weight=arguments.cross_attn_loss_weight,
        self_attn_loss_weight=arguments.self_attn_loss_weight, apply_mask=arguments.is_apply_mask, hard_mask=arguments.is_hard_mask, seed=arguments.seed)


def restore_weights(attack: DiffAttack, folder: Path, index: int) -> None:
    """Sets the learnable weights to what they were after that image."""
    with np.load(record_path(folder, index)) as record:
        attack.controller.load_state(torch.from_numpy(record["controller_state"]))


def process_device(name: str) -> str:
    """The device of one of several processes: its own GPU, unless the flag names a device without a number of its own."""
    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available(), timeout=timedelta(weeks=8))  # the first to finish waits for the last
    return str(state.device) if name in ("auto", "cuda") else name


def report(arguments: argparse.Namespace, selected: range, classifier: torch.nn.Module, controller: AttentionControlEdit, device: torch.device) -> int:
    """Evaluates what is in the folder, writes and prints the tables, and draws the figures and the page of a run that is complete; returns the exit code."""
    rows = read_rows(arguments.save_dir, selected)
    failures = read_failures(arguments.save_dir, selected)
    evaluation = finished = None
    if rows:
        finished = read_finished(arguments.save_dir, [row["index"] for row in rows])
        evaluation = evaluate(read_pictures(arguments.save_dir, rows, arguments.res), arguments.model_name, classifier, arguments.transfer_models, device)
        evaluation.doubts.extend(doubts_about_rounding([row["file"] for row in rows], [row["fooled_as_tensor"] for row in rows], [row["after"]["label"] != row["label"] for row in rows]))
    weights = controller.weights()
    left = len(selected) - len(rows) - len(failures)
    text = "\n".join(filter(None, [summarise(rows, evaluation, failures, weights.tolist()), finished and "\n".join(["", "self-attention loss by timestep, over all layers, before weights",
                                   *table(timestep_rows(finished.layer_losses, finished.records[0].timesteps.tolist()))]), left and f"still to be attacked: {left} images, by the same command or its other shards",
                                   advice_on_weights(arguments.weight_mode, weights)]))
    results = {"images": [row | of_image(evaluation, k) for k, row in enumerate(rows)], **(evaluation.as_dict() | {"tables": evaluation.tables()} if evaluation else {}), "not_attacked": failures, "weights_at_the_end": weights.tolist(),
               "mean_seconds": float(np.mean([row["seconds"] for row in rows])) if rows else None,
               "mean_psnr": float(np.mean([row["psnr"] for row in rows])) if rows else None,
               **provenance(arguments, device)}
    write_report(arguments.save_dir, "results.json", "log.txt", results, text)
    if finished and not left and arguments.figures != "none":
        draw_folders([finished], each_image=arguments.figures == "all", anew=False)
        write_page(finished)
        print(f"\nfigures in {arguments.save_dir / ANALYSIS}, and a page to look through in {arguments.save_dir / 'report.html'}")
    return 1 if failures else 0


def of_image(evaluation: Evaluation, k: int) -> dict:
    """What an evaluation says of the k-th image alone."""
    return {"predictions": {result.name: {when: describe(said[k]) for when, said in (("before", result.before), ("reconstructed", result.reconstructed), ("after", result.after))}
                            for result in evaluation.classifiers},
            "quality": {name: float(figure.by_image[k]) if math.isfinite(figure.by_image[k]) else None for name, figure in evaluation.quality.items() if figure.by_image is not None}}


def list_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Clean and adversarial files of an output folder, `*originImage*` with `*adv_image*`, in natural order."""
    if not folder.is_dir():
        raise InputError(f"--images_root: there is no folder {str(folder)!r}; give the output folder of an attack")
    clean, adversarial = (natsorted(folder.glob(f"*{kind}*.png"), key=lambda path: path.name) for kind in ("originImage", "adv_image"))
    for paths, kind, partner in ((clean, "originImage", "adv_image"), (adversarial, "adv_image", "originImage")):
        for path in paths:
            if not path.with_name(path.name.replace(kind, partner)).is_file():
                raise InputError(f"--images_root: {path.name} has no partner {path.name.replace(kind, partner)} in {str(folder)!r}")
    if not clean:
        raise InputError(f"--images_root: no *originImage*.png in {str(folder)!r}; give the output folder of an attack")
    return [(path, path.with_name(path.name.replace("originImage", "adv_image"))) for path in clean]


def test(arguments: argparse.Namespace) -> int:
    """Evaluates an output folder without any diffusion model, and writes evaluation.json and evaluation.txt; returns the exit code."""
    pairs = list_pairs(arguments.images_root)
    labels = np.array(read_labels(arguments.label_path, len(pairs), len(IMAGENET_CLASSES)))
    device = check_device(arguments.device)
    check_save_dir(arguments.save_dir)
    size = side_of(pairs[0][0])
    for path in (path for pair in pairs for path in pair):
        if side_of(path) != size:
            raise InputError(f"--images_root: {path.name} has another size than {pairs[0][0].name}; expected squares of {size} pixels")
    read = lambda paths: np.stack([read_image(path, size) for path in paths])
    reconstructions = [path.with_name(path.name.replace("originImage", "reconstruction")) for path, _ in pairs]  # which the original tool does not write
    pictures = Pictures(read(path for path, _ in pairs), read(path for _, path in pairs), labels, read(reconstructions) if all(path.is_file() for path in reconstructions) else None)
    evaluation = evaluate(pictures, arguments.model_name, load_classifier(arguments.model_name).to(device), arguments.transfer_models, device)
    surrogate = evaluation.classifiers[0]
    rows = [{"file": clean.name, "label": int(label) + 1, "class": IMAGENET_CLASSES[label], "before": describe(before), "after": describe(after)}
            for (clean, _), label, before, after in zip(pairs, labels, surrogate.before, surrogate.after)]
    text = "\n".join(evaluation.lines())
    make_folder(arguments.save_dir)
    write_report(arguments.save_dir, "evaluation.json", "evaluation.txt", {"images": rows, **evaluation.as_dict(), **provenance(arguments, device)}, text)
    return 0


def side_of(path: Path) -> int:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise InputError(f"--images_root: {path.name} is not a readable image ({error})") from None
    if width != height:
        raise InputError(f"--images_root: {path.name} is {width} x {height} pixels; expected a square")
    return width


def provenance(arguments: argparse.Namespace, device: torch.device) -> dict:
    """What a results file says of where its figures come from."""
    return {"configuration": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
            "device": str(device), "versions": {package: version(package) for package in PACKAGES}}


def write_report(folder: Path, json_name: str, text_name: str, results: dict, text: str) -> None:
    """Writes and prints what a run has to say at its end."""
    write_texts(folder, {json_name: json.dumps(results, indent=2), text_name: "python main.py " + " ".join(sys.argv[1:]) + "\n\n" + text})
    print("\n" + text)


def write_texts(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content.rstrip() + "\n")


def run_program(name: str, work: Callable[[], int]) -> int:
    """What main.py and compare.py answer with: the exit code, and one line for input or a machine that does not allow the work."""
    try:
        return work()
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every process finds the same
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"\n{name}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # images that cannot be read and folders that cannot be written are dealt with above, so this is a disk that is full or gone
        print(f"\n{name}: error: {error.filename or 'writing a result'}: {error.strerror or error}; the images done so far are complete, "
              "make room and run the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the images done so far are complete, and the same command goes on with the rest", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        arguments = make_parser(__doc__.split("\n\n")[0]).parse_args(argv)
        return test(arguments) if arguments.is_test else run(arguments)

    return run_program("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
