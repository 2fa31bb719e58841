"""Draws the figures of runs into their folders: those that are pooled over images, each image's in several
processes, and those that compare runs.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffattack.common.errors import note
from diffattack.common.progress import progress
from diffattack.common.workers import end_with_parent, interrupts_held
from diffattack.data.answers import deciding
from diffattack.data.images import replacing, write_image
from diffattack.data.records import ANALYSIS, ImageRecord, Run, read_pair
from diffattack.data.sample import FIGURE_IMAGES, Sample, choose
from diffattack.plotting.figures import (
    DPI,
    STYLE,
    plot_average_loss_per_timestep,
    plot_layer_shares,
    plot_loss_heatmap,
    plot_loss_per_timestep,
    plot_overlay,
    plot_tradeoff,
)
from diffattack.plotting.fonts import can_draw, give_fonts
from diffattack.plotting.image_figures import (
    LossCurves,
    plot_attention,
    plot_contact_sheet,
    plot_losses,
    short,
)
from diffattack.plotting.weight_figures import plot_weight_curves

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

SHEET = 12  # images on a page of contact sheets
# of a run, where there are timesteps, and of an image, of which the last alone is drawn without them
POOLED_FIGURES = (
    "weight_curves",
    "loss_per_timestep",
    "loss_heatmap",
    "average_loss_per_timestep",
    "layer_shares",
    "losses",
)
IMAGE_FIGURES = (*POOLED_FIGURES, "attention", "contact_sheet")

Schedules = Callable[[int], Mapping[str, np.ndarray]]  # of N timesteps, schedules `(N,)` by name


def draw_runs(runs: Mapping[str, Run], schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures that are pooled over images, by name; of several runs side by side, and on the same axes.

    Raises:
        ValueError: the runs have other timesteps or layers than each other.
    """
    first = next(iter(runs.values()))
    if not any(run.timesteps for run in runs.values()):
        return  # nothing to pool of attacks that know none
    timesteps, layers = first.timesteps, first.layers
    if any(run.timesteps != timesteps or run.layers != layers for run in runs.values()):
        raise ValueError(f"the runs {', '.join(runs)} differ in timesteps or layers; draw them one by one")
    everything = {name: run.pooled for name, run in runs.items()}
    timestep_losses = {name: pooled.structure.by_timestep for name, pooled in everything.items()}
    curves = {name: loss_curves(run) for name, run in runs.items()}
    images = {len(run.records) for run in runs.values()}
    yield (
        "weight_curves",
        plot_weight_curves(
            {name: pooled.weights for name, pooled in everything.items()},
            timesteps,
            schedules,
            images.pop() if len(images) == 1 else 1,
        ),
    )
    yield "loss_per_timestep", plot_loss_per_timestep(timestep_losses, timesteps)
    yield "loss_heatmap", plot_loss_heatmap(timestep_losses, timesteps)
    structure = {name: pooled.structure for name, pooled in everything.items()}
    yield "average_loss_per_timestep", plot_average_loss_per_timestep(structure, timesteps)
    yield "layer_shares", plot_layer_shares(before_and_after_norm(runs), timesteps, layers)
    yield "losses", plot_losses(curves)
    if len(runs) > 1:
        overlaid = {
            name: (structure[name], curve.losses[:, 0], curve.confidence) for name, curve in curves.items()
        }
        yield "overlay", plot_overlay(overlaid, timesteps)


def loss_curves(run: Run) -> LossCurves:
    pooled = run.pooled
    return LossCurves(
        pooled.losses,
        run.factors,
        pooled.confidence,
        pooled.fooled,
        run.gradient_shares_by_image,
        run.gradient_iterations,
    )


def before_and_after_norm(runs: Mapping[str, Run]) -> dict[str, np.ndarray]:
    """Losses by layer by name, summed over iterations, `(images, 1, N, L)`; of a run whose layers are
    normalised, also what they would have been without.
    """
    shown = {}
    for name, run in runs.items():
        by_layer = run.pooled.structure.by_layer
        if run.configuration["layer_norm"] == "mse":
            shown[name] = by_layer[:, None]
        else:
            shown[f"{name}, mse"] = (by_layer * run.pooled.reference_squares)[:, None]
            shown[f"{name}, relative"] = by_layer[:, None]
    return shown


def draw_tradeoff(runs: Mapping[str, Run]) -> Iterator[tuple[str, Figure]]:
    """Success over visibility of all images at several iterations, where pictures were judged on the way."""
    from diffattack.evaluation.curves import (
        curve_points,  # takes torch, which the processes that draw do without
    )

    if not all(map(has_curve, runs.values())):
        return
    rates = {
        name: [point.figures for point in curve_points(run.rows, run.configuration)]
        for name, run in runs.items()
    }
    if all(rates.values()):
        yield "tradeoff", plot_tradeoff(rates, "Attack success against visibility, by iteration")


def has_curve(run: Run) -> bool:
    """Whether pictures were judged on the way."""
    return bool(run.configuration.get("judge_at"))


def draw_image(run: Run, schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures of one image, by name; `run` has its record alone."""
    (record,) = run.records
    run = replace(run, records=[record])  # read once
    yield from draw_runs({short(record.row["file"]): run}, schedules)
    clean, adversarial = read_pair(run.layout, record.index)
    if run.timesteps:
        yield (
            "attention",
            plot_attention(
                clean, adversarial, record.class_tokens, record.class_attention, record.components
            ),
        )
    yield "contact_sheet", plot_contact_sheet([(clean, adversarial, *captions(record))])


def draw_contact_sheet(run: Run, reasons: Sequence[str]) -> Figure:
    """All images of `run` on a page, and why each was chosen, "" where there is nothing to say."""
    return plot_contact_sheet(
        [
            (*read_pair(run.layout, record.index), *captions(record, why))
            for record, why in zip(run.records, reasons)
        ]
    )


def captions(record: ImageRecord, why: str = "") -> tuple[str, str]:
    """What is said of the clean and of the adversarial picture; of a class whose name no font has, its
    number.
    """
    before, after = (
        side if can_draw(side["class"]) else side | {"class": f"class {side['label']}"}
        for side in (record.row["before"], record.row["after"])
    )
    chosen = f"; {why}, {record.row['psnr']:.1f} dB" if why else ""
    return (
        f"{short(record.row['file'])}\n{caption(before)}",
        f"{record.outcome}{chosen}:\n{caption(after)}",
    )


def caption(said: dict) -> str:
    """What a classifier says, as far as there is room."""
    name, probability = deciding(said)
    return f"{short(name)} {probability:.2f}"


def save_figure(figure: Figure, path: Path, pdf: bool = True, places: list | None = None) -> None:
    """Writes `path` with .png and, if wanted, with .pdf; without the date, so that the same figure is the
    same file.

    Args:
        places: of the panels, from `places_of` a figure with the same panels: finding them takes half of the
            time.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(STYLE):
        give_fonts(figure)
        figure.set_dpi(DPI)
        if places is not None:
            figure.set_layout_engine("none")
            for panel, place in zip(figure.axes, places, strict=True):
                panel.set_position(place)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once: savefig would do it twice
        write_image(
            np.asarray(canvas.buffer_rgba())[..., :3], path.with_name(path.name + ".png"), compress_level=2
        )
        if pdf:
            figure.set_layout_engine("none")  # it has been laid out
            content = io.BytesIO()  # matplotlib leaves a file that cannot be written in a traceback
            figure.savefig(content, format="pdf", metadata={"CreationDate": None})
            with replacing(path.with_name(path.name + ".pdf")) as temporary:
                temporary.write_bytes(content.getvalue())


def places_of(figure: Figure) -> list:
    """Where its layout puts the panels."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(STYLE):
        give_fonts(figure)
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return [panel.get_position(original=True) for panel in figure.axes]


# of the figures of each run's first image, by folder, name and number of panels, in a process of a pool
LAYOUTS: dict[tuple[Path, str, int], list] = {}


def save_image_figures(run: Run, first: Run, schedules: Mapping[str, np.ndarray], pdf: bool) -> int:
    """Draws the one image of `run`, in a process of a pool; returns how many figures.

    Its figures are laid out like those of the run's first image, `first`, so that they do not depend on which
    process draws which images, and when.
    """
    if not any(folder == run.folder for folder, _, _ in LAYOUTS):
        for name, figure in draw_image(first, schedules):
            LAYOUTS[run.folder, name, len(figure.axes)] = places_of(figure)
    (record,), count = run.records, 0
    for name, figure in draw_image(replace(run, records=[record]), schedules):
        path = run.folder / ANALYSIS / f"{record.index:04d}_{name}"
        save_figure(figure, path, pdf, LAYOUTS.get((run.folder, name, len(figure.axes))))
        count += 1
    return count


def save_contact_sheet(run: Run, page: int, reasons: Sequence[str]) -> int:
    """Draws all images of `run` on a page, in a process of a pool; returns how many figures, 1."""
    save_figure(draw_contact_sheet(run, reasons), run.folder / ANALYSIS / f"contact_sheet_{page}")
    return 1


def draw_folders(
    runs: Iterable[Run],
    schedules: Schedules,
    each_image: bool = True,
    anew: bool = True,
    pdf: bool = False,
    figure_images: int = FIGURE_IMAGES,
) -> None:
    """Draws the figures of runs into their ANALYSIS folders.

    Those that are pooled over all images are written as PNG and as PDF. Each image's, and the contact sheets,
    take most of the time and are drawn by several processes, of a sample of the images where there are more
    than `figure_images`; those of images that are no longer in it are deleted.

    Args:
        schedules: the reference lines of weight curves.
        each_image: whether to draw each image's.
        anew: also those that are there and up to date.
        pdf: each image's as PDF, too.
    """
    runs, work = list(runs), []
    lines = {run.folder: schedules(len(run.timesteps)) if run.timesteps else {} for run in runs}
    for run in runs:
        (run.folder / ANALYSIS).mkdir(exist_ok=True)
        sample = choose(run.pooled.psnr, figure_images, run.configuration.get("seed", 0))
        if sample.is_part:
            note(f"{sample}; --figure_images says how many")
        delete_others(run, sample)
        if each_image:
            work += works_of_images(run, sample, lines[run.folder], anew, pdf)
        work += works_of_sheets(run, sample)
    if not work:
        return
    total = sum(figures for figures, *_ in work) + sum(map(count_pooled, runs))
    pool = ProcessPoolExecutor(
        min(os.cpu_count() or 1, 16, len(work)),
        multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
    )
    try:
        with progress(total=total, desc="figures", unit="figure") as bar:
            with interrupts_held():  # submitting starts the processes
                submitted = [pool.submit(function, *arguments) for _, function, *arguments in work]
            for run in runs:
                named = {short(run.folder.absolute().name): run}
                for name, figure in chain(draw_runs(named, lines[run.folder]), draw_tradeoff(named)):
                    save_figure(figure, run.folder / ANALYSIS / name)
                    bar.update()
            for drawn in as_completed(submitted):
                bar.update(drawn.result())
    finally:  # after Ctrl-C, no more than what is being drawn is waited for
        pool.shutdown(wait=True, cancel_futures=True)


# of how many figures, by which function, with which arguments, all of them small
Work = tuple[Any, ...]


def works_of_images(
    run: Run, sample: Sample, schedules: Mapping[str, np.ndarray], anew: bool, pdf: bool
) -> list[Work]:
    """Each image's figures, of those images of which they are missing or `anew`."""
    figures = IMAGE_FIGURES if run.timesteps else IMAGE_FIGURES[-1:]
    code, first = newest_code(), run.of([0])
    return [
        (len(figures), save_image_figures, run.of([k]), first, schedules, pdf)
        for k in sample.why
        if anew or not is_drawn(run, int(run.pooled.indices[k]), code)
    ]


def works_of_sheets(run: Run, sample: Sample) -> list[Work]:
    """The contact sheets, SHEET images on a page."""
    chosen = list(sample.why.items())
    pages = [chosen[first : first + SHEET] for first in range(0, len(chosen), SHEET)]
    return [
        (1, save_contact_sheet, run.of([k for k, _ in page]), number, [why for _, why in page])
        for number, page in enumerate(pages, 1)
    ]


def count_pooled(run: Run) -> int:
    """How many figures are pooled over the images of a run."""
    return (len(POOLED_FIGURES) if run.timesteps else 0) + has_curve(run)


def delete_others(run: Run, sample: Sample) -> None:
    """Deletes the figures of images that are not in the sample, and contact sheets beyond its last."""
    kept = {int(run.pooled.indices[k]) for k in sample.why}
    pages = -(-len(sample.why) // SHEET)
    of_image = re.compile(rf"(\d{{4,}})_({'|'.join(IMAGE_FIGURES)})\.(png|pdf)")
    of_sheet = re.compile(r"contact_sheet_([1-9]\d*)\.(png|pdf)")
    for path in (run.folder / ANALYSIS).iterdir():
        image, sheet = of_image.fullmatch(path.name), of_sheet.fullmatch(path.name)
        if (image and int(image[1]) not in kept) or (sheet and int(sheet[1]) > pages):
            path.unlink(missing_ok=True)


def newest_code() -> float:
    """When the code that draws was last changed."""
    return max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))


def is_drawn(run: Run, index: int, code: float) -> bool:
    """Whether the figure of an image that is written last is there, and younger than the image's record and
    the code that draws it, which is of the time `code`.
    """
    last = run.folder / ANALYSIS / f"{index:04d}_{IMAGE_FIGURES[-1]}.png"
    record = run.layout.record(index)
    return last.exists() and last.stat().st_mtime >= max(record.stat().st_mtime, code)


def draw_comparison(runs: Mapping[str, Run], schedules: Schedules, folder: Path, prefix: str = "") -> None:
    """Draws the pooled figures of several runs, side by side with common axes and on the same axes, into the
    ANALYSIS folder of `folder`.
    """
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    timesteps = next(iter(runs.values())).timesteps
    lines = schedules(len(timesteps)) if timesteps else {}
    for name, figure in chain(draw_runs(runs, lines), draw_tradeoff(runs)):
        save_figure(figure, folder / ANALYSIS / f"{prefix}{name}")
