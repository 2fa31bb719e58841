"""What ends a comparison: tables in three formats, figures, and the pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffattack.common.progress import progress
from diffattack.data.dataset import Item
from diffattack.data.images import Pictures
from diffattack.data.records import ANALYSIS, Run, read_run
from diffattack.evaluation.comparison import Comparison, compare_runs, csv_text, success_points
from diffattack.evaluation.costs import cost_rows
from diffattack.evaluation.curves import CurvePoint, curve_dicts, curve_points, point_rows
from diffattack.evaluation.evaluate import Evaluation
from diffattack.evaluation.judging import KEY, judging_section, read_judgements, read_key
from diffattack.evaluation.published import published_dicts, published_remarks, published_sections
from diffattack.evaluation.scaled import scaled_points
from diffattack.evaluation.sweep import (
    Point,
    SweepReport,
    compare_curves,
    curve_of,
    pair_rows,
    report_sweep,
    sweep_csv,
)
from diffattack.evaluation.tables import as_text, latex, markdown
from diffattack.evaluation.weights import add_weights, weight_movement
from diffattack.plotting.comparison_page import write_comparison_page
from diffattack.plotting.draw import draw_comparison, draw_folders, draw_tradeoff, save_figure
from diffattack.plotting.figures import plot_success_against_visibility, plot_tradeoff
from diffattack.plotting.judging_page import write_judging_page
from diffattack.runner.compared import CompareOptions, Mode
from diffattack.runner.folder import provenance, read_failures, unattempted, write_texts
from diffattack.runner.judges import CHUNK, Judging, judge_all, judging_of
from diffattack.runner.summary import weights_at_the_end
from diffattack.runner.task import Task
from timestep_weights import named_schedules


def report(task: Task, options: CompareOptions, modes: Sequence[Mode], items: Sequence[Item]) -> int:
    """Compares what is in the folders, writes it, and prints the table; returns the exit code."""
    device = task.device
    failures = [
        f"{mode.name}{'' if mode.value is None else f' at {mode.value:g}'}: {failure}"
        for mode in modes
        for failure in read_failures(mode.job.layout, items)
    ]
    left = {item for mode in modes for item in unattempted(items, mode.job.layout)}
    # after what is left, as in main.py, so that none is missed that another shard finishes meanwhile
    in_all = {item.index for item in items}.intersection(*(mode.job.layout.finished() for mode in modes))
    compared = [item for item in items if item.index in in_all]
    if left:
        print(
            f"still to be attacked: {len(left)} images, by the same command without --shard or by "
            f"its other shards"
        )
        return 1 if failures else 0
    if not compared:
        print("\n".join(["no image was attacked in every mode, so there is nothing to compare", *failures]))
        return 1
    runs = [read_run(mode.job.layout.folder, in_all) for mode in modes]
    evaluations, curves, has_curves = [], [], options.attacks and not options.sweep
    for mode in modes:
        elsewhere = None if mode is modes[0] else modes[0].job.layout
        judging = judging_of(task, mode.job.options, elsewhere, mode.job.attack.diffusion)
        given = dict(zip(judging.asked.surrogates, mode.job.attack.classifiers))
        judge_all(judging, compared, given, mode.job.options.processes)
        evaluations.append(judging.evaluate(compared)[0])
        curves.append(curve_of_attack(mode, judging, compared, evaluations[-1]) if has_curves else None)
    if options.sweep:
        write_sweep(options, modes, runs, evaluations, failures, device)
    else:
        found = (modes, runs, evaluations, curves)
        print("\n" + write_comparison(options, *found, failures, device, options.save_dir))
    if options.figures != "none":
        print(f"\nfigures in {options.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


def curve_of_attack(
    mode: Mode, judging: Judging, items: Sequence[Item], evaluation: Evaluation
) -> list[CurvePoint]:
    """Of parts of each picture's change."""
    surrogates = dict(zip(judging.asked.surrogates, mode.job.attack.classifiers))
    with progress(total=len(items), desc=f"parts of the change, {mode.name}", unit="image") as bar:

        def chunks() -> Iterator[Pictures]:
            for start in range(0, len(items), CHUNK):
                chunk = items[start : start + CHUNK]
                yield judging.read_pictures(chunk)
                bar.update(len(chunk))

        return scaled_points(chunks(), evaluation, surrogates, judging.device, judging.asked.class_names)


def write_comparison(
    options: CompareOptions,
    modes: Sequence[Mode],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    curves: Sequence[list[CurvePoint] | None],
    failures: list[str],
    device: torch.device,
    folder: Path,
) -> str:
    """Compares modes or attacks and writes comparison.md, .tex, .json and .csv, the figures and the pages
    into a folder; returns the tables as text.
    """
    names, has_transfer = [mode.name for mode in modes], bool(evaluations[0].transfers)
    comparison = compare_runs(names, runs, evaluations, failures)
    if all(run.timesteps for run in runs):
        ends = (weights_at_the_end(mode.job.attack, run).numpy() for mode, run in zip(modes, runs))
        add_weights(comparison, runs, [weight_movement(run, end) for run, end in zip(runs, ends)])
    add_curves(
        comparison,
        {name: curve_points(run.rows, run.configuration) for name, run in zip(names, runs)},
        ITERATIONS,
        has_transfer,
    )
    if all(curves):
        add_curves(comparison, dict(zip(names, curves)), PARTS, has_transfer)
    add_what_others_say(comparison, options)
    write_texts(
        folder,
        {
            # first, since it says that the others are this tool's
            "comparison.json": json.dumps(comparison.results | provenance(options, device), indent=2),
            "comparison.md": markdown(title_of(modes), comparison.sections, comparison.remarks),
            # without the notes
            "comparison.tex": latex([row[:-1] for row in comparison.sections[0][1]], comparison.caption),
            "comparison.csv": csv_text(
                comparison.names, [run.rows for run in runs], evaluations, options.label_base
            ),
        },
    )
    if options.figures != "none":
        draw(options, comparison.names, runs, evaluations, folder)
        if all(curves):
            rates = {name: [point.figures for point in points] for name, points in zip(names, curves)}
            title = "Attack success against visibility, by parts of the change"
            save_figure(plot_tradeoff(rates, title), folder / ANALYSIS / "tradeoff")
        shown = dict(zip(names, runs))
        write_comparison_page(folder, title_of(modes), shown, comparison.sections, comparison.remarks)
    if options.page:
        trials = write_judging_page(folder, dict(zip(names, runs)), options.seed)
        where = f"in {folder / 'judging.html'}" if trials else "since no two pictures differ"
        print(f"\n{trials} pairs of pictures to judge {where}")
    return as_text(comparison.sections, comparison.remarks)


@dataclass(frozen=True)
class Told:
    """How curves of one kind are told."""

    counted: str  # what numbers the points
    points: str  # after so many iterations, say
    pairs: str
    key: str  # in the JSON
    key_of_pairs: str


ITERATIONS = Told(
    "iteration",
    "after so many iterations",
    "over the iterations",
    "curves",
    "at_equal_visibility_over_iterations",
)
PARTS = Told(
    "% of the change",
    "with parts of the change",
    "over parts of the change",
    "curves_over_parts",
    "at_equal_visibility",
)


def add_curves(
    comparison: Comparison | SweepReport,
    curves: Mapping[str, list[CurvePoint]],
    told: Told,
    has_transfer: bool,
) -> None:
    """Compares runs at equal visibility over the points of their curves, where they have some."""
    if not all(curves.values()):
        return
    for name, points in curves.items():
        comparison.sections.append((f"{name}, {told.points}", point_rows(points, told.counted)))
    dicts = {name: curve_dicts(points, told.counted) for name, points in curves.items()}
    comparison.results[told.key] = dicts
    if has_transfer:
        pairs = compare_curves(
            {name: curve_of([point.evaluation for point in points]) for name, points in curves.items()}
        )
        comparison.sections.append((f"At equal visibility, {told.pairs}", pair_rows(pairs)))
        comparison.results[told.key_of_pairs] = [pair.as_dict() for pair in pairs]


def add_what_others_say(comparison: Comparison | SweepReport, options: CompareOptions) -> None:
    """Adds what people chose on the page for judging, and what papers report, if that is asked for."""
    if options.judged:
        key = read_key(options.save_dir / KEY)
        judgements = [one for path in options.judged for one in read_judgements(path, key)]
        comparison.sections.append(judging_section(judgements, key.attacks))
        comparison.results["judged"] = [
            {"attacks": [one.trial.left, one.trial.right], "image": one.trial.image, "nearer": one.nearer}
            for one in judgements
        ]
    if options.published:
        comparison.sections.extend(published_sections(options.model_name))
        comparison.remarks.extend(published_remarks(options.model_name))
        comparison.results["published"] = published_dicts(options.model_name)


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
            alike = (modes, runs, evaluations, [None] * len(modes))
            chosen = ([parts[k] for k in at_value] for parts in alike)
            write_comparison(options, *chosen, failures, device, options.save_dir / sweep.folder(value))
    curves = {
        name: [(alone | by_value)[value] for value in sweep.values] for name, by_value in points.items()
    }
    found = report_sweep(sweep, curves, failures)
    each = {f"{mode.name}, {sweep.flag} {mode.value:g}": run for mode, run in zip(modes, runs)}
    points_of = {name: curve_points(run.rows, run.configuration) for name, run in each.items()}
    add_curves(found, points_of, ITERATIONS, bool(evaluations[0].transfers))
    found.sections.append(("Costs", cost_rows({name: run.rows for name, run in each.items()})))
    add_what_others_say(found, options)
    write_texts(
        options.save_dir,
        {
            "sweep.json": json.dumps(found.results | provenance(options, device), indent=2),
            "sweep.md": markdown(f"Sweep of {sweep.flag}", found.sections, found.remarks),
            "sweep.tex": latex(found.sections[0][1], found.remarks[0]),
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


def title_of(modes: Sequence[Mode]) -> str:
    return "Comparison of " + (
        "attacks" if len({m.job.options.attack for m in modes}) > 1 else "timestep weights"
    )


def draw(
    options: CompareOptions,
    names: Sequence[str],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    folder: Path,
) -> None:
    """The figures of each mode in its own folder, and those that compare the modes in that of the
    comparison.
    """
    each_image = options.figures == "all"
    draw_folders(runs, named_schedules, each_image, anew=False, figure_images=options.figure_images)
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    if all(run.timesteps for run in runs):
        draw_comparison(dict(zip(names, runs)), named_schedules, folder)
    measure = "LPIPS" if "LPIPS" in evaluations[0].quality else "SSIM"
    points = success_points(names, evaluations, measure)
    save_figure(
        plot_success_against_visibility(points, measure), folder / ANALYSIS / "success_against_visibility"
    )
