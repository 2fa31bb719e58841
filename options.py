"""Every flag, once: its name, type, default and help; and what is checked of them before any model is
loaded.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from classifiers import DEFAULT_TRANSFER_MODELS, IMAGENET_CLASSES, REGISTRY, ClassifierError, check_name
from dataset import PRESETS, TARGET_COLUMN, Item, read_class_names, read_dataset
from timestep_weights import SCHEDULES, WEIGHT_MODES, parse_schedule, schedule_weights


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


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
        raise argparse.ArgumentTypeError(
            f"expected a label, or {TARGET_COLUMN} for the column of that name, not {text!r}"
        )
    return text if text == TARGET_COLUMN else int(text)


def fill_in_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on --dataset_name and on whether these are the demo's images."""
    preset = PRESETS[arguments.dataset_name]
    if arguments.label_base is None:
        arguments.label_base = preset.label_base
    if arguments.logit_temperature is None:
        arguments.logit_temperature = preset.logit_temperature
    if arguments.transfer_models is None:
        arguments.transfer_models = (
            [] if arguments.captions or preset.class_names else list(DEFAULT_TRANSFER_MODELS)
        )
    if arguments.label_path is None and arguments.images_root == Path("demo/images"):
        arguments.label_path = Path("demo/labels.txt")
    return arguments


def class_names_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The names of the classes."""
    needed = PRESETS[arguments.dataset_name].class_names
    if arguments.captions is None and needed:
        raise InputError(
            f"--dataset_name {arguments.dataset_name} needs --captions with the path of {needed}, which "
            f"comes with the data set"
        )
    return IMAGENET_CLASSES if arguments.captions is None else read_class_names(arguments.captions)


def read_items(arguments: argparse.Namespace, class_names: Sequence[str]) -> list[Item]:
    """The images of --images_root with their labels and, in a targeted attack, their targets."""
    return read_dataset(
        arguments.images_root, arguments.label_path, class_names, arguments.label_base, arguments.target_label
    )


SWITCH = dict(type=boolean, nargs="?", const=True, default=False, metavar="BOOL")


def make_parser(description: str) -> ArgumentParser:
    """The flags that main.py and compare.py share."""
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for add_flags in (add_data_flags, add_model_flags, add_weight_flags, add_attack_flags, add_machine_flags):
        add_flags(parser)
    return parser


def add_data_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--images_root",
        type=Path,
        default="demo/images",
        metavar="FOLDER",
        help="images to attack, taken in natural order (img2 before img10)",
    )
    group.add_argument(
        "--label_path",
        type=Path,
        default=None,
        metavar="FILE",
        help="true classes: one number a line in the order of the images (several for an image that shows "
        "several), or a CSV with columns ImageId,TrueLabel "
        "or filename,label; without it the demo's for the demo, else the folder that an image lies in",
    )
    group.add_argument(
        "--label_base", type=int, choices=(0, 1), default=None, help="what labels count from (default: 1)"
    )
    group.add_argument(
        "--captions",
        type=Path,
        default=None,
        metavar="FILE",
        help="names of the classes: one a line, CUB's classes.txt, Stanford Cars' cars_meta.mat, or a JSON "
        "with id2label (default: ImageNet's 1000)",
    )
    group.add_argument(
        "--dataset_name",
        choices=list(PRESETS),
        default="imagenet_compatible",
        help="presets of captions, label base and logit temperature",
    )
    group.add_argument(
        "--target_label",
        type=target_label,
        default=None,
        metavar="N",
        help="targeted attack: make the classifier see this class; or TargetClass, for the column of that "
        "name in a CSV",
    )
    group.add_argument(
        "--save_dir",
        type=Path,
        default="output",
        metavar="FOLDER",
        help="where results go; a run that was interrupted goes on here",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete the results of an earlier run in --save_dir first"
    )
    group.add_argument(
        "--is_test",
        **SWITCH,
        help="attack nothing: evaluate the folder --images_root of an earlier run, of this tool or of the "
        "original DiffAttack",
    )
    group.add_argument(
        "--figures",
        choices=("all", "pooled", "none"),
        default="all",
        help="draw at the end: each image's figures and those pooled over the images, with the page "
        "report.html; only the pooled ones and the page; nothing",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="load all that the command names, try it on the first image, say what to expect, and stop: for "
        "before a long run",
    )
    group.add_argument(
        "--limit", type=int, default=None, metavar="K", help="attack only the first K images (default: all)"
    )


def add_model_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_diffusion_path",
        default="demo/tiny_diffusion",
        metavar="PATH",
        help="Stable Diffusion 1.x or 2.x: a folder in diffusers format, or a hub id",
    )
    group.add_argument(
        "--model_name",
        type=classifier_names,
        default="efficientnet_lite0",
        metavar="NAMES",
        help=f"the classifier that is attacked (the surrogate), or several, separated by commas: "
        f"{', '.join(REGISTRY)}, a short name "
        "of --list_models, timm:NAME, hf:ORG/NAME, hf:FOLDER, FILE.pt2, FILE.ts or FILE.py:FUNCTION",
    )
    group.add_argument(
        "--list_models", action="store_true", help="list the short names of classifiers, and stop"
    )
    group.add_argument(
        "--transfer_models",
        type=classifier_names,
        default=None,
        metavar="NAMES",
        help='classifiers that judge whether the attack transfers, separated by commas; "" for none '
        f"(default: {','.join(DEFAULT_TRANSFER_MODELS)}; none for classes other than ImageNet's)",
    )


def add_weight_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("timestep weights")
    group.add_argument(
        "--weight_mode",
        choices=WEIGHT_MODES,
        default="uniform",
        help="uniform: the original DiffAttack; fixed: recommended; learnable: collapses; "
        "learnable_detached: never moves",
    )
    group.add_argument(
        "--weight_schedule",
        default="learned",
        metavar="SCHEDULE",
        help=f"weights of mode fixed, early to late: {', '.join(SCHEDULES)}, or numbers such as "
        f"0.1,0.1,0.2,0.2,0.4",
    )
    group.add_argument(
        "--weight_lr",
        type=float,
        default=1e-4,
        metavar="RATE",
        help="learning rate of the weight network in mode learnable",
    )


def add_attack_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("attack")
    group.add_argument(
        "--diffusion_steps", type=int, default=20, metavar="T", help="DDIM steps between noise and image"
    )
    group.add_argument(
        "--start_step", type=int, default=15, metavar="S", help="the last T - S steps are attacked"
    )
    group.add_argument(
        "--iterations", type=int, default=30, metavar="K", help="optimisation steps on the latent"
    )
    group.add_argument(
        "--res",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the square the images are resized to, a multiple of 32",
    )
    group.add_argument(
        "--guidance", type=float, default=2.5, metavar="SCALE", help="classifier-free guidance"
    )
    group.add_argument(
        "--attack_loss_weight",
        type=float,
        default=10,
        metavar="FACTOR",
        help="factor of the classifier's cross-entropy",
    )
    group.add_argument(
        "--cross_attn_loss_weight",
        type=float,
        default=10000,
        metavar="FACTOR",
        help="factor of the variance of the cross-attention",
    )
    group.add_argument(
        "--self_attn_loss_weight",
        type=float,
        default=100,
        metavar="FACTOR",
        help="factor of the change of the self-attention",
    )
    group.add_argument(
        "--logit_temperature",
        type=float,
        default=None,
        metavar="T",
        help="the attack's loss divides logits by it; above 1 where a classifier is so sure that gradients "
        "vanish (default: 1; 10 for cub_200_2011 and standford_car)",
    )
    group.add_argument(
        "--is_apply_mask", **SWITCH, help="change the image only where the true class is looked at"
    )
    group.add_argument("--is_hard_mask", **SWITCH, help="the same with a mask of zeros and ones")


def add_machine_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="precision of the diffusion model; auto: bf16 on a GPU that has it, else fp32. Losses and "
        "optimisers are fp32",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=None,
        metavar="B",
        help="images at once (default: on a GPU found from its free memory, else 1; 1 in the learnable "
        "modes)",
    )
    group.add_argument(
        "--processes",
        type=int,
        default=None,
        metavar="P",
        help="processes that share out the images (default: on a CPU one for each core that memory allows, "
        "unless OMP_NUM_THREADS is set; else 1, and 1 in mode learnable)",
    )
    group.add_argument(
        "--shard",
        default="0/1",
        metavar="K/N",
        help="attack the K-th of N equal parts of the images, K from 0, as on the K-th of N machines; the "
        "same command without it then prints the table of all",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=42,
        help="the same command with the same seed on the same machine writes identical images",
    )


def check_numbers(arguments: argparse.Namespace) -> None:
    """Ranges of the numbers, and whether the schedule fits them."""
    if not arguments.diffusion_steps <= 1000 or not 1 <= arguments.start_step < arguments.diffusion_steps:
        raise InputError(
            f"--start_step is {arguments.start_step} and --diffusion_steps {arguments.diffusion_steps}; "
            f"expected 1 <= start_step < diffusion_steps <= 1000"
        )
    if arguments.res % 32 or arguments.res < 96:
        raise InputError(f"--res is {arguments.res}; expected a multiple of 32, at least 96, such as 224")
    for flag in ("iterations", "limit", "batch_size", "processes"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected at least 1")
    if not arguments.model_name:
        raise InputError(
            "--model_name names no classifier; expected at least one, such as efficientnet_lite0"
        )
    if not (math.isfinite(arguments.logit_temperature) and arguments.logit_temperature > 0):
        raise InputError(
            f"--logit_temperature is {arguments.logit_temperature}; expected a finite number above 0"
        )
    for flag in (
        "weight_lr",
        "guidance",
        "attack_loss_weight",
        "cross_attn_loss_weight",
        "self_attn_loss_weight",
    ):
        if not (math.isfinite(getattr(arguments, flag)) and getattr(arguments, flag) >= 0):
            raise InputError(f"--{flag} is {getattr(arguments, flag)}; expected a finite number, not below 0")
    try:
        schedule_weights(
            parse_schedule(arguments.weight_schedule), arguments.diffusion_steps - arguments.start_step
        )
    except ValueError as error:
        raise InputError(f"--weight_schedule: {error}") from None


def check_shards(arguments: argparse.Namespace, processes: int, process: int) -> tuple[int, int]:
    """Which part of the images is this process's, over all machines and processes: part k of n takes the
    images k, k + n, ...
    """
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard is {arguments.shard!r}; expected K/N with K from 0 to N - 1, such as 0/8")
    shard, shards = int(match[1]), int(match[2])
    if arguments.overwrite and shards > 1:
        raise InputError(
            "--overwrite with --shard would delete what the other shards have done; empty --save_dir first"
        )
    if arguments.weight_mode == "learnable" and shards * processes * (arguments.processes or 1) > 1:
        raise InputError(
            "--weight_mode learnable trains one weight network on all images, one after the other; run it "
            "without --shard and in one process"
        )
    return shard * processes + process, shards * processes
