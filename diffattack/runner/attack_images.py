"""Attacks what is missing of images, each with every job: one inversion serves all jobs that it suits. Images
are shared out over processes, or attacked in batches as large as memory allows, and judged once they are
written.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from diffattack.attacks.pixel import GivenImages, PixelAttack
from diffattack.classifiers.registry import joined_names
from diffattack.common.device import Cost, free_memory, measured
from diffattack.common.errors import AttackError, InputError, NonFiniteLossError, RunError
from diffattack.common.parallel import run_in_processes, share_cores, this_process
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import read_image, read_mask, to_pixels, to_tensor, write_image, write_result
from diffattack.data.layout import Layout
from diffattack.data.records import write_record
from diffattack.diffusion.batch import AttackResult
from diffattack.diffusion.inversion import Inversion
from diffattack.evaluation.curves import curve_of_image
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.predictions import ClassifierResult, predict
from diffattack.losses import LOSS_TERMS
from diffattack.options import Options
from diffattack.runner.folder import (
    check_still_ours,
    counted,
    file_digest,
    name_of,
    unattempted,
    write_failure,
)
from diffattack.runner.jobs import Job, jobs_of
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
    place = this_process().local_rank
    with tqdm(total=whole, initial=whole - left, desc="images", unit="image", position=place) as bar:
        shared = [job for job in jobs if job.options.processes > 1 and unattempted(items, job.layout)]
        if shared:
            options, runs = shared[0].options, [(job.options, job.identity) for job in shared]
            work, at_once = left_of(items, shared), options.batch_size or 1
            parts = [work[start : start + at_once] for start in range(0, len(work), at_once)]
            run_in_processes(options.processes, parts, bar.update, attacker_of, (experiment, runs))
            threads = torch.get_num_threads()  # what is left is computed as the processes would have
            share_cores(options.processes)
            Attacker(shared, bar.update).run(items)
            torch.set_num_threads(threads)
        Attacker(jobs, bar.update).run(items)
    return left


def attacker_of(
    experiment: Experiment, runs: Sequence[tuple[Options, str]]
) -> Callable[[Sequence[Item]], int]:
    """What one of several processes does with images; it returns how many there were, of all jobs."""
    jobs = jobs_of(experiment, runs, load_attacks(experiment, [options for options, _ in runs]))
    share_cores(jobs[0].options.processes)
    attacker = Attacker(jobs, lambda count: None)

    def attack(items: Sequence[Item]) -> int:
        count = sum(job.is_left(item) for job in jobs for item in items)
        attacker.run(items)
        return count

    return attack


def left_of(items: Sequence[Item], jobs: Sequence[Job]) -> list[Item]:
    """The images that are left for at least one of the jobs."""
    return [item for item in items if any(job.is_left(item) for job in jobs)]


# ---------------------------------------------------------------- in this process


class Attacker:
    """Attacks images with some jobs in batches as large as memory allows, and remembers what fitted.

    Args:
        done: is told of how many images have been finished.
    """

    def __init__(self, jobs: Sequence[Job], done: Callable[[int], object]):
        self.jobs, self.done, options = jobs, done, jobs[0].options
        self.device = jobs[0].attack.device
        # which takes one image after the other anyway
        is_single = all(isinstance(job.attack, PixelAttack) for job in jobs)
        has_own_size = is_single or any(job.options.weight_mode.startswith("learnable") for job in jobs)
        self.find_batch = options.batch_size is None and self.device.type == "cuda" and not has_own_size
        self.batch_size = 1 if is_single else options.batch_size or 1

    def run(self, items: Sequence[Item]) -> None:
        """Attacks and judges what is left of the images."""
        work = left_of(items, self.jobs)
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
            work[:0] = left_of(batch, self.jobs)

    def attack_batch(self, batch: Sequence[Item]) -> None:
        """Attacks images with each job and judges them; of one that fails, a file says why, and the others
        of the batch are left.
        """
        inversions: dict[tuple, tuple[Inversion | GivenImages, Cost]] = {}
        for job in self.jobs:
            pictures = self.read([item for item in batch if job.is_left(item)], job)
            if not pictures:
                continue
            indices = tuple(picture.item.index for picture in pictures)
            key = (*(getattr(job.options, name) for name in INVERSION_FLAGS), indices)
            state = job.attack.controller.state()
            try:
                if key not in inversions:
                    inversions[key] = invert(job, pictures)
                attack_pictures(job, pictures, *inversions[key])
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
            judge_images(job, finished)
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
            raise RunError(
                f"out of memory with one image and one timestep at a time "
                f"({' '.join(reason.split())[:160]}); give a --res below "
                f"{self.jobs[0].options.res}; the images done so far are complete"
            )

    def grow(self) -> None:
        """After the first image: as many at once as its peak fits into the memory that is free."""
        if self.find_batch:
            self.find_batch = False
            taken = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
            fitting = MEMORY_SHARE * free_memory(self.device) // max(1, taken)
            self.batch_size = int(np.clip(fitting, 1, LARGEST_BATCH))


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


def invert(job: Job, pictures: Sequence[Picture]) -> tuple[Inversion | GivenImages, Cost]:
    """The inversion of pictures that are attacked at once, and what it cost."""
    labels, targets = map(torch.tensor, labels_and_targets([picture.item for picture in pictures]))
    images = torch.cat([to_tensor(picture.pixels) for picture in pictures])
    masks = None
    if pictures[0].mask is not None:
        masks = torch.stack([torch.from_numpy(picture.mask) for picture in pictures])[:, None]
    with measured(job.networks(), job.attack.device) as cost:
        inversion = job.attack.invert(images, labels, targets, masks)
    return inversion, cost


def attack_pictures(
    job: Job, pictures: Sequence[Picture], inversion: Inversion | GivenImages, cost: Cost
) -> None:
    """Attacks pictures at once from their inversion, which cost so much, and writes their files.

    Raises:
        RunError: the folder has become another run's.
        NonFiniteLossError: a loss became NaN or infinite.
        OSError: a file cannot be written.
    """
    options, attack = job.options, job.attack
    name = pictures[0].item.path.name[:24] + (f" and {len(pictures) - 1} more" if pictures[1:] else "")
    # of several processes the one that started them shows how many images are done
    silent = options.processes > 1 or isinstance(attack, PixelAttack)  # which says nothing on its way
    with tqdm(total=options.iterations, desc=name, leave=False, disable=silent) as bar:

        def progress(iteration: int, losses: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSS_TERMS, losses.mean(1).tolist())})

        with measured(job.networks(), attack.device) as own:
            result = attack.attack(inversion, progress)
    shared = (cost + own).of_image(len(pictures), options.processes)
    for k, picture in enumerate(pictures):
        write_image_files(job, result.of_image(k), picture, shared)


def write_image_files(job: Job, result: AttackResult, picture: Picture, cost: dict) -> None:
    """Writes the files of an image, its record last of all; the result is its own."""
    attack, options, item, clean = job.attack, job.options, picture.item, picture.pixels
    layout, index = job.layout, item.index
    labels, targets = labels_and_targets([item])
    check_still_ours(layout.folder, job.identity)
    truncated, made = options.inversion == "diffattack", {"adv_image": result.adversarial[0]}
    if result.reconstruction is not None:
        made["reconstruction"] = result.reconstruction[0]
    for kind, image in made.items():
        write_image(to_pixels(image, truncated), layout.file(index, f"{kind}.png"))
    adversarial = read_image(layout.file(index, "adv_image.png"), options.res)
    predictions = [predictions_of(job, k, [clean, adversarial], item) for k in range(len(attack.classifiers))]
    success = all(one.rate("success_of_all").count for one in predictions)
    write_result(layout, index, clean, adversarial, joined_names(options.model_name), success)
    row = row_of(job, result, picture) | {
        **predictions[0].described(attack.class_names, options.label_base),
        "success": success if all(one.success.total for one in predictions) else None,
        "fooled": success,
        "psnr": psnr(clean, adversarial),
        "files": {kind: file_digest(layout.file(index, f"{kind}.png")) for kind in ("originImage", *made)},
        **cost,
    }
    curve = curve_of(job, result, clean, labels, targets)
    check_still_ours(layout.folder, job.identity)
    write_record(result.record, attack.controller.state(), row, layout.record(index), job.identity, curve)


def predictions_of(job: Job, k: int, sides: Sequence[np.ndarray], item: Item) -> ClassifierResult:
    """What the k-th surrogate predicts of an image's pictures: clean and adversarial."""
    classifier, device, head = job.attack.classifiers[k], job.attack.device, job.attack.head
    labels, targets = labels_and_targets([item])
    given = (labels, device, 1, head, targets)
    predictions = np.stack([predict(classifier, side[None], *given) for side in sides], 1)[:, None]
    return ClassifierResult(job.options.model_name[k], labels, predictions, targets, head)


def row_of(job: Job, result: AttackResult, picture: Picture) -> dict:
    """What results.json says of an image, but for what its written file shows."""
    item, class_names, base = picture.item, job.attack.class_names, job.options.label_base
    labels, targets = (
        torch.tensor(of_all, device=job.attack.device) for of_all in labels_and_targets([item])
    )
    with torch.no_grad():  # of interest only where the file says otherwise
        image = result.adversarial.float()
        logits = torch.stack([classifier(image) for classifier in job.attack.classifiers])
    row = {
        "index": item.index,
        "file": name_of(item, job.options),
        "label": counted(item.labels, base),
        "class": ", ".join(class_names[label] for label in item.labels),
        "fooled_as_tensor": bool(job.attack.head.fooled(logits, labels, targets).all()),
        "iterations": int(result.steps[0]),
        "digest": file_digest(item.path),
    }
    if item.target is not None:
        row |= {"target": item.target + base, "target_class": class_names[item.target]}
    if result.reached is not None:
        row["margin_reached"] = bool(result.reached[0])
    if job.options.weight_mode.startswith("learnable"):
        row["weights_after"] = job.attack.controller.weights().tolist()
    if picture.mask is not None:
        row["mask_digest"] = file_digest(job.masks[item.index])
    if result.searches is not None:
        row["radius"], row["attack_runs"] = result.searches[0]
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
