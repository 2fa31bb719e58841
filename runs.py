"""The folder of a run: who may write to it, what is finished in it, its records, and how its images are
shared out, in batches and processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from classifiers import ClassifierError, file_name
from dataset import DatasetError, Item, labels_and_targets
from diff_latent_attack import LOSS_TERMS, DiffAttack, NonFiniteLossError, free_memory
from diff_latent_attack import fooled as logits_fooled
from evaluate import Prediction, fooled, predict, right
from images import Pictures, read_image, replacing, to_pixels, to_tensor, write_image, write_result
from inversion import Inversion
from models import load_networks, make_attack, set_up
from options import InputError
from quality import psnr
from records import Run, read_run, record_path, write_record
from utils import ANALYSIS
from workers import processes_for, run_in_processes


class RunError(Exception):
    """A run cannot go on; the message says why, in one line, and what is done stays done."""


# Flags that do not change what an image's files hold, so that a run may go on with others.
NOT_OF_THE_RESULT = (
    "save_dir",
    "limit",
    "device",
    "batch_size",
    "processes",
    "shard",
    "overwrite",
    "transfer_models",
    "is_test",
    "figures",
    "list_models",
    "check",
)
RUN_FILES = ("run.json", "results.json", "log.txt", "report.html")
LARGEST_BATCH, MEMORY_SHARE = (
    16,
    0.8,
)  # of the batch that is found from what the first image took of the free memory
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


def configuration_of(arguments: argparse.Namespace, dtype: torch.dtype, items: Sequence[Item]) -> dict:
    """All that the files of a run depend on."""
    flags = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in NOT_OF_THE_RESULT
    }
    return flags | {
        "dtype": str(dtype).removeprefix("torch."),
        "images": [name_of(item, arguments) for item in items],
        "labels": [counted(item.labels, arguments.label_base) for item in items],
        "targets": [None if item.target is None else item.target + arguments.label_base for item in items],
    }


def name_of(item: Item, arguments: argparse.Namespace) -> str:
    """An image's name, with that of its class's folder if it has one."""
    return str(item.path.relative_to(arguments.images_root))


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


def describe(prediction: Prediction, captions: Sequence[str], base: int) -> dict:
    return {
        **dataclasses.asdict(prediction),
        "label": prediction.label + base,
        "class": captions[prediction.label],
    }


def attack_images(
    attack: DiffAttack,
    batch: list[Item],
    clean: list[np.ndarray],
    arguments: argparse.Namespace,
    inversion: Inversion | None = None,
    seconds: float = 0.0,
) -> None:
    """Attacks the images of a batch, read as `clean`, at once and writes their files.

    Their inversion can be given with the seconds it took.

    Raises:
        NonFiniteLossError: a loss of the image at `index` of the batch became NaN or infinite.
        OSError: a file cannot be written.
    """
    started = time.perf_counter() - seconds
    labels, targets = labels_and_targets(batch)
    with tqdm(
        total=arguments.iterations,
        desc=batch[0].path.name[:24] + (f" and {len(batch) - 1} more" if len(batch) > 1 else ""),
        leave=False,
        disable=arguments.processes > 1,
    ) as bar:  # of several processes the one that started them shows how many images are done

        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses.mean(1).tolist())})

        if inversion is None:
            inversion = attack.invert(
                torch.cat([to_tensor(picture) for picture in clean]),
                torch.tensor(labels),
                torch.tensor(targets),
            )
        adversarial = attack.attack(inversion, progress)
    device, captions, base = attack.unet.device, attack.class_names, arguments.label_base
    for k, item in enumerate(batch):
        index, own = item.index, labels[[k]]
        adversarial_path = arguments.save_dir / f"{index:04d}_adv_image.png"
        write_image(to_pixels(adversarial[k]), adversarial_path)
        write_image(
            to_pixels(attack.reconstruction[k]), arguments.save_dir / f"{index:04d}_reconstruction.png"
        )
        written = read_image(adversarial_path, arguments.res)
        said = [
            predict(classifier, np.stack([clean[k], written]), own.repeat(2, 0), device)
            for classifier in attack.classifiers
        ]
        right_before = all(right([before], own).all() for before, _ in said)
        success = all(fooled([after], own, targets[[k]]).all() for _, after in said)
        with torch.no_grad():
            as_tensor = torch.stack(
                [classifier(adversarial[k : k + 1].float()) for classifier in attack.classifiers]
            )  # of interest only where the file says otherwise
        fooled_as_tensor = bool(
            logits_fooled(
                as_tensor, torch.tensor(own, device=device), torch.tensor(targets[[k]], device=device)
            ).all()
        )
        write_result(
            arguments.save_dir,
            index,
            clean[k],
            written,
            "+".join(map(file_name, arguments.model_name)),
            success,
        )
        before, after = said[0]
        row = {
            "index": index,
            "file": name_of(item, arguments),
            "label": counted(item.labels, base),
            "class": ", ".join(captions[label] for label in item.labels),
            **(
                {}
                if item.target is None
                else {"target": item.target + base, "target_class": captions[item.target]}
            ),
            "before": describe(before, captions, base),
            "after": describe(after, captions, base),
            "success": success if right_before else None,
            "fooled": success,
            "fooled_as_tensor": fooled_as_tensor,
            "psnr": psnr(clean[k], written),
            "seconds": (time.perf_counter() - started) / len(batch) / arguments.processes,
        }
        write_record(
            attack.record.of_image(k), attack.controller.state(), row, record_path(arguments.save_dir, index)
        )


def restore_weights(attack: DiffAttack, folder: Path, index: int) -> None:
    """Sets the learnable weights to what they were after that image."""
    with np.load(record_path(folder, index)) as record:
        attack.controller.load_state(torch.from_numpy(record["controller_state"]))


class Runner:
    """Attacks images in batches as large as memory allows, and remembers what fitted."""

    def __init__(self, attack: DiffAttack, arguments: argparse.Namespace):
        self.attack, self.arguments, self.device = attack, arguments, attack.unet.device
        self.find_batch = (
            arguments.batch_size is None
            and self.device.type == "cuda"
            and not arguments.weight_mode.startswith("learnable")
        )
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
            work[:0] = batch  # to be attacked again, as if it had not been begun
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
            tqdm.write(
                "out of memory: going on with the graph of one timestep at a time, which takes more time",
                file=sys.stderr,
            )
        else:
            smaller = int(self.arguments.res * 0.7) // 32 * 32
            advice = (
                f"--res {smaller} needs half of it"
                if smaller >= 96
                else "this model needs more memory than there is"
            )
            raise RunError(
                f"out of memory with one image and the graph of one timestep at a time at --res "
                f"{self.arguments.res} ({' '.join(reason.split())[:160]}); "
                f"{advice}; the images done so far are complete"
            )

    def grow(self) -> None:
        """After the first image: as many at once as its peak fits into the memory that is free."""
        if self.find_batch:
            self.find_batch = False
            used, peak = (
                torch.cuda.memory_allocated(self.device),
                torch.cuda.max_memory_allocated(self.device),
            )
            self.batch_size = int(
                np.clip(MEMORY_SHARE * free_memory(self.device) // max(1, peak - used), 1, LARGEST_BATCH)
            )


def count_processes(arguments: argparse.Namespace, attack: DiffAttack, images: int, launched: int) -> int:
    """How many processes of this machine share out the images. It does not depend on how many are done, so
    that a run that goes on computes as before.
    """
    if arguments.processes is not None:
        return min(arguments.processes, images)
    if (
        launched > 1
        or attack.unet.device.type != "cpu"
        or arguments.weight_mode == "learnable"
        or (arguments.batch_size or 1) > 1
    ):
        return 1
    weights = sum(
        parameter.nbytes
        for network in (attack.unet, attack.vae, *attack.classifiers)
        for parameter in network.parameters()
    )
    # Measured on the small model: 1.1 GB. A larger one keeps some three times its weights in activations for
    # the backward pass.
    return processes_for(images, int((1.2e9 + 4 * weights) * (arguments.res / 224) ** 2))


def share_out(
    arguments: argparse.Namespace,
    items: list[Item],
    device: torch.device,
    dtype: torch.dtype,
    captions: Sequence[str],
    bar: tqdm,
) -> None:
    """Attacks the images in `--processes` processes; what one of them leaves undone, because it was killed,
    is left to the caller.
    """

    def failed(item: Item) -> bool:
        return failure_path(arguments.save_dir, item.index).exists()

    def progress() -> None:
        left = [item for item in missing_of(items, arguments.save_dir) if not failed(item)]
        bar.update(len(items) - len(left) - bar.n)

    parts = [items[k :: arguments.processes] for k in range(arguments.processes)]
    for item in missing_of(items, arguments.save_dir):
        # of an earlier run, which would count as done
        failure_path(arguments.save_dir, item.index).unlink(missing_ok=True)
    killed = run_in_processes(
        attack_part, [(arguments, part, device, dtype, captions) for part in parts], progress
    )
    if killed:
        tqdm.write(
            f"{len(killed)} of {arguments.processes} processes were killed "
            f"({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; "
            "going on with their images in this one",
            file=sys.stderr,
        )


def attack_part(
    arguments: argparse.Namespace,
    items: list[Item],
    device: torch.device,
    dtype: torch.dtype,
    captions: Sequence[str],
) -> None:
    """What one of several processes does: attacks those of its images that are not finished."""
    missing = missing_of(items, arguments.save_dir)
    if missing:
        torch.manual_seed(arguments.seed)
        set_up(device)
        attack = make_attack(arguments, *load_networks(arguments, device, dtype, captions), captions)
        Runner(attack, arguments).run(missing, tqdm(disable=True))


def provenance(arguments: argparse.Namespace, device: torch.device) -> dict:
    """What a results file says of where its figures come from."""
    return {
        "configuration": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
        },
        "device": str(device),
        "versions": {package: version(package) for package in PACKAGES},
    }


def write_texts(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content.rstrip() + "\n")


def write_report(folder: Path, json_name: str, text_name: str, results: dict, text: str) -> None:
    """Writes and prints what a run has to say at its end."""
    write_texts(
        folder,
        {
            json_name: json.dumps(results, indent=2),
            text_name: "python main.py " + " ".join(sys.argv[1:]) + "\n\n" + text,
        },
    )
    print("\n" + text)


def run_program(name: str, work: Callable[[], int]) -> int:
    """What main.py and compare.py answer with: the exit code, and one line for input or a machine that does
    not allow the work.
    """
    try:
        return work()
    except (InputError, DatasetError, ClassifierError) as error:
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
