"""The figure of how weights move: arrays in, a matplotlib `Figure` out. Of few images one after the other, of
many what they have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffattack.plotting.figures import (
    REFERENCE_LINES,
    iteration_axis,
    new_figure,
    plot_curve,
    styled,
    timestep_colours,
)

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ONE_BY_ONE = 50  # images, beside each other; of more nothing could be told from each other


@styled
def plot_weight_curves(
    runs: Mapping[str, np.ndarray],
    timesteps: Sequence[int],
    schedules: Mapping[str, np.ndarray] | None = None,
    images: int = 1,
) -> Figure:
    """The weight of each timestep over iterations, a panel for each run.

    Up to ONE_BY_ONE images are drawn one after the other. Of more, where weights start anew with each image,
    it is the median over images in each iteration, with quartiles; where they go on from image to image, as
    in mode learnable, the weights at the end of each image.

    Args:
        runs: by name, weights that sum to 1 over N: `(images, iterations, N)`, or `(iterations, N)` of
            several images one after the other.
        timesteps: the N attacked timesteps, early to late.
        schedules: by name, weights `(N,)` that are drawn as reference lines.
        images: how many there are in a run, marked by lines between them.
    """
    from matplotlib.lines import Line2D

    by_image = {name: w if w.ndim == 3 else np.stack(np.split(w, images)) for name, w in runs.items()}
    is_many = max(map(len, by_image.values())) > ONE_BY_ONE
    figure, panels = new_figure(title_of(by_image.values(), is_many), 1, len(runs), sharey=True)
    colours, styles = (
        timestep_colours(len(timesteps)),
        dict(zip(schedules or {}, itertools.cycle(REFERENCE_LINES))),
    )
    for panel, (name, weights) in zip(panels[0], by_image.items()):
        if not is_many:
            draw_one_by_one(panel, weights, timesteps, images)
        elif start_anew(weights):
            draw_medians(panel, weights, timesteps)
        else:
            draw_ends(panel, weights, timesteps)
        for schedule, style in styles.items():
            for i, value in enumerate(schedules[schedule]):
                panel.axhline(value, color=colours[i], linestyle=style, linewidth=0.6, alpha=0.7)
        panel.set(title=name, ylim=(0, 1))
    panels[0, 0].set_ylabel("weight (sum 1)")
    handles = panels[0, 0].get_legend_handles_labels()[0] + [
        Line2D([], [], color="0.4", linestyle=style, linewidth=0.8, label=name)
        for name, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2 + len(runs), 4))
    return figure


def title_of(runs: Collection[np.ndarray], is_many: bool) -> str:
    """Says what is drawn of many images."""
    counts = {len(weights) for weights in runs}
    images = f"{counts.pop():,} images" if len(counts) == 1 else "images"
    kinds = {start_anew(weights) for weights in runs} if is_many else set()
    said = {
        frozenset(): "",
        frozenset({True}): f"\n(median and quartiles over {images})",
        frozenset({False}): f"\n(at the end of each of {images})",
        frozenset({True, False}): f"\n(median and quartiles over {images};\n"
        "where they go on from image to image, at the end of each)",
    }
    return f"Weights of the attacked timesteps{said[frozenset(kinds)]}"


def start_anew(weights: np.ndarray) -> bool:
    """Whether the weights `(images, iterations, N)` of each image start as those of the first."""
    return bool((weights[:, 0] == weights[0, 0]).all())


def draw_one_by_one(panel: Axes, weights: np.ndarray, timesteps: Sequence[int], images: int) -> None:
    weights = weights.reshape(-1, len(timesteps))
    draw_lines(panel, weights, timesteps)
    for k in range(1, images):
        panel.axvline(k * len(weights) / images + 0.5, color="0.85", linewidth=0.5, zorder=0)
    iteration_axis(panel, "iteration" if images == 1 else f"iteration, over {images} images")


def draw_medians(panel: Axes, weights: np.ndarray, timesteps: Sequence[int]) -> None:
    if weights.strides[0] == 0:  # a view of one image's, since all have the same
        weights = weights[:1]
    x, marker = np.arange(1, weights.shape[1] + 1), "." if weights.shape[1] == 1 else None
    for i, (t, colour) in enumerate(zip(timesteps, timestep_colours(len(timesteps)))):
        plot_curve(panel, x, weights[..., i], color=colour, label=f"t = {t}", marker=marker)
    iteration_axis(panel)


def draw_ends(panel: Axes, weights: np.ndarray, timesteps: Sequence[int]) -> None:
    draw_lines(panel, weights[:, -1], timesteps)
    iteration_axis(panel, "image")


def draw_lines(panel: Axes, weights: np.ndarray, timesteps: Sequence[int]) -> None:
    """Of weights `(x, N)`."""
    for i, (t, colour) in enumerate(zip(timesteps, timestep_colours(len(timesteps)))):
        panel.plot(
            np.arange(1, len(weights) + 1),
            weights[:, i],
            color=colour,
            label=f"t = {t}",
            marker="." if len(weights) == 1 else None,
        )
