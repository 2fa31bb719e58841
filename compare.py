"""Compares weight modes on the same images, and says of every difference whether it is more than chance.

    python compare.py                                       # all four modes on the demo photographs
    python compare.py --modes uniform,fixed,fixed:increasing --images_root PHOTOS --label_path LABELS.txt

Inversion and null-text optimisation do not depend on the weights; they are done once an image and shared by
all modes. Each mode's folder inside --save_dir is as `main.py` writes it. A comparison that was interrupted
goes on with what is missing. The first mode is the one that the others are compared with.
"""

from __future__ import annotations

import environment  # isort: skip  # noqa: F401

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from commands import run_program
from comparison import ModeWeights, compare_runs, csv_text, latex, markdown
from dataset import Item, labels_and_targets
from diff_latent_attack import DiffAttack
from evaluate import Evaluation, evaluate, table, written_results
from figures import plot_success_against_visibility
from flags import InputError, flag, parse_options
from images import read_image, to_tensor
from losses import NonFiniteLossError
from options import Options
from records import ANALYSIS, Run, record_path
from runner import attack_images, count_processes, restore_weights
from runs import (
    check_folder,
    claim_folder,
    drop_unusable,
    failure_path,
    make_folder,
    missing_of,
    provenance,
    read_failures,
    read_finished,
    read_pictures,
    write_failure,
    write_texts,
)
from task import Task, load_attacks, read_task
from timestep_weights import SCHEDULES, WEIGHT_MODES, effective_timesteps
from utils import draw_comparison, draw_folders, save_figure
from workers import run_in_processes

# ---------------------------------------------------------------- run


def parse_modes(text: str) -> list[tuple[str, str]]:
    """Modes with their schedules from "uniform,fixed:increasing"; `fixed` alone takes the schedule
    `learned`.
    """
    modes = []
    for part in text.split(","):
        mode, _, schedule = part.strip().partition(":")
        if mode not in WEIGHT_MODES:
            raise argparse.ArgumentTypeError(
                f"unknown mode {mode!r}; expected some of {', '.join(WEIGHT_MODES)}"
            )
        if schedule and (mode != "fixed" or schedule not in SCHEDULES):
            raise argparse.ArgumentTypeError(
                f"{part.strip()!r}: a schedule goes with fixed alone, as fixed:NAME with NAME one of "
                f"{', '.join(SCHEDULES)}"
            )
        modes.append((mode, schedule or "learned"))
    if len(modes) < 2 or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError("expected at least two modes, none of them twice")
    return modes


def name_of(mode: str, schedule: str) -> str:
    return f"{mode}:{schedule}" if mode == "fixed" and schedule != "learned" else mode


@dataclass
class CompareOptions(Options):
    """The flags of main.py, and one more."""

    title = "comparison"

    modes: list[tuple[str, str]] | str = flag(
        ",".join(WEIGHT_MODES),
        "weight modes, separated by commas; fixed:NAME names a schedule",
        "MODES",
        parse=parse_modes,
    )


@dataclass(frozen=True)
class Mode:
    """One of the modes that are compared."""

    name: str
    options: Options  # what `main.py` would be called with
    identity: str  # of the run that this is
    attack: DiffAttack
    weights_at_start: list[float]


def run(options: CompareOptions) -> int:
    """Checks, attacks in every mode, compares and writes; returns the exit code."""
    if (options.weight_mode, options.weight_schedule) != ("uniform", "learned"):
        raise InputError(
            "--weight_mode and --weight_schedule are for main.py; a comparison takes --modes, such as "
            "uniform,fixed:increasing"
        )
    if (
        options.shard != "0/1"
        or "WORLD_SIZE" in os.environ
        or options.overwrite
        or options.is_test
        or (options.batch_size or 1) != 1
    ):
        raise InputError(
            "--shard, --overwrite, --is_test, --batch_size and accelerate launch are for main.py; a "
            "comparison shares out its images by --processes alone"
        )
    task = read_task(options)
    names = [name_of(*mode) for mode in options.modes]
    each = [options_of_mode(options, mode, name) for mode, name in zip(options.modes, names)]
    configurations = [task.configuration(one) for one in each]
    for one, configuration in zip(each, configurations):
        check_folder(one.save_dir, configuration)
    attacks, items = load_attacks(task, each), task.items[: options.limit]
    modes = []
    for name, one, attack, configuration in zip(names, each, attacks, configurations):
        make_folder(one.save_dir)
        identity = claim_folder(one.save_dir, configuration)
        drop_unusable(one.save_dir, items, identity)
        modes.append(Mode(name, one, identity, attack, attack.controller.weights().tolist()))
        done = [item.index for item in items if record_path(one.save_dir, item.index).exists()]
        if done:
            restore_weights(attack, one.save_dir, max(done))
    with tqdm(total=len(items), desc="images", unit="image") as bar:
        share_out(task, items, modes, bar)
        for item in items:
            attack_in_all_modes(item, attacks, [(mode.options, mode.identity) for mode in modes])
            show_progress(bar, items, each)
    return report(options, modes, items, task.device)


def options_of_mode(options: CompareOptions, mode: tuple[str, str], name: str) -> Options:
    """What `main.py` would be called with for one mode."""
    shared = {declared.name: getattr(options, declared.name) for declared in fields(Options)}
    weight_mode, schedule = mode
    return Options(
        **shared
        | {
            "weight_mode": weight_mode,
            "weight_schedule": schedule,
            "save_dir": options.save_dir / name.replace(":", "_"),
        }
    )


def share_out(task: Task, items: list[Item], modes: Sequence[Mode], bar: tqdm) -> None:
    """Attacks the images in several processes, in the modes that allow it; mode learnable, which takes one
    image after the other, is left to the caller.
    """
    for mode in modes:
        mode.options.processes = (
            1
            if mode.options.weight_mode == "learnable"
            else count_processes(mode.options, mode.attack, len(items), 1)
        )
    claimed = [(mode.options, mode.identity) for mode in modes if mode.options.processes > 1]
    shared = [options for options, _ in claimed]
    for options in shared:
        for item in missing_of(items, options.save_dir):
            failure_path(options.save_dir, item.index).unlink(missing_ok=True)  # of an earlier run
    if any(missing_of(items, options.save_dir) for options in shared):
        processes = shared[0].processes
        killed = run_in_processes(
            attack_part,
            [(task, claimed, items[k::processes]) for k in range(processes)],
            lambda: show_progress(bar, items, shared),
        )
        if killed:
            tqdm.write(
                f"{len(killed)} of {processes} processes were killed; going on with their images in this one",
                file=sys.stderr,
            )


def show_progress(bar: tqdm, items: Sequence[Item], each: Sequence[Options]) -> None:
    done = sum(all(record_path(one.save_dir, item.index).exists() for one in each) for item in items)
    bar.update(done - bar.n)


def attack_part(task: Task, claimed: Sequence[tuple[Options, str]], items: Sequence[Item]) -> None:
    """What one of several processes does: attacks its images with each of these options."""
    attacks = load_attacks(task, [options for options, _ in claimed])
    for item in items:
        attack_in_all_modes(item, attacks, claimed)


def attack_in_all_modes(
    item: Item, attacks: Sequence[DiffAttack], claimed: Sequence[tuple[Options, str]]
) -> None:
    """Attacks one image with each of the options that has no record of it, from one inversion; each comes
    with the identity of its run.
    """
    missing = [
        (attack, options, identity)
        for attack, (options, identity) in zip(attacks, claimed)
        if not record_path(options.save_dir, item.index).exists()
        # one of several processes has tried
        and not (options.processes > 1 and failure_path(options.save_dir, item.index).exists())
    ]
    if not missing:
        return
    try:
        clean = read_image(item.path, missing[0][1].res)
    except OSError as error:
        for _, options, _ in missing:
            write_failure(options.save_dir, item.index, item.path, error)
        return
    started = time.perf_counter()
    inversion = attacks[0].invert(to_tensor(clean), *map(torch.tensor, labels_and_targets([item])))
    seconds = time.perf_counter() - started
    for attack, options, identity in missing:
        failure_path(options.save_dir, item.index).unlink(missing_ok=True)
        state = attack.controller.state()
        try:
            attack_images(attack, [item], [clean], options, identity, inversion, seconds)
        except NonFiniteLossError as error:
            attack.controller.load_state(state)
            write_failure(options.save_dir, item.index, item.path, error)


# ---------------------------------------------------------------- what the folders say


def report(
    options: CompareOptions, modes: Sequence[Mode], items: Sequence[Item], device: torch.device
) -> int:
    """Compares what is in the folders, writes comparison.md, .tex, .json and .csv, and prints the table;
    returns the exit code.
    """
    failures = [
        f"{mode.name}: {failure}"
        for mode in modes
        for failure in read_failures(mode.options.save_dir, [item.index for item in items])
    ]
    compared = [
        item
        for item in items
        if all(record_path(mode.options.save_dir, item.index).exists() for mode in modes)
    ]
    if not compared:
        print("\n".join(["no image was attacked in every mode, so there is nothing to compare", *failures]))
        return 1
    runs = [read_finished(mode.options.save_dir, [item.index for item in compared]) for mode in modes]
    attack = modes[0].attack
    surrogates, class_names = dict(zip(options.model_name, attack.classifiers)), attack.class_names
    evaluations = []
    for mode, run in zip(modes, runs):
        pictures = read_pictures(mode.options.save_dir, compared, options.res)
        known = written_results(run.rows, pictures, options.label_base)
        evaluations.append(
            evaluate(pictures, surrogates, options.transfer_models, device, known, class_names)
        )
    comparison = compare_runs(
        [mode.name for mode in modes],
        runs,
        evaluations,
        [weights_of(mode) for mode in modes],
        failures,
    )
    write_texts(
        options.save_dir,
        {
            "comparison.md": markdown(comparison.sections, comparison.remarks),
            "comparison.tex": latex(comparison.sections[0][1], comparison.remarks[0]),
            "comparison.json": json.dumps(comparison.results | provenance(options, device), indent=2),
            "comparison.csv": csv_text(
                comparison.names, [run.rows for run in runs], evaluations, options.label_base
            ),
        },
    )
    print(
        "\n"
        + "\n\n".join("\n".join([title, *table(rows)]) for title, rows in comparison.sections)
        + "\n\n"
        + "\n".join(comparison.remarks)
    )
    if options.figures != "none":
        draw(comparison.names, runs, evaluations, options.save_dir, each_image=options.figures == "all")
        print(f"\nfigures in {options.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


def weights_of(mode: Mode) -> ModeWeights:
    weights = mode.attack.controller.weights()
    return ModeWeights(mode.weights_at_start, weights.tolist(), effective_timesteps(weights))


def draw(
    names: Sequence[str],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    folder: Path,
    each_image: bool,
) -> None:
    """The figures of each mode in its own folder, and those that compare the modes in that of the
    comparison.
    """
    draw_folders(runs, each_image, anew=False)
    draw_comparison(dict(zip(names, runs)), folder)
    measure = "LPIPS" if "LPIPS" in evaluations[0].quality else "SSIM"

    def ends(estimate):
        return (estimate.value, estimate.low, estimate.high)

    points = {
        name: {
            measure: ends(e.quality[measure].adversarial),
            e.classifiers[0].name: ends(e.classifiers[0].success),
            **({"transfer, mean": ends(e.transfer_success)} if e.transfer_success else {}),
        }
        for name, e in zip(names, evaluations)
    }
    save_figure(
        plot_success_against_visibility(points, measure), folder / ANALYSIS / "success_against_visibility"
    )


def main(argv: list[str] | None = None) -> int:
    return run_program(
        "compare.py",
        lambda: run(
            parse_options(CompareOptions, __doc__.split("\n\n")[0], argv, save_dir=Path("comparison"))
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
