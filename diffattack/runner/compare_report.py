"""What ends a comparison: tables in three formats, figures, and the pages."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tqdm import tqdm

from diffattack.data.dataset import Item
from diffattack.data.records import ANALYSIS, Run, json_text, read_run
from diffattack.evaluation.comparison import Report, compare_runs, report_sweep
from diffattack.evaluation.curves import (
    Points,
    compare_curves,
    curve_dicts,
    curve_of,
    curve_points,
    figures_of,
    pair_rows,
    point_rows,
    scaled_points,
)
from diffattack.evaluation.human_study import KEY, judging_section, read_study
from diffattack.evaluation.published import PUBLISHED_REMARK, published, published_section
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.tables import as_text, cost_rows, latex, markdown
from diffattack.evaluation.weights import add_weights, weight_movement
from diffattack.plotting.comparison_pages import write_comparison_page, write_judging_page
from diffattack.plotting.draw import draw_folders, draw_runs, draw_tradeoff, save_figures
from diffattack.plotting.figures import plot_tradeoff
from diffattack.runner.compare import CompareOptions, Entry
from diffattack.runner.folder import provenance, read_failures, unattempted
from diffattack.runner.jobs import Job
from diffattack.runner.judge import CHUNK, judge_all
from diffattack.runner.report import weights_at_the_end, write_run, write_texts
from diffattack.runner.setup import Experiment
from timestep_weights import named_schedules

# what numbers the points of a curve, titles of the two tables, keys of the JSON
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


@dataclass(frozen=True)
class Result:
    """What was found of a mode or attack, in a sweep at one of its values."""

    name: str
    value: float | None
    job: Job
    run: Run
    evaluation: Evaluation


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
    results = []
    for entry, job in zip(entries, jobs):
        judge_all(experiment, job.options, job.files, compared, job.judges)
        evaluation = write_run(job, compared)
        run = read_run(job.layout.folder, in_all)
        results.append(Result(entry.name, entry.value, job, run, evaluation))
    if options.sweep:
        report = write_sweep(options, results, failures)
    else:
        report = write_comparison(options, results, failures, options.save_dir, compared)
    print("\n" + as_text(report.sections, report.remarks))
    if options.figures != "none":
        print(f"\nfigures in {options.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


def write_comparison(
    options: CompareOptions,
    results: Sequence[Result],
    failures: list[str],
    folder: Path,
    items: Sequence[Item] = (),
) -> Report:
    """Compares modes or attacks and writes comparison.md, .tex, .json and .csv, the figures and the pages
    into a folder; attacks, outside a sweep, over parts of the changes of these images, too.
    """
    runs, evaluations = ({one.name: getattr(one, what) for one in results} for what in ("run", "evaluation"))
    is_of_attacks = len({one.job.options.attack for one in results}) > 1
    title = f"Comparison of {'attacks' if is_of_attacks else 'timestep weights'}"
    report = compare_runs(runs, evaluations, failures)
    if all(run.timesteps for run in runs.values()):
        ends = (weights_at_the_end(one.job.options, one.run) for one in results)
        add_weights(report, runs, [weight_movement(run, end) for run, end in zip(runs.values(), ends)])
    add_curves(report, {name: curve_points(run) for name, run in runs.items()}, ITERATIONS)
    parts = {one.name: points_of(one, items) for one in results} if options.attacks and items else {}
    add_curves(report, parts, PARTS)
    add_other_sources(report, options)
    # the table of a paper goes without the notes
    paper_table = [row[:-1] for row in report.sections[0][1]]
    write_report(folder, "comparison", title, report, paper_table, options, results)
    if options.figures != "none":
        draw(options, runs, evaluations, folder)
        if parts:
            rates = {name: [figures_of(one) for one in points.values()] for name, points in parts.items()}
            figure = plot_tradeoff(rates, "Attack success against visibility, by parts of the change")
            save_figures([("tradeoff", figure)], folder)
        write_comparison_page(folder, title, runs, report.sections, report.remarks)
    if options.page:
        trials = write_judging_page(folder, runs, options.seed)
        where = f"in {folder / 'judging.html'}" if trials else "since no two pictures differ"
        print(f"\n{trials} pairs of pictures to judge {where}")
    return report


def points_of(result: Result, items: Sequence[Item]) -> Points:
    """Over parts of each picture's change."""
    starts, files = range(0, len(items), CHUNK), result.job.files
    steps = tqdm(starts, f"parts, {result.name}", unit=f"{CHUNK} images", delay=1, leave=False)
    chunks = (files.read(items[start : start + CHUNK]) for start in steps)
    return scaled_points(chunks, result.evaluation, result.job.judges)


def write_sweep(options: CompareOptions, results: Sequence[Result], failures: list[str]) -> Report:
    """Compares the modes of each value as without a sweep, then their curves over all values, and writes
    sweep.md, .tex, .json and .csv and the figure.
    """
    sweep, points, alone = options.sweep, {}, {}
    for one in results:
        by_value = alone if sweep.modes_are_one(one.value) else points.setdefault(one.name, {})
        by_value[one.value] = (one.run, one.evaluation)
    for value in sweep.values:
        at_value = [one for one in results if one.value == value]
        if len(at_value) > 1:
            write_comparison(options, at_value, failures, options.save_dir / sweep.folder(value))
    curves = {name: [(alone | of_mode)[value] for value in sweep.values] for name, of_mode in points.items()}
    report = report_sweep(sweep, curves, failures)
    runs = {f"{one.name}, {sweep.flag} {one.value:g}": one.run for one in results}
    add_curves(report, {name: curve_points(run) for name, run in runs.items()}, ITERATIONS)
    report.sections.append(("Costs", cost_rows({name: list(run.rows) for name, run in runs.items()})))
    add_other_sources(report, options)
    write_report(
        options.save_dir, "sweep", f"Sweep of {sweep.flag}", report, report.sections[0][1], options, results
    )
    if options.figures != "none":
        title = f"Attack success against visibility, by {sweep.flag}"
        figures = [("sweep", plot_tradeoff(report.results["figures"], title)), *draw_tradeoff(runs)]
        save_figures(figures, options.save_dir)
    return report


def add_curves(report: Report, curves: Mapping[str, Points], told: tuple[str, ...]) -> None:
    """Compares runs at equal visibility over the points of their curves, where they have some."""
    if not curves or not all(curves.values()):
        return
    counted, of_points, of_pairs, key, key_of_pairs = told
    report.sections.extend((f"{name}, {of_points}", point_rows(p, counted)) for name, p in curves.items())
    report.results[key] = {name: curve_dicts(points, counted) for name, points in curves.items()}
    if all(evaluation.transfers for points in curves.values() for evaluation in points.values()):
        pairs = compare_curves({name: curve_of(points.values()) for name, points in curves.items()})
        report.sections.append((f"At equal visibility, {of_pairs}", pair_rows(pairs)))
        report.results[key_of_pairs] = pairs


def add_other_sources(report: Report, options: CompareOptions) -> None:
    """Adds what people chose on the page for judging, and what papers report, if that is asked for."""
    if options.judged:
        attacks, judgements = read_study(options.judged, options.save_dir / KEY)
        report.sections.append(judging_section(judgements, attacks))
        report.results["judged"] = judgements
    if options.published:
        figures = published(options.model_name)
        report.sections.append(published_section(figures, options.model_name))
        report.remarks.append(PUBLISHED_REMARK)
        report.results["published"] = figures


def write_report(
    folder: Path,
    kind: str,
    title: str,
    report: Report,
    paper_table: list[list[str]],
    options: CompareOptions,
    results: Sequence[Result],
) -> None:
    """Writes it as JSON, Markdown and LaTeX, and as CSV the images.csv of all runs below each other, with the
    mode, and in a sweep the value, in front.
    """
    out, heads = StringIO(), ["mode", options.sweep.flag] if kind == "sweep" else ["mode"]
    writer = csv.writer(out, lineterminator="\n")
    for k, one in enumerate(results):
        with open(one.job.layout.folder / "images.csv", encoding="utf-8", newline="") as file:
            heading, *rows = csv.reader(file)
        cells = [one.name, f"{one.value:g}"] if kind == "sweep" else [one.name]
        writer.writerows([[*heads, *heading]] if k == 0 else [])
        writer.writerows([*cells, *row] for row in rows)
    sources = provenance(options, results[0].job.judges.device)
    contents = {
        "json": json_text(report.results | sources, indent=2),
        "md": markdown(title, report.sections, report.remarks),
        "tex": latex(paper_table, report.caption),
        "csv": out.getvalue(),
    }
    write_texts(folder, {f"{kind}.{ending}": text for ending, text in contents.items()})


def draw(
    options: CompareOptions, runs: Mapping[str, Run], evaluations: Mapping[str, Evaluation], folder: Path
) -> None:
    """The figures of each mode in its own folder, and those that compare the modes in that of the
    comparison.
    """
    each, images = options.figures == "all", options.figure_images
    draw_folders(list(runs.values()), named_schedules, each, anew=False, figure_images=images)
    measure = "LPIPS" if "LPIPS" in next(iter(evaluations.values())).quality else "SSIM"
    points = {name: [figures_of(one, [measure])] for name, one in evaluations.items()}
    figures = [("success_against_visibility", plot_tradeoff(points, f"Attack success against {measure}"))]
    if all(run.timesteps for run in runs.values()):
        figures += draw_runs(runs, named_schedules)
    save_figures(figures, folder)
