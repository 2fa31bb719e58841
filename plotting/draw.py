"""Draws the figures of runs into their folders: those that are pooled over images, each image's in several
processes, and those that compare runs.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.workers import end_with_parent, interrupts_held
from data.images import replacing, write_image
from data.records import ANALYSIS, ImageRecord, Run, read_pair
from plotting.figures import (
    DPI,
    STYLE,
    plot_average_loss_per_timestep,
    plot_layer_shares,
    plot_loss_heatmap,
    plot_loss_per_timestep,
    plot_overlay,
    plot_tradeoff,
    plot_weight_curves,
)
from plotting.image_figures import LossCurves, plot_attention, plot_contact_sheet, plot_losses, short

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

SHEET = 12  # images on a page of contact sheets

Schedules = Callable[[int], Mapping[str, np.ndarray]]  # of N timesteps, schedules `(N,)` by name


def draw_runs(runs: Mapping[str, Run], schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures that are pooled over images, by name; of several runs side by side, and on the same axes.

    Raises:
        ValueError: the runs have other timesteps or layers than each other.
    """
    first = next(iter(runs.values()))
    if not any(run.timesteps for run in runs.values()):
        return  # nothing to pool of attacks that know none
    timesteps, layers = first.timesteps, first.records[0].layers
    if any(run.timesteps != timesteps or run.records[0].layers != layers for run in runs.values()):
        raise ValueError(f"the runs {', '.join(runs)} differ in timesteps or layers; draw them one by one")
    layer_losses = {name: run.layer_losses for name, run in runs.items()}
    timestep_losses = {name: losses.sum(-1) for name, losses in layer_losses.items()}
    weights = {name: np.concatenate([record.weights for record in run.records]) for name, run in runs.items()}
    curves = {name: loss_curves(run) for name, run in runs.items()}
    images = {len(run.records) for run in runs.values()}
    yield (
        "weight_curves",
        plot_weight_curves(weights, timesteps, schedules, images.pop() if len(images) == 1 else 1),
    )
    yield "loss_per_timestep", plot_loss_per_timestep(timestep_losses, timesteps)
    yield "loss_heatmap", plot_loss_heatmap(timestep_losses, timesteps)
    yield "average_loss_per_timestep", plot_average_loss_per_timestep(layer_losses, timesteps)
    yield "layer_shares", plot_layer_shares(before_and_after_norm(runs), timesteps, layers)
    yield "losses", plot_losses(curves)
    if len(runs) > 1:
        yield (
            "overlay",
            plot_overlay(
                {
                    name: (layer_losses[name], curve.losses[:, 0], curve.confidence)
                    for name, curve in curves.items()
                },
                timesteps,
            ),
        )


def loss_curves(run: Run) -> LossCurves:
    losses, confidence, fooled = (
        np.stack([getattr(record, field) for record in run.records])
        for field in ("losses", "confidence", "fooled")
    )
    return LossCurves(
        losses,
        run.factors,
        confidence,
        fooled,
        run.gradient_shares_by_image,
        run.records[0].gradient_iterations,
    )


def before_and_after_norm(runs: Mapping[str, Run]) -> dict[str, np.ndarray]:
    """Losses by layer `(images, K, N, L)` by name; of a run whose layers are normalised, also what they would
    have been without.
    """
    shown = {}
    for name, run in runs.items():
        if run.configuration["layer_norm"] == "mse":
            shown[name] = run.layer_losses
        else:
            squares = np.stack([record.reference_squares for record in run.records])  # (images, N, L)
            shown[f"{name}, mse"] = run.layer_losses * squares[:, None]
            shown[f"{name}, relative"] = run.layer_losses
    return shown


def draw_tradeoff(runs: Mapping[str, Run]) -> Iterator[tuple[str, Figure]]:
    """Success over visibility of all images at several iterations, where pictures were judged on the way."""
    from evaluation.curves import curve_points  # takes torch, which the processes that draw do without

    rates = {
        name: [point.figures for point in curve_points(run.rows, run.configuration)]
        for name, run in runs.items()
    }
    if all(rates.values()):
        yield "tradeoff", plot_tradeoff(rates, "Attack success against visibility, by iteration")


def draw_image(run: Run, schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures of one image, by name; `run` has its record alone."""
    (record,) = run.records
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


def draw_contact_sheets(run: Run) -> Iterator[tuple[str, Figure]]:
    """All images of a run, SHEET on a page."""
    for page, first in enumerate(range(0, len(run.records), SHEET), 1):
        yield (
            f"contact_sheet_{page}",
            plot_contact_sheet(
                [
                    (*read_pair(run.layout, record.index), *captions(record))
                    for record in run.records[first : first + SHEET]
                ]
            ),
        )


def captions(record: ImageRecord) -> tuple[str, str]:
    """What is said of the clean and of the adversarial picture."""
    before, after = record.row["before"], record.row["after"]
    return (
        f"{short(record.row['file'])}\n{short(before['class'])} {before['confidence']:.2f}",
        f"{record.outcome}:\n{short(after['class'])} {after['confidence']:.2f}",
    )


def save_figure(figure: Figure, path: Path, pdf: bool = True, places: list | None = None) -> None:
    """Writes `path` with .png and, if wanted, with .pdf; without the date, so that the same figure is the
    same file.

    Args:
        places: of the panels, from `places_of` a figure with the same panels: finding them takes half of the
            time.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks shows as boxes
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

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return [panel.get_position(original=True) for panel in figure.axes]


# of the figures of each run's first image, by folder, name and number of panels, in a process of a pool
LAYOUTS: dict[tuple[Path, str, int], list] = {}


def save_image_figures(run: Run, first: Run, schedules: Mapping[str, np.ndarray], pdf: bool) -> None:
    """Draws the one image of `run`, in a process of a pool.

    Its figures are laid out like those of the run's first image, `first`, so that they do not depend on which
    process draws which images, and when.
    """
    if not any(folder == run.folder for folder, _, _ in LAYOUTS):
        for name, figure in draw_image(first, schedules):
            LAYOUTS[run.folder, name, len(figure.axes)] = places_of(figure)
    for name, figure in draw_image(run, schedules):
        path = run.folder / ANALYSIS / f"{run.records[0].index:04d}_{name}"
        save_figure(figure, path, pdf, LAYOUTS.get((run.folder, name, len(figure.axes))))


def save_contact_sheets(run: Run) -> None:
    """Draws all images of a run, in a process of a pool."""
    for name, figure in draw_contact_sheets(run):
        save_figure(figure, run.folder / ANALYSIS / name)


def draw_folders(
    runs: Iterable[Run],
    schedules: Schedules,
    each_image: bool = True,
    anew: bool = True,
    pdf: bool = False,
) -> None:
    """Draws the figures of runs into their ANALYSIS folders.

    Those that are pooled over images are written as PNG and as PDF. Each image's, and the contact sheets,
    take most of the time and are drawn by several processes.

    Args:
        schedules: the reference lines of weight curves.
        each_image: whether to draw each image's.
        anew: also those that are there and up to date.
        pdf: each image's as PDF, too.
    """
    runs = list(runs)
    work = [
        tuple(Run(run.folder, run.configuration, [one]) for one in (record, run.records[0]))
        for run in runs
        for record in run.records
        if each_image and (anew or not is_drawn(record.path))
    ]
    pool = ProcessPoolExecutor(
        min(os.cpu_count() or 1, 16, len(work) + len(runs)),
        multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
    )
    try:
        for run in runs:
            (run.folder / ANALYSIS).mkdir(exist_ok=True)
        lines = {run.folder: schedules(len(run.timesteps)) if run.timesteps else {} for run in runs}
        with interrupts_held():  # submitting starts the processes
            images = [
                pool.submit(save_image_figures, image, first, lines[image.folder], pdf)
                for image, first in work
            ]
            sheets = [pool.submit(save_contact_sheets, run) for run in runs]
        for run in runs:
            named = {short(run.folder.absolute().name): run}
            for name, figure in (*draw_runs(named, lines[run.folder]), *draw_tradeoff(named)):
                save_figure(figure, run.folder / ANALYSIS / name)
        for drawn in (*images, *sheets):
            drawn.result()
    finally:  # after Ctrl-C, no more than what is being drawn is waited for
        pool.shutdown(wait=True, cancel_futures=True)


def is_drawn(record: Path) -> bool:
    """Whether the figure of an image that is written last is there, and younger than the image's record and
    the code that draws it.
    """
    last = record.parent / ANALYSIS / record.name.replace("record.npz", "contact_sheet.png")
    code = Path(__file__).parent.glob("*.py")
    return last.exists() and last.stat().st_mtime >= max(path.stat().st_mtime for path in (record, *code))


def draw_comparison(runs: Mapping[str, Run], schedules: Schedules, folder: Path, prefix: str = "") -> None:
    """Draws the pooled figures of several runs, side by side with common axes and on the same axes, into the
    ANALYSIS folder of `folder`.
    """
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    timesteps = next(iter(runs.values())).timesteps
    lines = schedules(len(timesteps)) if timesteps else {}
    for name, figure in (*draw_runs(runs, lines), *draw_tradeoff(runs)):
        save_figure(figure, folder / ANALYSIS / f"{prefix}{name}")
