"""Compares weight modes on the same images, and says of every difference whether it is more than chance.

    python compare.py                                       # all four modes on the demo photographs
    python compare.py --modes uniform,fixed,fixed:increasing --images_root PHOTOS --label_path LABELS.txt
    python compare.py --modes uniform,fixed,minimax --sweep structure_share=0,0.1,0.3,1

Inversion and null-text optimisation do not depend on the weights; they are done once an image and shared by
all modes. Each mode's folder inside --save_dir is as `main.py` writes it; in a sweep it lies inside that of
its value. A comparison that was interrupted goes on with what is missing. The first mode is the one that the
others are compared with.
"""

from __future__ import annotations

import common.environment  # isort: skip  # noqa: F401

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.commands import run_program
from common.errors import InputError
from common.flags import flag, parse_options
from data.dataset import Item
from data.records import ANALYSIS, Run, record_path
from evaluation.comparison import Comparison, ModeWeights, compare_runs, csv_text, success_points
from evaluation.curves import curve_dicts, curve_points, point_rows
from evaluation.evaluate import Evaluation, evaluate, written_results
from evaluation.sweep import (
    Point,
    Sweep,
    SweepReport,
    compare_curves,
    curve_of,
    pair_rows,
    parse_sweep,
    report_sweep,
    sweep_csv,
)
from evaluation.tables import as_text, latex, markdown
from options import AttackOptions, Options
from plotting.draw import draw_comparison, draw_folders, draw_tradeoff, save_figure
from plotting.figures import plot_success_against_visibility, plot_tradeoff
from runner.folder import (
    check_folder,
    claim_folder,
    drop_unusable,
    failure_path,
    make_folder,
    provenance,
    read_failures,
    read_finished,
    read_pictures,
    write_texts,
)
from runner.modes import attack_in_modes
from runner.runner import Job, get_ready, restore_weights
from runner.summary import weights_at_the_end
from runner.task import check_shards, load_attacks, load_judges, read_task
from timestep_weights import SCHEDULES, STUDY_MODES, WEIGHT_MODES, effective_timesteps, named_schedules

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
    """The flags of main.py, and two more."""

    title = "comparison"

    modes: list[tuple[str, str]] | str = flag(
        ",".join(STUDY_MODES),
        f"weight modes, separated by commas: {', '.join(WEIGHT_MODES)}; fixed:NAME names a schedule",
        "MODES",
        parse=parse_modes,
    )
    sweep: Sweep | None = flag(
        None,
        "every mode at several values of a flag of the attack that takes a number, such as "
        "structure_share=0,0.1,0.3, compared at equal visibility",
        "FLAG=A,B,...",
        parse=functools.partial(parse_sweep, AttackOptions),
    )


@dataclass(frozen=True)
class Mode:
    """One of the modes that are compared, in a sweep at one of its values."""

    name: str
    value: float | None
    job: Job  # with what `main.py` would be called with
    weights_at_start: torch.Tensor  # (N,)


def run(options: CompareOptions) -> int:
    """Checks, attacks in every mode, compares and writes; returns the exit code."""
    check_options(options)
    task = read_task(options)
    each = options_of_modes(options)
    # each mode has as many processes as it may have
    part, parts = check_shards(replace(options, processes=1), [one.weight_mode for _, _, one in each])
    configurations = [task.configuration(one) for _, _, one in each]
    for (_, _, one), configuration in zip(each, configurations):
        check_folder(one.save_dir, configuration)
    selected = task.items[: options.limit]
    items = [item for item in selected if item.index % parts == part]
    get_ready([one for _, _, one in each], task.device, items)
    attacks = load_attacks(task, [one for _, _, one in each])
    modes, judges = [], load_judges(task, attacks[0])
    for (name, value, one), attack, configuration in zip(each, attacks, configurations):
        make_folder(one.save_dir)
        identity = claim_folder(one.save_dir, configuration)
        drop_unusable(one.save_dir, items, identity, task.masks)
        job = Job(attack, one, identity, task.masks, judges)
        modes.append(Mode(name, value, job, weights_at_the_end(attack, None)))
        done = [item.index for item in items if record_path(one.save_dir, item.index).exists()]
        if done:
            restore_weights(attack, one.save_dir, max(done))
    with tqdm(total=len(items), desc="images", unit="image") as bar:
        attack_in_modes(task, items, [mode.job for mode in modes], bar)
    return report(options, modes, selected, task.device)


def check_options(options: CompareOptions) -> None:
    """Raises InputError for flags of main.py that a comparison does not take."""
    if (options.weight_mode, options.weight_schedule) != ("uniform", "learned"):
        raise InputError(
            "--weight_mode and --weight_schedule are for main.py; a comparison takes --modes, such as "
            "uniform,fixed:increasing"
        )
    if "WORLD_SIZE" in os.environ or options.overwrite or options.is_test or (options.batch_size or 1) != 1:
        raise InputError(
            "--overwrite, --is_test, --batch_size and accelerate launch are for main.py; a comparison shares "
            "out its images by --processes and --shard"
        )
    if (
        options.sweep
        and options.sweep.flag == "self_attn_loss_weight"
        and options.structure_share is not None
    ):
        raise InputError("--structure_share replaces --self_attn_loss_weight, so that a sweep of it is idle")


def options_of_modes(options: CompareOptions) -> list[tuple[str, float | None, Options]]:
    """Names, values of the sweep, and what `main.py` would be called with; of the modes that are the same
    attack, the first alone.
    """
    shared = Options(**{declared.name: getattr(options, declared.name) for declared in fields(Options)})
    each, sweep = [], options.sweep
    for value in sweep.values if sweep else (None,):
        for weight_mode, schedule in options.modes:
            name = name_of(weight_mode, schedule)
            folder = options.save_dir / (sweep.folder(value) if sweep else "") / name.replace(":", "_")
            one = replace(shared, weight_mode=weight_mode, weight_schedule=schedule, save_dir=folder)
            if sweep:
                one = replace(one, **{sweep.flag: value})
                one.verify()
            each.append((name, value, one))
            if sweep and sweep.modes_are_one(value):
                break
    return each


# ---------------------------------------------------------------- what the folders say


def report(
    options: CompareOptions, modes: Sequence[Mode], items: Sequence[Item], device: torch.device
) -> int:
    """Compares what is in the folders, writes it, and prints the table; returns the exit code."""
    indices = [item.index for item in items]
    failures = [
        f"{mode.name}{'' if mode.value is None else f' at {mode.value:g}'}: {failure}"
        for mode in modes
        for failure in read_failures(mode.job.options.save_dir, indices)
    ]
    compared = [
        item
        for item in items
        if all(record_path(mode.job.options.save_dir, item.index).exists() for mode in modes)
    ]
    left = [
        item
        for item in items
        for mode in modes
        if not record_path(mode.job.options.save_dir, item.index).exists()
        and not failure_path(mode.job.options.save_dir, item.index).exists()
    ]
    if left:
        print(
            f"still to be attacked: {len(set(left))} images, by the same command without --shard or by "
            f"its other shards"
        )
        return 1 if failures else 0
    if not compared:
        print("\n".join(["no image was attacked in every mode, so there is nothing to compare", *failures]))
        return 1
    runs = [read_finished(mode.job.options.save_dir, [item.index for item in compared]) for mode in modes]
    evaluations = [evaluate_mode(mode, run, compared, device) for mode, run in zip(modes, runs)]
    if options.sweep:
        write_sweep(options, modes, runs, evaluations, failures, device)
    else:
        text = write_comparison(options, modes, runs, evaluations, failures, device, options.save_dir)
        print("\n" + text)
    if options.figures != "none":
        print(f"\nfigures in {options.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


def evaluate_mode(mode: Mode, run: Run, items: Sequence[Item], device: torch.device) -> Evaluation:
    options, attack = mode.job.options, mode.job.attack
    pictures = read_pictures(run, items, options.res)
    return evaluate(
        pictures,
        dict(zip(options.model_name, attack.classifiers)),
        options.judges,
        device,
        written_results(run.rows, pictures, options.label_base),
        attack.class_names,
        attack.diffusion,
        options.fid_reference,
    )


def write_comparison(
    options: CompareOptions,
    modes: Sequence[Mode],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    failures: list[str],
    device: torch.device,
    folder: Path,
) -> str:
    """Compares modes and writes comparison.md, .tex, .json and .csv and the figures into a folder; returns
    the tables as text.
    """
    names = [mode.name for mode in modes]
    comparison = compare_runs(
        names, runs, evaluations, [weights_of(mode, run) for mode, run in zip(modes, runs)], failures
    )
    add_curves(comparison, dict(zip(names, runs)), bool(evaluations[0].transfers))
    write_texts(
        folder,
        {
            "comparison.md": markdown(
                "Comparison of timestep weights", comparison.sections, comparison.remarks
            ),
            # without the notes
            "comparison.tex": latex([row[:-1] for row in comparison.sections[0][1]], comparison.caption),
            "comparison.json": json.dumps(comparison.results | provenance(options, device), indent=2),
            "comparison.csv": csv_text(
                comparison.names, [run.rows for run in runs], evaluations, options.label_base
            ),
        },
    )
    if options.figures != "none":
        draw(comparison.names, runs, evaluations, folder, each_image=options.figures == "all")
    return as_text(comparison.sections, comparison.remarks)


def add_curves(comparison: Comparison | SweepReport, runs: Mapping[str, Run], has_transfer: bool) -> None:
    """Compares runs at equal visibility over their iterations, where pictures were judged on the way."""
    curves = {name: curve_points(run) for name, run in runs.items()}
    if not all(curves.values()):
        return
    for name, points in curves.items():
        comparison.sections.append((f"{name}, after so many iterations", point_rows(points)))
    comparison.results["curves"] = {name: curve_dicts(points) for name, points in curves.items()}
    if has_transfer:
        pairs = compare_curves(
            {name: curve_of([point.evaluation for point in points]) for name, points in curves.items()}
        )
        comparison.sections.append(("At equal visibility, over the iterations", pair_rows(pairs)))
        comparison.results["at_equal_visibility_over_iterations"] = [pair.as_dict() for pair in pairs]


def write_sweep(
    options: CompareOptions,
    modes: Sequence[Mode],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    failures: list[str],
    device: torch.device,
) -> None:
    """Compares the modes of each value as without a sweep, then their curves over all values, and writes
    sweep.md, .tex, .json and .csv and the figure.
    """
    sweep, points, alone = options.sweep, {}, {}
    for mode, run, evaluation in zip(modes, runs, evaluations):
        point = Point(mode.name, mode.value, run, evaluation)
        if sweep.modes_are_one(mode.value):
            alone[mode.value] = point
        else:
            points.setdefault(mode.name, {})[mode.value] = point
    for value in sweep.values:
        at_value = [k for k, mode in enumerate(modes) if mode.value == value]
        if len(at_value) > 1:
            chosen = ([parts[k] for k in at_value] for parts in (modes, runs, evaluations))
            write_comparison(options, *chosen, failures, device, options.save_dir / sweep.folder(value))
    curves = {
        name: [(alone | by_value)[value] for value in sweep.values] for name, by_value in points.items()
    }
    found = report_sweep(sweep, curves, failures)
    each = {f"{mode.name}, {sweep.flag} {mode.value:g}": run for mode, run in zip(modes, runs)}
    add_curves(found, each, bool(evaluations[0].transfers))
    write_texts(
        options.save_dir,
        {
            "sweep.md": markdown(f"Sweep of {sweep.flag}", found.sections, found.remarks),
            "sweep.tex": latex(found.sections[0][1], found.remarks[0]),
            "sweep.json": json.dumps(found.results | provenance(options, device), indent=2),
            "sweep.csv": sweep_csv(curves),
        },
    )
    print("\n" + as_text(found.sections, found.remarks))
    if options.figures != "none":
        (options.save_dir / ANALYSIS).mkdir(exist_ok=True)
        title = f"Attack success against visibility, by {sweep.flag}"
        save_figure(plot_tradeoff(found.rates, title), options.save_dir / ANALYSIS / "sweep")
        for name, figure in draw_tradeoff(each):
            save_figure(figure, options.save_dir / ANALYSIS / name)


def weights_of(mode: Mode, run: Run) -> ModeWeights:
    end = weights_at_the_end(mode.job.attack, run)
    return ModeWeights(mode.weights_at_start.tolist(), end.tolist(), effective_timesteps(end))


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
    draw_folders(runs, named_schedules, each_image, anew=False)
    draw_comparison(dict(zip(names, runs)), named_schedules, folder)
    measure = "LPIPS" if "LPIPS" in evaluations[0].quality else "SSIM"
    points = success_points(names, evaluations, measure)
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
