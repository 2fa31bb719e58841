"""Draws the figures of runs into their folders: those that are pooled over images, those of single images,
and those that compare runs.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from diffattack.common.errors import note
from diffattack.data.images import part_of_change, read_pair, replacing, write_image
from diffattack.data.records import ANALYSIS, ImageRecord, Run, outcome_of
from diffattack.data.summaries import FIGURE_IMAGES, choose
from diffattack.evaluation.curves import Points, curve_points, figures_of
from diffattack.plotting import figures as plots
from diffattack.plotting.image_figures import plot_attention, plot_contact_sheet, plot_pictures, short
from diffattack.plotting.run_page import AMPLIFIED, IMAGE_FIGURES, amplified_difference

SHEET = 12  # images on a page of contact sheets

Figures = Iterator[tuple[str, Figure]]  # by the names of their files, without suffix
Schedules = Callable[[int], Mapping[str, np.ndarray]]  # of N timesteps, schedules `(N,)` by name


# ---------------------------------------------------------------- which figures there are


def draw_runs(runs: Mapping[str, Run], schedules: Schedules) -> Figures:
    """The figures that are pooled over images; of several runs side by side, and on the same axes.

    Raises:
        ValueError: the runs have other timesteps or layers than each other.
    """
    first = next(iter(runs.values()))
    if any(run.timesteps != first.timesteps or run.layers != first.layers for run in runs.values()):
        raise ValueError(f"the runs {', '.join(runs)} differ in timesteps or layers; draw them one by one")
    if first.timesteps:  # there is nothing to pool of attacks that know none
        losses = {name: run.summary.structure.by_timestep for name, run in runs.items()}
        weights = {name: run.summary.weights for name, run in runs.items()}
        named = schedules(len(first.timesteps))
        yield "loss_per_timestep", plots.plot_loss_per_timestep(losses, first.timesteps)
        yield "layer_shares", plots.plot_layer_shares(runs)
        yield "weight_curves", plots.plot_weight_curves(weights, first.timesteps, named)
        yield "average_loss_per_timestep", plots.plot_average_loss_per_timestep(runs)
        yield "losses", plots.plot_losses(runs)
    yield from draw_tradeoff(runs)


def draw_tradeoff(runs: Mapping[str, Run]) -> Figures:
    """Success over visibility of all images at several iterations, where pictures were judged on the way."""
    rates = {name: [figures_of(one) for one in curve_points(run).values()] for name, run in runs.items()}
    if all(rates.values()):
        yield "tradeoff", plots.plot_tradeoff(rates, "Attack success against visibility, by iteration")


def draw_equally_visible(runs: Mapping[str, Run], points: Mapping[str, Points], seed: int) -> Figure:
    """Of the most and the least visible image, and of one that is drawn by the seed: every attack's picture
    with the part of its change with which it is as visible as the least visible of them, and the differences.

    Args:
        points: by attack, evaluations of all images by percent of their change.
    """
    measure = "FLIP" if "FLIP" in next(iter(points.values()))[100].quality else "L2"
    seen = {
        name: np.stack([one.quality[measure].by_image for one in of_attack.values()])
        for name, of_attack in points.items()
    }
    first, *_ = runs
    rows = []
    for k, why in choose(-seen[first][-1], 3, seed).items():
        record, equal = runs[first].records[k], min(each[-1, k] for each in seen.values())
        clean, _ = read_pair(runs[first].layout, record.index)
        pictures = [(clean, f"{short(record.row['file'])}\n{why}")]
        differences = [(np.full_like(clean, 255), f"absolute difference, {AMPLIFIED} times")]
        for name, run in runs.items():
            percent = np.interp(equal, [0, *seen[name][:, k]], [0, *points[name]])
            picture = part_of_change(*read_pair(run.layout, record.index), percent / 100)
            pictures.append((picture, f"{short(name)}\n{percent:.0f} % of its change"))
            differences.append((amplified_difference(clean, picture), ""))
        rows += [pictures, differences]
    return plot_pictures(rows, 1.7, f"Parts of changes that are equally visible by {measure}")


def draw_image(run: Run, record: ImageRecord) -> Figures:
    """The figures of one image of a run."""
    row = sheet_row(run, record)
    if run.timesteps:
        attention = (record.class_tokens, record.class_attention, record.components)
        yield f"{record.index:04d}_attention", plot_attention(*row[:2], *attention)
    yield f"{record.index:04d}_contact_sheet", plot_contact_sheet([row])


def draw_contact_sheets(run: Run, sample: Mapping[int, str]) -> Figures:
    """All images of a sample, SHEET on a page."""
    chosen = list(sample.items())
    for first in range(0, len(chosen), SHEET):
        rows = [sheet_row(run, run.records[k], why) for k, why in chosen[first : first + SHEET]]
        yield f"contact_sheet_{1 + first // SHEET}", plot_contact_sheet(rows)


def sheet_row(run: Run, record: ImageRecord, why: str = "") -> tuple[np.ndarray, np.ndarray, str, str]:
    """The clean and the adversarial picture, and the caption of each: the file, the outcome, and the
    prediction; and why the image was chosen, where there is something to say.
    """
    sides = (record.row[side] for side in ("before", "after"))
    before, after = (f"{short(side['class'])} {side['confidence']:.2f}" for side in sides)
    chosen = f"; {why}, {record.row['psnr']:.1f} dB" if why else ""
    return (
        *read_pair(run.layout, record.index),
        f"{short(record.row['file'])}\n{before}",
        f"{outcome_of(record.row)}{chosen}:\n{after}",
    )


# ---------------------------------------------------------------- how they are written


def save_figures(figures: Figures, folder: Path, prefix: str = "", pdf: bool = False) -> None:
    """Writes them into the ANALYSIS folder of a folder."""
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    for name, figure in tqdm(figures, desc="figures", unit="figure", delay=1, leave=False):
        save_figure(figure, folder / ANALYSIS / f"{prefix}{name}", pdf)


@plots.styled
def save_figure(figure: Figure, path: Path, pdf: bool = False) -> None:
    """Writes `path` with .png and, if wanted, with .pdf; without the date, so that the same figure is the
    same file.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what no font has is a box
        figure.set_dpi(plots.DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once: savefig would do it twice
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        write_image(pixels, path.with_name(path.name + ".png"), compress_level=1)
        if pdf:
            content = io.BytesIO()  # matplotlib leaves a file that cannot be written in a traceback
            figure.savefig(content, format="pdf", metadata={"CreationDate": None})
            with replacing(path.with_name(path.name + ".pdf")) as temporary:
                temporary.write_bytes(content.getvalue())


def draw_folders(
    runs: Iterable[Run],
    schedules: Schedules,
    each_image: bool = True,
    pdf: bool = False,
    figure_images: int = FIGURE_IMAGES,
) -> None:
    """Draws the figures of runs into their ANALYSIS folders.

    Contact sheets, and each image's, are of a sample of the images where there are more than `figure_images`;
    those of images that are no longer in it are deleted.

    Args:
        schedules: the reference lines of weight curves.
        each_image: whether to draw each image's.
        pdf: as PDF, too.
    """
    for run in runs:
        sample = choose(run.summary.psnr, figure_images, run.configuration.get("seed", 0))
        if len(sample) < len(run.records):
            note(
                f"figures of {len(sample):,} of {len(run.records):,} images, the most and the least visible "
                f"and some drawn by the seed; --figure_images says how many"
            )
        delete_others(run, sample)
        save_figures(figures_of_run(run, sample, schedules, each_image), run.folder, pdf=pdf)


def figures_of_run(run: Run, sample: Mapping[int, str], schedules: Schedules, each_image: bool) -> Figures:
    yield from draw_runs({short(run.folder.absolute().name): run}, schedules)
    yield from draw_contact_sheets(run, sample)
    for place in sample if each_image else ():
        yield from draw_image(run, run.records[place])


def delete_others(run: Run, sample: Collection[int]) -> None:
    """Deletes the figures of images that are not in the sample, and contact sheets beyond its last."""
    of_images = itertools.product(run.summary.indices[list(sample)], IMAGE_FIGURES)
    kept = {f"{index:04d}_{name}" for index, name in of_images}
    kept |= {f"contact_sheet_{1 + first // SHEET}" for first in range(0, len(sample), SHEET)}
    for path in (run.folder / ANALYSIS).glob("*.p[nd][gf]"):
        is_ours = re.fullmatch(rf"\d{{4,}}_({'|'.join(IMAGE_FIGURES)})|contact_sheet_[1-9]\d*", path.stem)
        if is_ours and path.stem not in kept:
            path.unlink(missing_ok=True)
