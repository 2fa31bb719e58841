"""Draws the figures of runs into their folders: those that are pooled over images, each image's in several
processes, and those that compare runs.
"""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from diffattack.common.errors import note
from diffattack.common.parallel import run_in_processes
from diffattack.data.images import read_pair, replacing, write_image
from diffattack.data.records import ANALYSIS, ImageRecord, Run, outcome_of
from diffattack.data.summaries import FIGURE_IMAGES, choose
from diffattack.evaluation.tables import deciding
from diffattack.plotting.figures import (
    DPI,
    plot_average_loss_per_timestep,
    plot_layer_shares,
    plot_loss_heatmap,
    plot_loss_per_timestep,
    plot_overlay,
    plot_tradeoff,
    plot_weight_curves,
    style,
)
from diffattack.plotting.image_figures import (
    LossCurves,
    plot_attention,
    plot_contact_sheet,
    plot_losses,
    short,
)

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

SHEET = 12  # images on a page of contact sheets
POOLED_FIGURES = ("loss_per_timestep", "loss_heatmap", "layer_shares")
POOLED_FIGURES += ("weight_curves", "average_loss_per_timestep", "losses")
# of an image, whose curves are on the page; of attacks without timesteps the last alone
IMAGE_FIGURES = ("attention", "contact_sheet")

Schedules = Callable[[int], Mapping[str, np.ndarray]]  # of N timesteps, schedules `(N,)` by name


# ---------------------------------------------------------------- which figures there are


def draw_runs(runs: Mapping[str, Run], schedules: Schedules) -> Iterator[tuple[str, Figure]]:
    """The figures that are pooled over images, by name; of several runs side by side, and on the same axes.

    Raises:
        ValueError: the runs have other timesteps or layers than each other.
    """
    first = next(iter(runs.values()))
    timesteps = first.timesteps
    if any(run.timesteps != timesteps or run.layers != first.layers for run in runs.values()):
        raise ValueError(f"the runs {', '.join(runs)} differ in timesteps or layers; draw them one by one")
    if timesteps:  # there is nothing to pool of attacks that know none
        by_timestep = {name: run.summary.structure.by_timestep for name, run in runs.items()}
        yield "loss_per_timestep", plot_loss_per_timestep(by_timestep, timesteps)
        yield "loss_heatmap", plot_loss_heatmap(by_timestep, timesteps)
        yield "layer_shares", plot_layer_shares(before_and_after_norm(runs), timesteps, first.layers)
        weights = {name: run.summary.weights for name, run in runs.items()}
        yield "weight_curves", plot_weight_curves(weights, timesteps, schedules(len(timesteps)))
        structure = {name: run.summary.structure for name, run in runs.items()}
        yield "average_loss_per_timestep", plot_average_loss_per_timestep(structure, timesteps)
        yield "losses", plot_losses({name: LossCurves.of(run) for name, run in runs.items()})
        if len(runs) > 1:
            overlaid = {
                name: (structure[name], run.summary.losses[:, 0], run.summary.confidence)
                for name, run in runs.items()
            }
            yield "overlay", plot_overlay(overlaid, timesteps)
    yield from draw_tradeoff(runs)


def before_and_after_norm(runs: Mapping[str, Run]) -> dict[str, np.ndarray]:
    """Losses by layer by name, summed over iterations, `(images, 1, N, L)`; of a run whose layers are
    normalised, also what they would have been without.
    """
    shown = {}
    for name, run in runs.items():
        by_layer = run.summary.structure.by_layer
        if run.configuration["layer_norm"] == "mse":
            shown[name] = by_layer[:, None]
        else:
            shown[f"{name}, mse"] = (by_layer * run.summary.reference_squares)[:, None]
            shown[f"{name}, relative"] = by_layer[:, None]
    return shown


def draw_tradeoff(runs: Mapping[str, Run]) -> Iterator[tuple[str, Figure]]:
    """Success over visibility of all images at several iterations, where pictures were judged on the way."""
    if not all(run.configuration.get("judge_at") for run in runs.values()):
        return
    from diffattack.evaluation.curves import (
        curve_points,
        figures_of,
    )  # takes torch, which no other process needs

    points = {name: curve_points(run).values() for name, run in runs.items()}
    rates = {name: [figures_of(one) for one in each] for name, each in points.items()}
    if all(rates.values()):
        yield "tradeoff", plot_tradeoff(rates, "Attack success against visibility, by iteration")


def draw_image(run: Run) -> Iterator[tuple[str, Figure]]:
    """The figures of one image, by name; `run` has its record alone."""
    (record,) = run.records
    clean, adversarial = read_pair(run.layout, record.index)
    if run.timesteps:
        attention = (record.class_tokens, record.class_attention, record.components)
        yield "attention", plot_attention(clean, adversarial, *attention)
    yield "contact_sheet", plot_contact_sheet([(clean, adversarial, *captions(record))])


def captions(record: ImageRecord, why: str = "") -> tuple[str, str]:
    """Below the clean and the adversarial picture: the file, the outcome, and the prediction."""
    before, after = map(deciding, (record.row["before"], record.row["after"]))
    chosen = f"; {why}, {record.row['psnr']:.1f} dB" if why else ""
    return (
        f"{short(record.row['file'])}\n{short(before[0])} {before[1]:.2f}",
        f"{outcome_of(record.row)}{chosen}:\n{short(after[0])} {after[1]:.2f}",
    )


# ---------------------------------------------------------------- how they are written


def save_figure(figure: Figure, path: Path, pdf: bool = False) -> None:
    """Writes `path` with .png and, if wanted, with .pdf; without the date, so that the same figure is the
    same file.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what no font has is a box
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once: savefig would do it twice
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        write_image(pixels, path.with_name(path.name + ".png"), compress_level=2)
        if pdf:
            figure.set_layout_engine("none")  # it has been laid out
            content = io.BytesIO()  # matplotlib leaves a file that cannot be written in a traceback
            figure.savefig(content, format="pdf", metadata={"CreationDate": None})
            with replacing(path.with_name(path.name + ".pdf")) as temporary:
                temporary.write_bytes(content.getvalue())


def save_pooled(run: Run, schedules: Schedules, pdf: bool) -> None:
    """Draws the figures of `run` that are pooled over images."""
    for name, figure in draw_runs({short(run.folder.absolute().name): run}, schedules):
        save_figure(figure, run.folder / ANALYSIS / name, pdf)


def save_image_figures(run: Run, pdf: bool) -> None:
    """Draws the one image of `run`."""
    (record,) = run.records
    for name, figure in draw_image(replace(run, records=[record])):
        save_figure(figure, run.folder / ANALYSIS / f"{record.index:04d}_{name}", pdf)


def save_contact_sheet(run: Run, pdf: bool, page: int, reasons: Sequence[str]) -> None:
    """Draws all images of `run` on a page; of each why it was chosen, "" where there is nothing to say."""
    rows = [
        (*read_pair(run.layout, record.index), *captions(record, why))
        for record, why in zip(run.records, reasons)
    ]
    save_figure(plot_contact_sheet(rows), run.folder / ANALYSIS / f"contact_sheet_{page}", pdf)


def draw_folders(
    runs: Iterable[Run],
    schedules: Schedules,
    each_image: bool = True,
    anew: bool = True,
    pdf: bool = False,
    figure_images: int = FIGURE_IMAGES,
) -> None:
    """Draws the figures of runs into their ANALYSIS folders.

    Several processes draw them: those that are pooled, each image's and the contact sheets, of a sample of
    the images where there are more than `figure_images`; those of images that are not in it are deleted.

    Args:
        schedules: the reference lines of weight curves.
        each_image: whether to draw each image's.
        anew: also those that are there and up to date.
        pdf: as PDF, too.
    """
    runs, work = list(runs), []
    for run in runs:
        (run.folder / ANALYSIS).mkdir(exist_ok=True)
        sample = choose(run.summary.psnr, figure_images, run.configuration.get("seed", 0))
        if len(sample) < len(run.records):
            note(
                f"figures of {len(sample):,} of {len(run.records):,} images, the most and the least visible "
                f"and some drawn by the seed; --figure_images says how many"
            )
        delete_others(run, sample)
        work.append(partial(save_pooled, run, schedules, pdf))
        work += works_of(run, sample, each_image, anew, pdf)
    with tqdm(total=len(work), desc="figures", unit="set", delay=1, leave=False) as bar:
        processes = min(os.cpu_count() or 1, 16, len(work))
        for draw in run_in_processes(processes, work, lambda _: bar.update()):
            draw()
            bar.update()


def works_of(
    run: Run, sample: Mapping[int, str], each_image: bool, anew: bool, pdf: bool
) -> list[Callable[[], None]]:
    """What processes draw of a run, as calls with small arguments: each image's figures, of those images of
    which they are missing or `anew`, and contact sheets, SHEET images on a page.
    """
    lacking = [k for k in sample if anew or not is_drawn(run, int(run.summary.indices[k]))]
    images = [partial(save_image_figures, run.of([k]), pdf) for k in lacking if each_image]
    chosen = list(sample)
    pages = [chosen[first : first + SHEET] for first in range(0, len(chosen), SHEET)]
    return images + [
        partial(save_contact_sheet, run.of(page), pdf, number, [sample[k] for k in page])
        for number, page in enumerate(pages, 1)
    ]


def delete_others(run: Run, sample: Collection[int]) -> None:
    """Deletes the figures of images that are not in the sample, and contact sheets beyond its last."""
    kept = {int(run.summary.indices[k]) for k in sample}
    pages = -(-len(sample) // SHEET)
    of_image = re.compile(rf"(\d{{4,}})_({'|'.join(IMAGE_FIGURES)})\.(png|pdf)")
    of_sheet = re.compile(r"contact_sheet_([1-9]\d*)\.(png|pdf)")
    for path in (run.folder / ANALYSIS).iterdir():
        image, sheet = of_image.fullmatch(path.name), of_sheet.fullmatch(path.name)
        if (image and int(image[1]) not in kept) or (sheet and int(sheet[1]) > pages):
            path.unlink(missing_ok=True)


@functools.cache
def newest_code() -> float:
    """When the code that draws was last changed."""
    return max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))


def is_drawn(run: Run, index: int) -> bool:
    """Whether the figure of an image that is written last is there, and younger than the image's record and
    the code that draws it.
    """
    last = run.folder / ANALYSIS / f"{index:04d}_{IMAGE_FIGURES[-1]}.png"
    record = run.layout.record(index)
    return last.exists() and last.stat().st_mtime >= max(record.stat().st_mtime, newest_code())


def draw_comparison(
    runs: Mapping[str, Run], schedules: Schedules, folder: Path, prefix: str = "", pdf: bool = False
) -> None:
    """Draws the pooled figures of several runs, side by side with common axes and on the same axes, into the
    ANALYSIS folder of `folder`.
    """
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    for name, figure in draw_runs(runs, schedules):
        save_figure(figure, folder / ANALYSIS / f"{prefix}{name}", pdf)
