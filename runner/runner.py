"""Attacks the images of a run and writes their files: in batches as memory allows, and over processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from classifiers.registry import file_name
from common.devices import free_memory
from common.errors import RunError
from common.workers import processes_for, run_in_processes
from data.dataset import Item, labels_and_targets
from data.images import Pictures, read_image, to_pixels, to_tensor, write_image, write_result
from data.records import record_path, write_record
from diff_latent_attack import AttackResult, DiffAttack
from diffusion.inversion import Inversion
from evaluation.evaluate import evaluate_classifier
from evaluation.predictions import fooled
from evaluation.quality import psnr
from losses import LOSS_TERMS, NonFiniteLossError
from losses import fooled as logits_fooled
from options import Options
from runner.folder import (
    check_still_ours,
    counted,
    failure_path,
    file_digest,
    missing_of,
    name_of,
    write_failure,
)
from runner.task import Task, load_attacks

# of the batch that is found from what the first image took of the free memory
LARGEST_BATCH, MEMORY_SHARE = (
    16,
    0.8,
)


def attack_images(
    attack: DiffAttack,
    batch: list[Item],
    clean: list[np.ndarray],
    options: Options,
    identity: str,
    inversion: Inversion | None = None,
    seconds: float = 0.0,
) -> None:
    """Attacks the images of a batch, read as `clean`, at once and writes their files.

    Their inversion can be given with the seconds it took; `identity` is the run's.

    Raises:
        RunError: the folder has become another run's.
        NonFiniteLossError: a loss of the image at `index` of the batch became NaN or infinite.
        OSError: a file cannot be written.
    """
    started = time.perf_counter() - seconds
    labels, targets = labels_and_targets(batch)
    with tqdm(
        total=options.iterations,
        desc=batch[0].path.name[:24] + (f" and {len(batch) - 1} more" if len(batch) > 1 else ""),
        leave=False,
        disable=options.processes > 1,
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
        result = attack.attack(inversion, progress)
    for k, item in enumerate(batch):
        elapsed = (time.perf_counter() - started) / len(batch) / options.processes
        write_image_files(attack, result, k, item, clean[k], elapsed, options, identity)


def write_image_files(
    attack: DiffAttack,
    result: AttackResult,
    k: int,
    item: Item,
    clean: np.ndarray,
    seconds: float,
    options: Options,
    identity: str,
) -> None:
    """Writes the files of the k-th image of a batch, its record last of all.

    Args:
        clean: uint8 `(H, W, 3)`.
    """
    device, class_names, base = attack.unet.device, attack.class_names, options.label_base
    folder, index, adversarial = options.save_dir, item.index, result.adversarial[k : k + 1]
    labels, targets = labels_and_targets([item])
    check_still_ours(folder, identity)
    files = {kind: folder / f"{index:04d}_{kind}.png" for kind in ("adv_image", "reconstruction")}
    truncated = options.inversion == "diffattack"
    write_image(to_pixels(adversarial[0], truncated), files["adv_image"])
    write_image(to_pixels(result.reconstruction[k], truncated), files["reconstruction"])
    written, reconstructed = (read_image(path, options.res) for path in files.values())
    pictures = Pictures(clean[None], written[None], labels, reconstructed[None], targets)
    answers = [
        evaluate_classifier(name, classifier, pictures, device)
        for name, classifier in zip(options.model_name, attack.classifiers)
    ]
    correct_before = all(answer.correct_before.all() for answer in answers)
    success = all(fooled(answer.after, labels, targets).all() for answer in answers)
    with torch.no_grad():  # of interest only where the file says otherwise
        as_tensor = torch.stack([classifier(adversarial.float()) for classifier in attack.classifiers])
    fooled_as_tensor = logits_fooled(
        as_tensor, torch.tensor(labels, device=device), torch.tensor(targets, device=device)
    )
    write_result(folder, index, clean, written, "+".join(map(file_name, options.model_name)), success)
    predictions = {answer.name: answer.described(0, class_names, base) for answer in answers}
    row = {
        "index": index,
        "file": name_of(item, options),
        "label": counted(item.labels, base),
        "class": ", ".join(class_names[label] for label in item.labels),
        "before": predictions[options.model_name[0]]["before"],
        "after": predictions[options.model_name[0]]["after"],
        "success": success if correct_before else None,
        "fooled": success,
        "fooled_as_tensor": bool(fooled_as_tensor.all()),
        "psnr": psnr(clean, written),
        "seconds": seconds,
        "predictions": predictions,
        "digest": file_digest(item.path),
    }
    if item.target is not None:
        row |= {"target": item.target + base, "target_class": class_names[item.target]}
    check_still_ours(folder, identity)
    write_record(
        result.record.of_image(k), attack.controller.state(), row, record_path(folder, index), identity
    )


def restore_weights(attack: DiffAttack, folder: Path, index: int) -> None:
    """Sets the learnable weights to what they were after that image."""
    with np.load(record_path(folder, index)) as record:
        attack.controller.load_state(torch.from_numpy(record["controller_state"]))


class Runner:
    """Attacks images in batches as large as memory allows, and remembers what fitted."""

    def __init__(self, attack: DiffAttack, options: Options, identity: str):
        self.attack, self.options, self.identity = attack, options, identity
        self.device = attack.unet.device
        self.find_batch = (
            options.batch_size is None
            and self.device.type == "cuda"
            and not options.weight_mode.startswith("learnable")
        )
        self.batch_size = options.batch_size or 1

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
                    attack_images(self.attack, batch, clean, self.options, self.identity)
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
            failure_path(self.options.save_dir, item.index).unlink(missing_ok=True)  # of an earlier run
            try:
                clean.append(read_image(item.path, self.options.res))
                batch.append(item)
            except OSError as error:
                self.fail(item, error, bar)
        return batch, clean

    def fail(self, item: Item, error: Exception, bar: tqdm) -> None:
        write_failure(self.options.save_dir, item.index, item.path, error)
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


def count_processes(options: Options, attack: DiffAttack, images: int, launched: int) -> int:
    """How many processes of this machine share out the images. It does not depend on how many are done, so
    that a run that goes on computes as before.
    """
    if options.processes is not None:
        return min(options.processes, images)
    if (
        launched > 1
        or attack.unet.device.type != "cpu"
        or options.weight_mode == "learnable"
        or (options.batch_size or 1) > 1
    ):
        return 1
    weights = sum(
        parameter.nbytes
        for network in (attack.unet, attack.vae, *attack.classifiers)
        for parameter in network.parameters()
    )
    # Measured on the small model: 1.1 GB. A larger one keeps some three times its weights in activations for
    # the backward pass.
    return processes_for(images, int((1.2e9 + 4 * weights) * (options.res / 224) ** 2))


def share_out(task: Task, items: list[Item], identity: str, bar: tqdm) -> None:
    """Attacks the images in `--processes` processes; what one of them leaves undone, because it was killed,
    is left to the caller.
    """
    folder, processes = task.options.save_dir, task.options.processes

    def failed(item: Item) -> bool:
        return failure_path(folder, item.index).exists()

    def progress() -> None:
        left = [item for item in missing_of(items, folder) if not failed(item)]
        bar.update(len(items) - len(left) - bar.n)

    for item in missing_of(items, folder):
        # of an earlier run, which would count as done
        failure_path(folder, item.index).unlink(missing_ok=True)
    killed = run_in_processes(
        attack_part, [(task, items[k::processes], identity) for k in range(processes)], progress
    )
    if killed:
        tqdm.write(
            f"{len(killed)} of {processes} processes were killed "
            f"({', '.join(f'signal {-code}' for code in killed)}), perhaps for want of memory; "
            "going on with their images in this one",
            file=sys.stderr,
        )


def attack_part(task: Task, items: list[Item], identity: str) -> None:
    """What one of several processes does: attacks those of its images that are not finished."""
    missing = missing_of(items, task.options.save_dir)
    if missing:
        (attack,) = load_attacks(task, [task.options])
        Runner(attack, task.options, identity).run(missing, tqdm(disable=True))
