"""What ends a comparison: tables in three formats, figures, and the pages."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tqdm import tqdm

from diffattack.data.dataset import Item
from diffattack.data.images import Pictures
from diffattack.data.records import ANALYSIS, Run, json_text, read_run
from diffattack.evaluation.comparison import Comparison, compare_runs, success_points
from diffattack.evaluation.curves import (
    CurvePoint,
    compare_curves,
    curve_dicts,
    curve_of,
    curve_points,
    pair_rows,
    point_rows,
    scaled_points,
)
from diffattack.evaluation.human_study import KEY, judging_section, read_study
from diffattack.evaluation.published import published_dicts, published_remarks, published_sections
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.sweep import Point, SweepReport, report_sweep
from diffattack.evaluation.tables import as_text, cost_rows, latex, markdown
from diffattack.evaluation.weights import add_weights, weight_movement
from diffattack.plotting.comparison_page import write_comparison_page
from diffattack.plotting.draw import draw_comparison, draw_folders, draw_tradeoff, save_figure
from diffattack.plotting.figures import plot_success_against_visibility, plot_tradeoff
from diffattack.plotting.judging_page import write_judging_page
from diffattack.runner.compare import CompareOptions, Entry
from diffattack.runner.folder import provenance, read_failures, unattempted
from diffattack.runner.jobs import Job
from diffattack.runner.judge import CHUNK, judge_all
from diffattack.runner.report import weights_at_the_end, write_run, write_texts
from diffattack.runner.setup import Experiment
from timestep_weights import named_schedules


def report_comparison(
    experiment: Experiment,
    options: CompareOptions,
    entries: Sequence[Entry],
    jobs: Sequence[Job],
    items: Sequence[Item],
) -> int:
    """Compares what is in the folders, writes it, and prints the table; returns the exit code."""
    failures = [
        f"{entry.name}{'' if entry.value is None else f' at {entry.value:g}'}: {failure}"
        for entry, job in zip(entries, jobs)
        for failure in read_failures(job.layout, items)
    ]
    left = {item for job in jobs for item in unattempted(items, job.layout)}
    # after what is left, so that none is missed that another shard finishes meanwhile
    in_all = {item.index for item in items}.intersection(*(job.layout.finished() for job in jobs))
    compared = [item for item in items if item.index in in_all]
    if left and not options.merge:
        print(
            f"still to be attacked: {len(left)} images, by the same command without --shard or by "
            f"its other shards; with --merge it compares those that are done"
        )
        return 1 if failures else 0
    if not compared:
        print("\n".join(["no image was attacked in every mode, so there is nothing to compare", *failures]))
        return 1
    found = []
    for entry, job in zip(entries, jobs):
        judge_all(experiment, job.options, job.files, compared, job.judges)
        evaluation = write_run(job, compared)
        run = read_run(job.layout.folder, in_all)
        has_curve = options.attacks and not options.sweep
        curve = curve_of_attack(entry.name, job, compared, evaluation) if has_curve else []
        found.append(Compared(entry.name, entry.value, job, run, evaluation, curve))
    if options.sweep:
        write_sweep(options, found, failures)
    else:
        print("\n" + write_comparison(options, found, failures, options.save_dir))
    if options.figures != "none":
        print(f"\nfigures in {options.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


@dataclass(frozen=True)
class Compared:
    """A mode or attack, in a sweep at one of its values, and what was found of it."""

    name: str
    value: float | None
    job: Job
    run: Run
    evaluation: Evaluation
    curve: list[CurvePoint]  # over parts of the change, of attacks alone


def curve_of_attack(name: str, job: Job, items: Sequence[Item], evaluation: Evaluation) -> list[CurvePoint]:
    """Of parts of each picture's change."""
    with tqdm(total=len(items), desc=f"parts, {name}", unit="image", delay=1, leave=False) as bar:

        def chunks() -> Iterator[Pictures]:
            for start in range(0, len(items), CHUNK):
                chunk = items[start : start + CHUNK]
                yield job.files.read(chunk)
                bar.update(len(chunk))

        return scaled_points(chunks(), evaluation, job.judges)


def write_comparison(
    options: CompareOptions, each: Sequence[Compared], failures: list[str], folder: Path
) -> str:
    """Compares modes or attacks and writes comparison.md, .tex, .json and .csv, the figures and the pages
    into a folder; returns the tables as text.
    """
    runs, evaluations = {one.name: one.run for one in each}, [one.evaluation for one in each]
    title = "attacks" if len({one.job.options.attack for one in each}) > 1 else "timestep weights"
    title, has_transfer = f"Comparison of {title}", bool(evaluations[0].transfers)
    comparison = compare_runs(list(runs), list(runs.values()), evaluations, failures)
    if all(run.timesteps for run in runs.values()):
        ends = [weights_at_the_end(one.job.options, one.run) for one in each]
        moved = [weight_movement(run, end) for run, end in zip(runs.values(), ends)]
        add_weights(comparison, list(runs.values()), moved)
    add_curves(comparison, {name: curve_points(run) for name, run in runs.items()}, ITERATIONS, has_transfer)
    curves = {one.name: one.curve for one in each}
    add_curves(comparison, curves, PARTS, has_transfer)
    add_what_others_found(comparison, options)
    sources = provenance(options, each[0].job.judges.device)
    write_texts(
        folder,
        {
            "comparison.json": json_text(comparison.results | sources, indent=2),
            "comparison.md": markdown(title, comparison.sections, comparison.remarks),
            # without the notes
            "comparison.tex": latex([row[:-1] for row in comparison.sections[0][1]], comparison.caption),
            "comparison.csv": joined_tables({(one.name,): one.job for one in each}, ["mode"]),
        },
    )
    if options.figures != "none":
        draw(options, runs, evaluations, folder)
        if all(curves.values()):
            rates = {name: [point.figures for point in points] for name, points in curves.items()}
            figure = plot_tradeoff(rates, "Attack success against visibility, by parts of the change")
            save_figure(figure, folder / ANALYSIS / "tradeoff")
        write_comparison_page(folder, title, runs, comparison.sections, comparison.remarks)
    if options.page:
        trials = write_judging_page(folder, runs, options.seed)
        where = f"in {folder / 'judging.html'}" if trials else "since no two pictures differ"
        print(f"\n{trials} pairs of pictures to judge {where}")
    return as_text(comparison.sections, comparison.remarks)


def joined_tables(jobs: Mapping[tuple[str, ...], Job], titles: Sequence[str]) -> str:
    """The images.csv of several runs below each other, with these columns in front."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for k, (cells, job) in enumerate(jobs.items()):
        with open(job.layout.folder / "images.csv", encoding="utf-8", newline="") as file:
            heading, *rows = csv.reader(file)
        writer.writerows([[*titles, *heading]] if k == 0 else [])
        writer.writerows([*cells, *row] for row in rows)
    return out.getvalue()


# how curves of one kind are told: what numbers the points, titles of the two tables, keys of the JSON
ITERATIONS = (
    "iteration",
    "after so many iterations",
    "over the iterations",
    "curves",
    "at_equal_visibility_over_iterations",
)
PARTS = (
    "% of the change",
    "with parts of the change",
    "over parts of the change",
    "curves_over_parts",
    "at_equal_visibility",
)


def add_curves(
    comparison: Comparison | SweepReport,
    curves: Mapping[str, list[CurvePoint]],
    told: tuple[str, str, str, str, str],
    has_transfer: bool,
) -> None:
    """Compares runs at equal visibility over the points of their curves, where they have some."""
    if not all(curves.values()):
        return
    counted, of_points, of_pairs, key, key_of_pairs = told
    for name, points in curves.items():
        comparison.sections.append((f"{name}, {of_points}", point_rows(points, counted)))
    comparison.results[key] = {name: curve_dicts(points, counted) for name, points in curves.items()}
    if has_transfer:
        by_name = {name: curve_of([point.evaluation for point in points]) for name, points in curves.items()}
        pairs = compare_curves(by_name)
        comparison.sections.append((f"At equal visibility, {of_pairs}", pair_rows(pairs)))
        comparison.results[key_of_pairs] = [pair.as_dict() for pair in pairs]


def add_what_others_found(comparison: Comparison | SweepReport, options: CompareOptions) -> None:
    """Adds what people chose on the page for judging, and what papers report, if that is asked for."""
    if options.judged:
        attacks, judgements = read_study(options.judged, options.save_dir / KEY)
        comparison.sections.append(judging_section(judgements, attacks))
        comparison.results["judged"] = [
            {"attacks": [one.left, one.right], "image": one.image, "nearer": one.nearer} for one in judgements
        ]
    if options.published:
        comparison.sections.extend(published_sections(options.model_name))
        comparison.remarks.extend(published_remarks(options.model_name))
        comparison.results["published"] = published_dicts(options.model_name)


def write_sweep(options: CompareOptions, each: Sequence[Compared], failures: list[str]) -> None:
    """Compares the modes of each value as without a sweep, then their curves over all values, and writes
    sweep.md, .tex, .json and .csv and the figure.
    """
    sweep, points, alone = options.sweep, {}, {}
    for one in each:
        point = Point(one.name, one.value, one.run, one.evaluation)
        if sweep.modes_are_one(one.value):
            alone[one.value] = point
        else:
            points.setdefault(one.name, {})[one.value] = point
    for value in sweep.values:
        at_value = [one for one in each if one.value == value]
        if len(at_value) > 1:
            write_comparison(options, at_value, failures, options.save_dir / sweep.folder(value))
    curves = {
        name: [(alone | by_value)[value] for value in sweep.values] for name, by_value in points.items()
    }
    found = report_sweep(sweep, curves, failures)
    runs = {f"{one.name}, {sweep.flag} {one.value:g}": one.run for one in each}
    over_iterations = {name: curve_points(run) for name, run in runs.items()}
    add_curves(found, over_iterations, ITERATIONS, bool(each[0].evaluation.transfers))
    found.sections.append(("Costs", cost_rows({name: list(run.rows) for name, run in runs.items()})))
    add_what_others_found(found, options)
    sources = provenance(options, each[0].job.judges.device)
    write_texts(
        options.save_dir,
        {
            "sweep.json": json_text(found.results | sources, indent=2),
            "sweep.md": markdown(f"Sweep of {sweep.flag}", found.sections, found.remarks),
            "sweep.tex": latex(found.sections[0][1], found.remarks[0]),
            "sweep.csv": joined_tables(
                {(one.name, f"{one.value:g}"): one.job for one in each}, ["mode", sweep.flag]
            ),
        },
    )
    print("\n" + as_text(found.sections, found.remarks))
    if options.figures != "none":
        (options.save_dir / ANALYSIS).mkdir(exist_ok=True)
        title = f"Attack success against visibility, by {sweep.flag}"
        save_figure(plot_tradeoff(found.rates, title), options.save_dir / ANALYSIS / "sweep")
        for name, figure in draw_tradeoff(runs):
            save_figure(figure, options.save_dir / ANALYSIS / name)


def draw(
    options: CompareOptions, runs: Mapping[str, Run], evaluations: Sequence[Evaluation], folder: Path
) -> None:
    """The figures of each mode in its own folder, and those that compare the modes in that of the
    comparison.
    """
    each, images = options.figures == "all", options.figure_images
    draw_folders(list(runs.values()), named_schedules, each, anew=False, figure_images=images)
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    if all(run.timesteps for run in runs.values()):
        draw_comparison(runs, named_schedules, folder)
    measure = "LPIPS" if "LPIPS" in evaluations[0].quality else "SSIM"
    figure = plot_success_against_visibility(success_points(list(runs), evaluations, measure), measure)
    save_figure(figure, folder / ANALYSIS / "success_against_visibility")
