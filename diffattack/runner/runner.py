"""Attacks the images of a run and writes their files: in batches as memory allows, and over processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import GivenImages, PixelAttack
from diffattack.classifiers.defences import undefended
from diffattack.classifiers.registry import joined_names
from diffattack.common.costs import Cost, measured, memory_peak
from diffattack.common.devices import free_memory
from diffattack.common.errors import AttackError, InputError, NonFiniteLossError, RunError
from diffattack.common.workers import run_in_processes, tell_parent
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.history import AttackResult
from diffattack.data.images import Pictures, read_image, to_pixels, to_tensor, write_image, write_result
from diffattack.data.layout import Layout
from diffattack.data.masks import read_mask
from diffattack.data.records import write_record
from diffattack.diffusion.inversion import Inversion
from diffattack.evaluation.by_image import logits_of
from diffattack.evaluation.curves import judged
from diffattack.evaluation.predictions import ClassifierResult, evaluate_classifier, fooled
from diffattack.evaluation.quality import psnr
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
from diffattack.runner.judges import judged_bar, judging_of
from diffattack.runner.task import Task, load_attacks, load_judges

# of the batch that is found from what the first image took of the free memory
LARGEST_BATCH, MEMORY_SHARE = 16, 0.8


@dataclass(frozen=True)
class Job:
    """An attack, and what a run needs to write its images."""

    attack: DiffAttack | PixelAttack
    options: Options
    identity: str  # of the run
    layout: Layout  # of its files
    masks: Mapping[int, Path]  # by the image's index; empty where there are none
    judges: Mapping[str, torch.nn.Module]  # of `--judge_at`


@dataclass(frozen=True)
class Picture:
    """An image that has been read."""

    item: Item
    pixels: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray | None  # (H, W) in [0, 1]


def read_picture(item: Item, job: Job) -> Picture:
    """Raises OSError where it or its mask cannot be read."""
    path, size = job.masks.get(item.index), job.options.res
    return Picture(item, read_image(item.path, size), None if path is None else read_mask(path, size))


def invert(attack: DiffAttack | PixelAttack, batch: Sequence[Picture]) -> Inversion | GivenImages:
    """The inversion of pictures that are attacked at once."""
    labels, targets = map(torch.tensor, labels_and_targets([picture.item for picture in batch]))
    images = torch.cat([to_tensor(picture.pixels) for picture in batch])
    masks = None
    if batch[0].mask is not None:
        masks = torch.stack([torch.from_numpy(picture.mask) for picture in batch])[:, None]
    return attack.invert(images, labels, targets, masks)


def attack_image(job: Job, picture: Picture, inversion: Inversion, cost: Cost, unused: int = 0) -> None:
    """Attacks an image from its inversion, which cost so much, and writes its files.

    Args:
        unused: bytes of networks that are loaded and that this attack does without.
    Raises:
        RunError: the folder has become another run's.
        NonFiniteLossError: a loss became NaN or infinite.
        OSError: a file cannot be written.
    """
    with (
        measured(networks_of(job.attack), job.attack.device, afresh=True) as costs,
        progress_bar(job, picture.item.path.name[:24]) as progress,
    ):
        started = time.perf_counter()
        result = job.attack.attack(inversion, progress)
        seconds = time.perf_counter() - started
    own = Cost(seconds, costs.counts, costs.peak_memory - unused)
    write_image_files(job, result, picture, cost.and_then(own).shared_by(1, job.options.processes))


def networks_of(attack: DiffAttack | PixelAttack) -> dict[str, list[torch.nn.Module]]:
    """What an attack asks, by the names under which it is counted."""
    networks = {"surrogate": [undefended(classifier) for classifier in attack.classifiers]}
    if attack.pipeline is not None:
        networks |= {"UNet": [attack.pipeline.unet], "decoder": [attack.pipeline.vae.decoder]}
    return networks


@contextmanager
def progress_bar(job: Job, name: str) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """What an attack calls after each iteration; of several processes the one that started them shows how
    many images are done.
    """
    total = None if job.attack.ends_early else job.options.iterations
    silent = job.options.processes > 1 or isinstance(job.attack, PixelAttack)  # which says nothing on its way
    with tqdm(total=total, desc=name, leave=False, disable=silent) as bar:

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
    written, *reconstructed = (read_image(path, options.res) for path in files.values())
    pictures = Pictures(
        clean[None], written[None], labels, reconstructed[0][None] if reconstructed else None, targets
    )
    answers = [
        evaluate_classifier(name, classifier, pictures, attack.device, head=attack.head)
        for name, classifier in zip(options.model_name, attack.classifiers)
    ]
    success = all(fooled(answer.after, labels, targets, attack.head).all() for answer in answers)
    write_result(layout, index, clean, written, joined_names(options.model_name), success)
    row = row_of(job, result, picture, answers) | {
        "success": success if all(answer.correct_before.all() for answer in answers) else None,
        "fooled": success,
        "psnr": psnr(clean, written),
        "files": {"originImage": file_digest(layout.file(index, "originImage.png"))}
        | {kind: file_digest(path) for kind, path in files.items()},
        **cost.as_row(),
    }
    check_still_ours(layout.folder, job.identity)
    write_record(
        result.record.of_image(0),
        attack.controller.state(),
        row,
        layout.record(index),
        job.identity,
        logits_of(answers, 0),
    )


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
    if result.pictures_at:
        truncated = options.inversion == "diffattack"
        pictures_at = {
            step: to_pixels(images[0], truncated)
            for step, images in (result.pictures_at | {options.iterations: result.adversarial}).items()
        }
        head = job.attack.head
        row["curve"] = judged(pictures_at, picture.pixels, labels, targets, job.judges, device, head)
    return row


def job_of(task: Task, attack: DiffAttack | PixelAttack, identity: str) -> Job:
    """The job of a task's own options; the judges are loaded if they are needed."""
    layout = task.layout(task.options)
    return Job(attack, task.options, identity, layout, task.masks, load_judges(task, attack))


def restore_weights(attack: DiffAttack | PixelAttack, layout: Layout, index: int) -> None:
    """Sets the learnable weights to what they were after that image."""
    with np.load(layout.record(index)) as record:
        attack.controller.load_state(torch.from_numpy(record["controller_state"]))


class Runner:
    """Attacks images in batches as large as memory allows, and remembers what fitted."""

    def __init__(self, job: Job):
        self.job, self.attack, self.options = job, job.attack, job.options
        self.device = job.attack.device
        self.find_batch = (
            self.options.batch_size is None
            and self.device.type == "cuda"
            and not self.options.weight_mode.startswith("learnable")
        )
        self.batch_size = self.options.batch_size or 1

    def run(self, work: list[Item], bar: tqdm) -> None:
        """Attacks the images; of one that fails, a file says why.

        Raises:
            RunError: memory does not suffice for one image.
            OSError: a file cannot be written.
        """
        while work:
            state, under_way = self.attack.controller.state(), {}
            try:
                self.attack_some(work, under_way, bar)
                self.grow()
                continue
            except (NonFiniteLossError, AttackError) as error:
                self.fail(under_way.pop(error.index).item, error, bar)
                stop_if_nothing_works(self.job.layout, error, bool(work or under_way))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.shrink(str(error))
            # to be attacked again, as if it had not been begun
            work[:0] = [picture.item for picture in under_way.values()]
            self.attack.controller.load_state(state)

    def attack_some(self, work: list[Item], under_way: dict[int, Picture], bar: tqdm) -> None:
        """Attacks a batch and writes its images as they end; others take the places of those that end before
        the rest, until there are none left.

        Args:
            work: what is still to be begun.
            under_way: the pictures that have been begun and are not finished, by the order in which they
                came, as it stands, also after an error.
        """
        follow_on = self.options.weight_mode == "learnable"  # from the weights that a batch ends with
        refills = self.attack.ends_early and not self.find_batch and not follow_on
        came, started = 0, time.perf_counter()

        def newcomers(room: int) -> Inversion | None:
            nonlocal came
            batch = self.next_batch(work, room, bar) if refills or not came else []
            under_way.update(enumerate(batch, came))
            came += len(batch)
            return invert(self.attack, batch) if batch else None

        others = min(self.batch_size, len(work)) - 1
        name = work[0].path.name[:24] + (f" and {others} more" if others else "")
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar(self.job, "images" if refills else name))
            costs = stack.enter_context(measured(networks_of(self.attack), self.device))
            in_turn = stack.enter_context(
                closing(self.attack.attack_in_turn(newcomers, self.batch_size, progress))
            )
            if follow_on:
                whole = {place: result for together in in_turn for place, result in together.items()}
                in_turn = [whole] if whole else []
            for together in in_turn:
                now = time.perf_counter()
                cost = Cost(now - started, costs.taken(), memory_peak(self.device))
                started = now
                for place, result in together.items():
                    shared = cost.shared_by(len(together), self.options.processes)
                    write_image_files(self.job, result, under_way[place], shared)
                    del under_way[place]
                    bar.update()
                costs.taken()  # judging is no part of the attack

    def next_batch(self, work: list[Item], size: int, bar: tqdm) -> list[Picture]:
        """Takes the next images that can be read off the work, so many at most, and reads them."""
        batch = []
        while work and len(batch) < size:
            item = work.pop(0)
            self.job.layout.failure(item.index).unlink(missing_ok=True)  # of an earlier run
            try:
                batch.append(read_picture(item, self.job))
            except OSError as error:
                self.fail(item, error, bar)
        return batch

    def fail(self, item: Item, error: Exception, bar: tqdm) -> None:
        write_failure(self.job.layout, item, error)
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
            smaller = int(self.options.res * 0.7) // 32 * 32
            advice = (
                f"--res {smaller} needs half of it"
                if smaller >= 96
                else "this model needs more memory than there is"
            )
            raise RunError(
                f"out of memory with one image and the graph of one timestep at a time at --res "
                f"{self.options.res} ({' '.join(reason.split())[:160]}); "
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


def stop_if_nothing_works(layout: Layout, error: Exception, are_others_left: bool) -> None:
    """An attack that fails on one image may go on with the others; one that has failed on every image so far,
    and on more than one if there are more, will fail on all of them.

    Raises:
        InputError: it is so.
    """
    if not isinstance(error, AttackError) or layout.finished():
        return
    if not are_others_left or len(layout.failed()) > 1:
        raise InputError(str(error))


def share_out(task: Task, items: list[Item], identity: str, bar: tqdm) -> None:
    """Attacks and judges the images in `--processes` processes; what one of them leaves undone, because it
    was killed, is left to the caller.
    """
    layout, processes = task.layout(task.options), task.options.processes

    def progress() -> None:
        bar.update(len(items) - len(unattempted(items, layout)) - bar.n)

    for item in missing_of(items, layout):
        layout.failure(item.index).unlink(missing_ok=True)  # of an earlier run, which would count as done
    parts = [(task, items[k::processes], identity) for k in range(processes)]
    with judged_bar(len(items)) as told:
        killed = run_in_processes(attack_part, parts, progress, told)
    if killed:
        tqdm.write(
            f"{len(killed)} of {processes} processes were killed "
            f"({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; "
            "going on with their images in this one",
            file=sys.stderr,
        )


def attack_part(task: Task, items: list[Item], identity: str) -> None:
    """What one of several processes does: attacks those of its images that are not finished, and judges
    them.
    """
    missing = missing_of(items, task.layout(task.options))
    if missing:
        (attack,) = load_attacks(task, [task.options])
        Runner(job_of(task, attack, identity)).run(missing, tqdm(disable=True))
        judge_attacked(task, task.options, attack, missing, tell_parent)


def judge_attacked(
    task: Task,
    options: Options,
    attack: DiffAttack | PixelAttack,
    items: Sequence[Item],
    done: Callable[[int], object],
    elsewhere: Layout | None = None,
) -> None:
    """Judges the images of these that are finished, by classifiers some of which the attack has loaded."""
    layout = task.layout(options)
    finished = layout.finished([item.index for item in items])
    judging = judging_of(task, options, elsewhere, attack.diffusion)
    judges = judging.judges(dict(zip(options.model_name, attack.classifiers)))
    judging.judge([item for item in items if item.index in finished], judges, done)
