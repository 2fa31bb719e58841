"""A comparison: its flags, what `main.py` would be called with for each mode or attack, and what ends it:
tables in three formats, figures, and the pages.
"""

import argparse
import csv
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from io import StringIO
from pathlib import Path

from diffattack.attacks.library import OURS, attack_names, parse_attack
from diffattack.common.errors import InputError
from diffattack.common.flags import flag
from diffattack.common.parallel import this_process
from diffattack.data.dataset import Item
from diffattack.data.records import ANALYSIS, Run, json_text
from diffattack.evaluation.comparison import add_weights, compare_runs, weight_movement
from diffattack.evaluation.curves import (
    Points,
    Sweep,
    compare_curves,
    curve_dicts,
    curve_of,
    curve_points,
    figures_of,
    pair_rows,
    parse_sweep,
    report_sweep,
    scaled_points,
)
from diffattack.evaluation.other_sources import (
    KEY,
    PUBLISHED_REMARK,
    judging_section,
    published,
    published_section,
    read_study,
)
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.tables import Report, as_text, cost_rows, figure_rows, latex, markdown
from diffattack.options import BY_ATTACK, DEFAULTS, FOR_ALL, AttackOptions, Options, flags_of_ours
from diffattack.plotting.comparison_pages import write_comparison_page, write_judging_page
from diffattack.plotting.draw import (
    draw_equally_visible,
    draw_folders,
    draw_runs,
    draw_tradeoff,
    save_figures,
)
from diffattack.plotting.figures import plot_tradeoff
from diffattack.runner.folder import counted, figure_files, provenance, read_failures, unattempted
from diffattack.runner.jobs import Job
from diffattack.runner.judge import all_judged, judge_all
from diffattack.runner.report import weights_at_the_end, write_run, write_texts
from diffattack.runner.setup import Experiment
from timestep_weights import SCHEDULES, STUDY_MODES, WEIGHT_MODES, named_schedules


def parse_modes(text: str) -> list[tuple[str, str]]:
    """Modes with their schedules from "uniform,fixed:increasing"; `fixed` alone takes the schedule
    `learned`.
    """
    modes = []
    for part in text.split(","):
        mode, _, schedule = part.strip().partition(":")
        if mode not in WEIGHT_MODES or (schedule and (mode != "fixed" or schedule not in SCHEDULES)):
            raise argparse.ArgumentTypeError(
                f"unknown mode {part.strip()!r}; expected some of {', '.join(WEIGHT_MODES)}, or fixed:NAME "
                f"with one of {', '.join(SCHEDULES)}"
            )
        modes.append((mode, schedule or "learned"))
    if len(modes) < 2 or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError("expected at least two modes, none of them twice")
    return modes


def name_of(mode: str, schedule: str) -> str:
    return f"{mode}:{schedule}" if mode == "fixed" and schedule != "learned" else mode


DEFAULT_MODES = ",".join(STUDY_MODES)


def paths(text: str) -> tuple[Path, ...]:
    """Files that a flag lists, separated by commas."""
    return tuple(Path(part.strip()) for part in text.split(",") if part.strip())


# what a comparison decides itself, or leaves to one run
OF_MAIN = ("attack", "weight_mode", "weight_schedule", "check", "is_test", "overwrite")


@dataclass
class CompareOptions(Options):
    """The flags of main.py, and those of a comparison."""

    title = "comparison"
    common = (*(name for name in Options.common if name not in OF_MAIN), "modes", "attacks", "sweep")
    common += ("published", "page", "judged")

    modes: list[tuple[str, str]] | str = flag(
        DEFAULT_MODES,
        f"weight modes, separated by commas: {', '.join(WEIGHT_MODES)}; fixed:NAME names a schedule",
        "MODES",
        parse=parse_modes,
    )
    attacks: tuple[str, ...] = flag(
        (),
        "instead of modes: attacks as --attack takes them, separated by commas, such as "
        "diffattack,torchattack:PGD,torchattack:DIFGSM(steps=20)",
        "ATTACKS",
        parse=attack_names,
    )
    sweep: Sweep | None = flag(
        None,
        "every mode or attack at several values of a flag that takes a number, or at several budgets, such "
        "as structure_share=0,0.1,0.3 or budget=psnr=40,36.5,33, compared at equal visibility",
        "FLAG=A,B,...",
        parse=functools.partial(parse_sweep, AttackOptions),
    )
    published: bool = flag(False, "print what papers report for the same surrogates below, not run here")
    page: bool = flag(
        False,
        "write judging.html, where a person chooses between two attacks' pictures without their names",
    )
    judged: tuple[Path, ...] = flag(
        (), "choices that judging.html saved, separated by commas", "FILES", parse=paths
    )

    def __post_init__(self) -> None:
        self.given = {name: getattr(self, name) for name in BY_ATTACK}
        super().__post_init__()


@dataclass(frozen=True)
class Entry:
    """A mode or attack before it is loaded, in a sweep at one of its values."""

    name: str
    value: float | None
    options: Options  # what `main.py` would be called with


def check_options(options: CompareOptions) -> None:
    """Raises InputError for flags of main.py that a comparison does not take, and for those of a comparison
    that do not go together.
    """
    for name in OF_MAIN:
        if getattr(options, name) != Options.__dataclass_fields__[name].default:
            raise InputError(f"--{name} is for main.py; a comparison takes --modes or --attacks")
    if this_process().world_size > 1:
        raise InputError("accelerate launch is for main.py; a comparison takes --processes and --shard")
    if options.attacks and options.modes != parse_modes(DEFAULT_MODES):
        raise InputError("--modes are of one attack, --attacks compares several; give one of them")
    sweep = options.sweep
    if sweep and sweep.flag == "self_attn_loss_weight" and options.structure_share is not None:
        raise InputError("--structure_share replaces --self_attn_loss_weight, so that a sweep of it is idle")
    if sweep and options.attacks and sweep.flag not in FOR_ALL:
        raise InputError(
            f"--sweep {sweep.flag} is of {OURS} alone; with --attacks sweep what all of them know, such as "
            f"budget=psnr=40,36.5,33"
        )
    if sweep and (options.page or options.judged):
        raise InputError("--page and --judged are of one comparison; leave --sweep out")
    if options.judged:  # before hours of attacks, rather than after
        read_study(options.judged, options.save_dir / KEY)


def comparison_folders(experiment: Experiment, options: CompareOptions) -> dict[Path, dict]:
    """The folder of a comparison, and in a sweep those of its values, with what run.json holds there."""
    configuration = {
        "comparison": "sweep" if options.sweep else "attacks" if options.attacks else "modes",
        "images": [str(item.path.relative_to(options.images_root)) for item in experiment.items],
        "labels": [counted(item.labels, options.label_base) for item in experiment.items],
    }
    values = options.sweep.values if options.sweep else ()
    inside = [options.save_dir / options.sweep.folder(value) for value in values]
    return dict.fromkeys((options.save_dir, *inside), configuration)


def reports_in(folder: Path) -> Iterator[Path]:
    """Those there are of what a comparison writes."""
    endings = ("json", "md", "tex", "csv", "html")
    names = [f"{kind}.{ending}" for kind in ("comparison", "sweep") for ending in endings]
    yield from (folder / name for name in (*names, "judging.html", KEY) if (folder / name).exists())
    yield from figure_files(folder, ("success_against_visibility", "equally_visible", "sweep"))


def entries(options: CompareOptions) -> list[Entry]:
    """All that is compared; of modes that are the same attack, the first alone."""
    shared = Options(**{declared.name: getattr(options, declared.name) for declared in fields(Options)})
    compared, sweep = [], options.sweep
    for value in sweep.values if sweep else (None,):
        folder = options.save_dir / (sweep.folder(value) if sweep else "")
        swept = {sweep.flag: sweep.option(value)} if sweep else {}
        for name in options.attacks:
            # what only ours knows is left at its default for the others
            idle = {} if name == OURS else {flag: getattr(DEFAULTS, flag) for flag in flags_of_ours()}
            settings = options.given | idle | swept
            place = folder / parse_attack(name).folder
            compared.append(Entry(name, value, replace(shared, attack=name, save_dir=place, **settings)))
        for weight_mode, schedule in () if options.attacks else options.modes:
            name = name_of(weight_mode, schedule)
            settings = {"weight_mode": weight_mode, "weight_schedule": schedule} | swept
            place = folder / name.replace(":", "_")
            compared.append(Entry(name, value, replace(shared, save_dir=place, **settings)))
            if sweep and sweep.modes_are_one(value):
                break
    for entry in compared:
        entry.options.verify()
    return compared


# ---------------------------------------------------------------- what ends it

# what numbers the points of a curve, titles of the two tables, keys of the JSON
OVER_ITERATIONS = (
    "iteration",
    "after so many iterations",
    "over the iterations",
    "curves",
    "at_equal_visibility_over_iterations",
)
OVER_PARTS = (
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
        judge_all(experiment, job, compared)
        run, evaluation = write_run(job, compared)
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
        ends = (weights_at_the_end(one.run) for one in results)
        add_weights(report, runs, [weight_movement(run, end) for run, end in zip(runs.values(), ends)])
    add_curves(report, {name: curve_points(run) for name, run in runs.items()}, OVER_ITERATIONS)
    parts = {
        one.name: scaled_points(all_judged(one.job, items), one.evaluation, one.job.judges)
        for one in results
        if one.job.judges.parts
    }
    add_curves(report, parts, OVER_PARTS)
    add_other_sources(report, options)
    write_report(folder, "comparison", title, report, options, results)
    if options.figures != "none":
        draw(options, runs, evaluations, folder)
        if parts:
            rates = {name: [figures_of(one) for one in points.values()] for name, points in parts.items()}
            figure = plot_tradeoff(rates, "Attack success against visibility, by parts of the change")
            pictures = draw_equally_visible(runs, parts, options.seed)
            save_figures([("tradeoff", figure), ("equally_visible", pictures)], folder)
        write_comparison_page(folder, title, runs, report.sections, report.remarks)
    if options.page:
        trials = write_judging_page(folder, runs, options.seed)
        where = f"in {folder / 'judging.html'}" if trials else "since no two pictures differ"
        print(f"\n{trials} pairs of pictures to judge {where}")
    return report


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
    add_curves(report, {name: curve_points(run) for name, run in runs.items()}, OVER_ITERATIONS)
    report.sections.append(("Costs", cost_rows({name: list(run.rows) for name, run in runs.items()})))
    add_other_sources(report, options)
    write_report(options.save_dir, "sweep", f"Sweep of {sweep.flag}", report, options, results)
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
    told = {name: curve_dicts(points, counted) for name, points in curves.items()}
    report.sections.extend((f"{name}, {of_points}", figure_rows(lines)) for name, lines in told.items())
    report.results[key] = told
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
        "tex": latex(report.sections[0][1], report.caption),
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
    draw_folders(list(runs.values()), named_schedules, each, figure_images=images)
    measure = "LPIPS" if "LPIPS" in next(iter(evaluations.values())).quality else "SSIM"
    points = {name: [figures_of(one, [measure])] for name, one in evaluations.items()}
    figures = [("success_against_visibility", plot_tradeoff(points, f"Attack success against {measure}"))]
    if all(run.timesteps for run in runs.values()):
        figures += draw_runs(runs, named_schedules)
    save_figures(figures, folder)
