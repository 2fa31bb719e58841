"""Attacks each image of a comparison in every mode, from one inversion, in several processes where the modes
allow it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from diffattack.attacks.pixel import GivenImages
from diffattack.common.costs import Cost, bytes_of, measured
from diffattack.common.errors import AttackError, NonFiniteLossError
from diffattack.common.workers import run_in_processes, tell_parent
from diffattack.data.dataset import Item
from diffattack.data.layout import Layout
from diffattack.diffusion.inversion import Inversion
from diffattack.options import Options
from diffattack.runner.folder import missing_of, write_failure
from diffattack.runner.judges import judged_bar
from diffattack.runner.processes import count_processes, loaded_networks
from diffattack.runner.runner import (
    Job,
    Picture,
    attack_image,
    invert,
    judge_attacked,
    networks_of,
    read_picture,
    stop_if_nothing_works,
)
from diffattack.runner.task import Task, load_attacks, load_judges

INVERSION_FLAGS = ("diffusion_steps", "start_step", "guidance", "inversion")  # what an inversion depends on


def attack_in_modes(task: Task, items: Sequence[Item], jobs: Sequence[Job], bar: tqdm) -> None:
    """Attacks what is missing of the images with each job; mode learnable, which takes one image after the
    other, in this process.
    """
    share_out(task, items, jobs, bar)
    for item in items:
        attack_in_all(item, jobs)
        show_progress(bar, items, [job.layout for job in jobs])


def share_out(task: Task, items: Sequence[Item], jobs: Sequence[Job], bar: tqdm) -> None:
    """Attacks the images in several processes, in the modes that allow it; what is left undone, because a
    process was killed, is left to the caller.
    """
    for job in jobs:
        job.options.processes = (
            1
            if job.options.weight_mode == "learnable"
            else count_processes(job.options, job.attack, len(items), 1)
        )
    claimed = [(job.options, job.identity) for job in jobs if job.options.processes > 1]
    shared = [options for options, _ in claimed]
    for options in shared:
        for item in missing_of(items, task.layout(options)):
            task.layout(options).failure(item.index).unlink(missing_ok=True)  # of an earlier run
    if any(missing_of(items, task.layout(options)) for options in shared):
        processes = shared[0].processes
        with judged_bar(len(items) * len(shared)) as told:
            killed = run_in_processes(
                attack_part,
                [(task, claimed, items[k::processes]) for k in range(processes)],
                lambda: show_progress(bar, items, [task.layout(options) for options in shared]),
                told,
            )
        if killed:
            tqdm.write(
                f"{len(killed)} of {processes} processes were killed; going on with their images in this one",
                file=sys.stderr,
            )


def show_progress(bar: tqdm, items: Sequence[Item], layouts: Sequence[Layout]) -> None:
    indices = {item.index for item in items}
    bar.update(len(indices.intersection(*(layout.finished(indices) for layout in layouts))) - bar.n)


def attack_part(task: Task, claimed: Sequence[tuple[Options, str]], items: Sequence[Item]) -> None:
    """What one of several processes does: attacks its images with each of these options, which come with the
    identity of their run.
    """
    attacks = load_attacks(task, [options for options, _ in claimed])
    judges = load_judges(task, attacks[0])
    jobs = [
        Job(attack, options, identity, task.layout(options), task.masks, judges)
        for attack, (options, identity) in zip(attacks, claimed)
    ]
    for item in items:
        attack_in_all(item, jobs)
    for job in jobs:
        elsewhere = None if job is jobs[0] else jobs[0].layout
        judge_attacked(task, job.options, job.attack, items, tell_parent, elsewhere)


def attack_in_all(item: Item, jobs: Sequence[Job]) -> None:
    """Attacks one image with each of the jobs that has no record of it, from one inversion."""
    missing = [
        job
        for job in jobs
        if not job.layout.record(item.index).exists()
        # one of several processes has tried
        and not (job.options.processes > 1 and job.layout.failure(item.index).exists())
    ]
    if not missing:
        return
    try:
        picture = read_picture(item, missing[0])
    except OSError as error:
        for job in missing:
            write_failure(job.layout, item, error)
        return
    inversions, loaded = {}, networks_by_id(jobs)
    for job in missing:
        unused = [loaded[key] for key in loaded.keys() - networks_by_id([job]).keys()]
        depends_on = (job.options.attack, *(getattr(job.options, name) for name in INVERSION_FLAGS))
        if depends_on not in inversions:
            inversions[depends_on] = inverted(job, picture, bytes_of(unused))
        job.layout.failure(item.index).unlink(missing_ok=True)
        state = job.attack.controller.state()
        try:
            attack_image(job, picture, *inversions[depends_on], bytes_of(unused))
        except (NonFiniteLossError, AttackError) as error:
            job.attack.controller.load_state(state)
            write_failure(job.layout, item, error)
            stop_if_nothing_works(job.layout, error, are_others_left=True)


def inverted(job: Job, picture: Picture, unused: int) -> tuple[Inversion | GivenImages, Cost]:
    """A picture's inversion, and what it cost without the bytes of networks that are not used."""
    with measured(networks_of(job.attack), job.attack.device, afresh=True) as costs:
        started = time.perf_counter()
        inversion = invert(job.attack, [picture])
        seconds = time.perf_counter() - started
    return inversion, Cost(seconds, costs.counts, costs.peak_memory - unused)


def networks_by_id(jobs: Sequence[Job]) -> dict[int, torch.nn.Module]:
    """All that are in memory for some attacks, each once."""
    return {id(network): network for job in jobs for network in loaded_networks(job.attack)}
