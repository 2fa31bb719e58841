"""The folder of a run: who may write to it, what is finished in it, its records, and how its images are
shared out, in batches and processes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from checkpoints import CheckpointError
from class_names import DatasetError
from classifiers import ClassifierError
from dataset import Item, labels_and_targets
from images import Pictures, read_image, replacing
from options import InputError, Options
from records import ANALYSIS, Run, read_run, record_path


class RunError(Exception):
    """A run cannot go on; the message says why, in one line, and what is done stays done."""


RUN_FILES = ("run.json", "results.json", "log.txt", "report.html")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "torchmetrics",
    "pillow",
)


def configuration_of(options: Options, dtype: torch.dtype, items: Sequence[Item]) -> dict:
    """All that the files of a run depend on."""
    flags = {
        declared.name: plain(getattr(options, declared.name))
        for declared in fields(Options)
        if declared.metadata["identifies_run"]
    }
    return flags | {
        "dtype": str(dtype).removeprefix("torch."),
        "images": [name_of(item, options) for item in items],
        "labels": [counted(item.labels, options.label_base) for item in items],
        "targets": [None if item.target is None else item.target + options.label_base for item in items],
    }


def plain(value: object) -> object:
    """A flag's value as JSON gives it back."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def name_of(item: Item, options: Options) -> str:
    """An image's name, with that of its class's folder if it has one."""
    return str(item.path.relative_to(options.images_root))


def counted(labels: Sequence[int], base: int) -> int | list[int]:
    """Labels as files give them: a number, or a list of several."""
    return labels[0] + base if len(labels) == 1 else [label + base for label in labels]


def check_save_dir(folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"--save_dir: {str(folder)!r} cannot be written, because {str(existing)!r} is "
            f"{'not writable' if existing.is_dir() else 'a file'}; give another folder"
        )


def check_folder(folder: Path, configuration: dict) -> None:
    """Raises InputError if the folder holds a run of another configuration."""
    path = folder / "run.json"
    if not path.exists():
        if next(folder.glob("*_record.npz"), None):
            raise InputError(
                f"--save_dir: {str(folder)!r} holds results but no run.json that says of what; give another "
                f"folder, or --overwrite to start over"
            )
        return
    found = json.loads(path.read_text())
    differing = [
        f"{key} was {shortened(found.get(key))} and is {shortened(configuration.get(key))}"
        for key in sorted({*found, *configuration})
        if found.get(key) != configuration.get(key)
    ]
    if differing:
        raise InputError(
            f"--save_dir: {str(folder)!r} holds a run of another configuration: {'; '.join(differing)}; "
            f"give another folder, or --overwrite to start over"
        )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--save_dir: {str(folder)!r} cannot be made ({error.strerror}); give another folder"
        ) from None


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


def failure_path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}_failed.txt"


def write_failure(folder: Path, index: int, path: Path, error: Exception) -> None:
    with replacing(failure_path(folder, index)) as temporary:
        temporary.write_text(f"{path.name}: {error}\n")


def read_failures(folder: Path, indices: Sequence[int]) -> list[str]:
    return [
        failure_path(folder, index).read_text().strip()
        for index in indices
        if failure_path(folder, index).exists()
    ]


def read_finished(folder: Path, indices: Sequence[int]) -> Run:
    """The records of finished images, with what the figures need."""
    try:
        return read_run(folder, indices)
    except ValueError as error:
        raise RunError(str(error)) from None


def read_pictures(folder: Path, items: Sequence[Item], size: int) -> Pictures:
    """The written files of finished images."""
    clean, adversarial, reconstructed = (
        np.stack([read_image(folder / f"{item.index:04d}_{kind}.png", size) for item in items])
        for kind in ("originImage", "adv_image", "reconstruction")
    )
    labels, targets = labels_and_targets(items)
    return Pictures(clean, adversarial, labels, reconstructed, targets)


def missing_of(items: Sequence[Item], folder: Path) -> list[Item]:
    """The images that are not finished."""
    return [item for item in items if not record_path(folder, item.index).exists()]


def provenance(options: Options, device: torch.device) -> dict:
    """What a results file says of where its figures come from."""
    return {
        "configuration": {name: plain(value) for name, value in vars(options).items()},
        "device": str(device),
        "versions": {package: version(package) for package in PACKAGES},
    }


def write_texts(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content.rstrip() + "\n")


def run_program(name: str, work: Callable[[], int]) -> int:
    """What main.py and compare.py answer with: the exit code, and one line for input or a machine that does
    not allow the work.
    """
    try:
        return work()
    except (InputError, DatasetError, ClassifierError, CheckpointError) as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every process finds the same
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"\n{name}: error: {error}", file=sys.stderr)
        return 1
    # images that cannot be read and folders that cannot be written are dealt with above, so this is a disk
    # that is full or gone
    except OSError as error:
        print(
            f"\n{name}: error: {error.filename or 'writing a result'}: {error.strerror or error}; the "
            f"images done so far are complete, "
            "make room and run the same command again to go on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            f"\n{name}: interrupted; the images done so far are complete, and the same command goes on with "
            f"the rest",
            file=sys.stderr,
        )
        return 130
