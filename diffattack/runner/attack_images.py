"""Attacks what is missing of images, each with every job: one inversion serves all jobs that it suits. Images
are shared out over processes, or attacked in batches as large as memory allows, and judged once they are
written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import GivenImages, PixelAttack
from diffattack.classifiers.registry import joined_names
from diffattack.common.counting import Cost, bytes_of, measured
from diffattack.common.device import free_memory
from diffattack.common.errors import AttackError, InputError, NonFiniteLossError, RunError
from diffattack.common.launched import launched
from diffattack.common.parallel import run_in_processes, tell_parent
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image, to_pixels, to_tensor, write_image, write_result
from diffattack.data.layout import Layout
from diffattack.data.masks import read_mask
from diffattack.data.records import write_record
from diffattack.diffusion.batch import AttackResult
from diffattack.diffusion.inversion import Inversion
from diffattack.evaluation.curves import curve_of_image
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.predictions import ClassifierResult, fooled, predict
from diffattack.losses import LOSS_TERMS
from diffattack.options import Options
from diffattack.runner.folder import (
    check_still_ours,
    counted,
    file_digest,
    missing_of,
    name_of,
    unattempted,
    write_failure,
)
from diffattack.runner.jobs import Job, jobs_of, loaded_networks
from diffattack.runner.judge import judge_images
from diffattack.runner.setup import Experiment, load_attacks

# of the batch that is found from what the first image took of the free memory
LARGEST_BATCH, MEMORY_SHARE = 16, 0.8
INVERSION_FLAGS = ("attack", "diffusion_steps", "start_step", "guidance", "inversion")  # what one depends on


@dataclass(frozen=True)
class Picture:
    """An image that has been read."""

    item: Item
    pixels: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray | None  # (H, W) in [0, 1]


# ---------------------------------------------------------------- over processes


def attack_images(experiment: Experiment, jobs: Sequence[Job], items: Sequence[Item]) -> int:
    """Attacks and judges what is missing of the images with each job: in several processes those that may be,
    and the others, as those of mode learnable and what a process left undone that was killed, in this one.

    Returns:
        how many there were.
    Raises:
        RunError: memory does not suffice for one image, or a folder has become another run's.
        OSError: a file cannot be written.
    """
    left = sum(len(unattempted(items, job.layout)) for job in jobs)
    whole = len(jobs) * len(items)
    if left < whole:
        print(f"going on with an earlier run: {whole - left} of {whole} images are done", file=sys.stderr)
    if not left:
        return 0
    place = launched().on_its_machine
    with tqdm(total=whole, initial=whole - left, desc="images", unit="image", position=place) as bar:
        shared = [job for job in jobs if job.options.processes > 1 and unattempted(items, job.layout)]
        if shared:
            share_out(experiment, shared, items, bar)
        Attacking(jobs, bar.update).run(items)
    return left


def share_out(experiment: Experiment, jobs: Sequence[Job], items: Sequence[Item], bar: tqdm) -> None:
    """Attacks the images in several processes; what one of them leaves undone, because it was killed, is left
    to the caller.
    """
    processes, runs = jobs[0].options.processes, [(job.options, job.identity) for job in jobs]
    parts = [(experiment, runs, items[k::processes]) for k in range(processes)]
    killed = run_in_processes(attack_part, parts, told=bar.update)
    if killed:
        tqdm.write(
            f"{len(killed)} of {processes} processes were killed "
            f"({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; "
            "going on with their images in this one",
            file=sys.stderr,
        )


def attack_part(experiment: Experiment, runs: Sequence[tuple[Options, str]], items: Sequence[Item]) -> None:
    """What one of several processes does."""
    if any(missing_of(items, experiment.layout(options)) for options, _ in runs):
        attacks = load_attacks(experiment, [options for options, _ in runs])
        Attacking(jobs_of(experiment, runs, attacks), tell_parent).run(items)


# ---------------------------------------------------------------- in this process


class Attacking:
    """Attacks images with some jobs in batches as large as memory allows, and remembers what fitted.

    Args:
        done: is told of how many images have been finished.
    """

    def __init__(self, jobs: Sequence[Job], done: Callable[[int], object]):
        self.jobs, self.done, options = jobs, done, jobs[0].options
        self.device, self.is_alone = jobs[0].attack.device, len(jobs) == 1
        is_single = isinstance(jobs[0].attack, PixelAttack)  # which takes one image after the other anyway
        self.find_batch = (
            options.batch_size is None
            and self.device.type == "cuda"
            and self.is_alone
            and not options.weight_mode.startswith("learnable")
            and not is_single
        )
        self.batch_size = 1 if is_single else options.batch_size or 1

    def run(self, items: Sequence[Item]) -> None:
        """Attacks and judges what is left of the images."""
        work = [item for item in items if any(job.is_left(item) for job in self.jobs)]
        while work:
            batch, work = work[: self.batch_size], work[self.batch_size :]
            try:
                self.attack_batch(batch)
            except FileNotFoundError:  # of a file that another run may have deleted, which has started over
                for job in self.jobs:
                    check_still_ours(job.layout.folder, job.identity)
                raise
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.shrink(str(error))
            else:
                self.grow()
            work[:0] = [item for item in batch if any(job.is_left(item) for job in self.jobs)]

    def attack_batch(self, batch: Sequence[Item]) -> None:
        """Attacks images with each job and judges them; of one that fails, a file says why, and the others
        of the batch are left.
        """
        inversions: dict[tuple, tuple[Inversion | GivenImages, Cost]] = {}
        for job in self.jobs:
            pictures = self.read([item for item in batch if job.is_left(item)], job)
            if not pictures:
                continue
            unused = self.unused_bytes(job)
            key = (
                *(getattr(job.options, name) for name in INVERSION_FLAGS),
                *(picture.item.index for picture in pictures),
            )
            if key not in inversions:
                inversions[key] = inverted(job, pictures, unused, self.is_alone)
            state = job.attack.controller.state()
            try:
                attack_pictures(job, pictures, *inversions[key], unused, self.is_alone)
            except (NonFiniteLossError, AttackError) as error:
                job.attack.controller.load_state(state)
                write_failure(job.layout, pictures[error.index].item, error)
                self.done(1)
                stop_if_nothing_works(job.layout, error)
                continue
            except RuntimeError:
                job.attack.controller.load_state(state)
                raise
            finished = [picture.item for picture in pictures]
            judge_images(job.files, finished, job.judges, job.elsewhere)
            self.done(len(finished))

    def read(self, items: Sequence[Item], job: Job) -> list[Picture]:
        """Those of the images that can be read."""
        pictures = []
        for item in items:
            try:
                pictures.append(read_picture(item, job.masks, job.options.res))
            except OSError as error:
                write_failure(job.layout, item, error)
                self.done(1)
        return pictures

    def unused_bytes(self, job: Job) -> int:
        """Of networks that are loaded and that this job's attack does without."""
        used = {id(network) for network in loaded_networks(job.attack)}
        loaded = [*job.judges.loaded.values()]
        loaded += [network for other in self.jobs for network in loaded_networks(other.attack)]
        return bytes_of([*{id(n): n for n in loaded if id(n) not in used}.values()])

    def shrink(self, reason: str) -> None:
        """After an out-of-memory error: half the batch, then one timestep's graph at a time, then no more."""
        clear_device_cache(garbage_collection=True)
        self.find_batch = False
        if self.batch_size > 1:
            self.batch_size //= 2
            tqdm.write(f"out of memory: going on with --batch_size {self.batch_size}", file=sys.stderr)
        elif not self.jobs[0].attack.checkpointing:
            for job in self.jobs:
                job.attack.checkpointing = True
            tqdm.write(
                "out of memory: going on with the graph of one timestep at a time, which takes more time",
                file=sys.stderr,
            )
        else:
            smaller = int(self.jobs[0].options.res * 0.7) // 32 * 32
            advice = (
                f"--res {smaller} needs half of it"
                if smaller >= 96
                else "this model needs more memory than there is"
            )
            raise RunError(
                f"out of memory with one image and the graph of one timestep at a time at --res "
                f"{self.jobs[0].options.res} ({' '.join(reason.split())[:160]}); "
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


def stop_if_nothing_works(layout: Layout, error: Exception) -> None:
    """An attack that fails on one image may go on with the others; one that has failed on every image so far,
    and on more than one if there are more, will fail on all of them.

    Raises:
        InputError: it is so.
    """
    if isinstance(error, AttackError) and not layout.finished():
        if layout.images == 1 or len(layout.failed()) > 1:
            raise InputError(str(error))


def read_picture(item: Item, masks: Mapping[int, Path], size: int) -> Picture:
    """Raises OSError where it or its mask cannot be read."""
    path = masks.get(item.index)
    return Picture(item, read_image(item.path, size), None if path is None else read_mask(path, size))


def invert(attack: DiffAttack | PixelAttack, batch: Sequence[Picture]) -> Inversion | GivenImages:
    """The inversion of pictures that are attacked at once."""
    labels, targets = map(torch.tensor, labels_and_targets([picture.item for picture in batch]))
    images = torch.cat([to_tensor(picture.pixels) for picture in batch])
    masks = None
    if batch[0].mask is not None:
        masks = torch.stack([torch.from_numpy(picture.mask) for picture in batch])[:, None]
    return attack.invert(images, labels, targets, masks)


def inverted(
    job: Job, pictures: Sequence[Picture], unused: int, is_alone: bool
) -> tuple[Inversion | GivenImages, Cost]:
    """The inversion of pictures, and what it cost without the bytes of networks that are not used; of a job
    that is alone the peak is that of the process so far.
    """
    with measured(job.networks(), job.attack.device, afresh=not is_alone) as costs:
        started = time.perf_counter()
        inversion = invert(job.attack, pictures)
        seconds = time.perf_counter() - started
    return inversion, Cost(seconds, costs.counts, costs.peak_memory - unused)


def attack_pictures(
    job: Job,
    pictures: Sequence[Picture],
    inversion: Inversion | GivenImages,
    cost: Cost,
    unused: int,
    is_alone: bool,
) -> None:
    """Attacks pictures at once from their inversion, which cost so much, and writes their files.

    Raises:
        RunError: the folder has become another run's.
        NonFiniteLossError: a loss became NaN or infinite.
        OSError: a file cannot be written.
    """
    name = pictures[0].item.path.name[:24] + (f" and {len(pictures) - 1} more" if pictures[1:] else "")
    with (
        measured(job.networks(), job.attack.device, afresh=not is_alone) as costs,
        progress_bar(job, name) as progress,
    ):
        started = time.perf_counter()
        result = job.attack.attack(inversion, progress)
        seconds = time.perf_counter() - started
    own = Cost(seconds, costs.counts, costs.peak_memory - unused)
    shared = cost.and_then(own).shared_by(len(pictures), job.options.processes)
    for k, picture in enumerate(pictures):
        write_image_files(job, result.of_image(k), picture, shared)


@contextmanager
def progress_bar(job: Job, name: str) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """What an attack calls after each iteration; of several processes the one that started them shows how
    many images are done.
    """
    silent = job.options.processes > 1 or isinstance(job.attack, PixelAttack)  # which says nothing on its way
    with tqdm(total=job.options.iterations, desc=name, leave=False, disable=silent) as bar:

        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses.mean(1).tolist())})

        yield progress


def write_image_files(job: Job, result: AttackResult, picture: Picture, cost: Cost) -> None:
    """Writes the files of an image, its record last of all; the result is its own."""
    attack, options, item, clean = job.attack, job.options, picture.item, picture.pixels
    layout, index = job.layout, item.index
    labels, targets = labels_and_targets([item])
    check_still_ours(layout.folder, job.identity)
    truncated, made = options.inversion == "diffattack", {"adv_image": result.adversarial[0]}
    if result.reconstruction is not None:
        made["reconstruction"] = result.reconstruction[0]
    files = {kind: layout.file(index, f"{kind}.png") for kind in made}
    for kind, image in made.items():
        write_image(to_pixels(image, truncated), files[kind])
    sides = [clean, *(read_image(path, options.res) for path in files.values())]
    answers = [answer_of(job, k, sides, labels, targets) for k in range(len(options.model_name))]
    success = all(
        fooled(answer.predictions[:, 0, 1], labels, targets, attack.head).all() for answer in answers
    )
    write_result(layout, index, clean, sides[1], joined_names(options.model_name), success)
    files = {"originImage": layout.file(index, "originImage.png"), **files}
    row = row_of(job, result, picture, answers) | {
        "success": success if all(answer.correct_before.all() for answer in answers) else None,
        "fooled": success,
        "psnr": psnr(clean, sides[1]),
        "files": {kind: file_digest(path) for kind, path in files.items()},
        **cost.as_row(),
    }
    curve = curve_of(job, result, clean, labels, targets)
    check_still_ours(layout.folder, job.identity)
    state = attack.controller.state()
    write_record(result.record, state, row, layout.record(index), job.identity, curve)


def answer_of(
    job: Job, k: int, sides: Sequence[np.ndarray], labels: np.ndarray, targets: np.ndarray
) -> ClassifierResult:
    """What the k-th surrogate predicts of an image's pictures: clean, adversarial, reconstructed."""
    classifier, device, head = job.attack.classifiers[k], job.attack.device, job.attack.head
    predicted = [predict(classifier, side[None], labels, device, 16, head, targets) for side in sides]
    logits = np.stack([found for _, found in predicted], 1) if head.threshold is not None else None
    predictions = np.stack([found for found, _ in predicted], 1)[:, None]
    return ClassifierResult(job.options.model_name[k], labels, predictions, targets, head, logits)


def row_of(job: Job, result: AttackResult, picture: Picture, answers: Sequence[ClassifierResult]) -> dict:
    """What results.json says of an image, but for what its written file shows."""
    options, item, class_names = job.options, picture.item, job.attack.class_names
    base, device = options.label_base, job.attack.device
    labels, targets = labels_and_targets([item])
    with torch.no_grad():  # of interest only where the file says otherwise
        image = result.adversarial.float()
        as_tensor = torch.stack([classifier(image) for classifier in job.attack.classifiers])
    fooled_as_tensor = job.attack.head.fooled(
        as_tensor, torch.tensor(labels, device=device), torch.tensor(targets, device=device)
    )
    predictions = {answer.name: answer.described(0, class_names, base) for answer in answers}
    row = {
        "index": item.index,
        "file": name_of(item, options),
        "label": counted(item.labels, base),
        "class": ", ".join(class_names[label] for label in item.labels),
        "before": predictions[options.model_name[0]]["before"],
        "after": predictions[options.model_name[0]]["after"],
        "fooled_as_tensor": bool(fooled_as_tensor.all()),
        "iterations": int(result.steps[0]),
        "predictions": predictions,
        "digest": file_digest(item.path),
    }
    if item.target is not None:
        row |= {"target": item.target + base, "target_class": class_names[item.target]}
    if result.reached is not None:
        row["margin_reached"] = bool(result.reached[0])
    if picture.mask is not None:
        row["mask_digest"] = file_digest(job.masks[item.index])
    if result.searches is not None:
        radius, runs = result.searches[0]
        row |= {"radius": radius, "attack_runs": runs}
    return row


def curve_of(
    job: Job, result: AttackResult, clean: np.ndarray, labels: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray] | None:
    """What all judges find of an image's pictures at the iterations of `--judge_at`, and at the end."""
    if not result.pictures_at:
        return None
    truncated = job.options.inversion == "diffattack"
    pictures_at = result.pictures_at | {job.options.iterations: result.adversarial}
    pictures = {step: to_pixels(images[0], truncated) for step, images in pictures_at.items()}
    return curve_of_image(pictures, clean, labels, targets, job.judges)
