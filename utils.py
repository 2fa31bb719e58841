"""Draws figures from what a run saved: weights, losses by timestep and layer, attention, and what changed in
the image.

    python utils.py output_fixed                    # its timestep_analysis and report.html, without any model
    python utils.py output_fixed output_uniform     # of each; and both side by side, as compared_*

    from utils import plot_average_loss_per_timestep, read_run
    run = read_run(Path("output_fixed"))
    timesteps = run.records[0].timesteps.tolist()
    plot_average_loss_per_timestep({"fixed": run.layer_losses}, timesteps).savefig("shares.png")

Figures are written as PNG, those that are pooled over images also as PDF. The functions that draw take arrays
and return a matplotlib `Figure`.
"""

from __future__ import annotations

import environment  # isort: skip  # noqa: F401

import argparse
import functools
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from images import replacing, write_image
from records import ImageRecord, Run, layer_shares, read_run, timestep_shares

if TYPE_CHECKING:  # matplotlib and torch take long to import, and each is needed by half of this file alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANALYSIS = "timestep_analysis"  # the folder of a run's figures, inside the run's


# ---------------------------------------------------------------- figures: arrays in, a matplotlib Figure out

LOSSES = (
    "attack: cross-entropy (nats)",
    "self-attention: sum of $L_i$",
    "self-attention: sum of $c_i L_i$",
    "cross-attention: variance",
)
STYLE = {  # legible at the width of one column of a two-column paper, and as real fonts in its PDF
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)  # Okabe and Ito's, for the colour-blind
REFERENCE_LINES = (":", "--", "-.", (0, (1, 3)))
COLUMN, DPI = 3.4, 160  # inches, dots an inch
AMPLIFIED = 8  # times, of the absolute difference
SHEET = 12  # images on a page of contact sheets


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws with STYLE, and leaves matplotlib's settings as they were."""

    @functools.wraps(function)
    def draw(*arguments, **options) -> Figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return function(*arguments, **options)

    return draw


def new_figure(
    title: str, rows: int, columns: int, height: float = 2.4, layout: str | None = "constrained", **options
) -> tuple[Figure, np.ndarray]:
    """A figure with `(rows, columns)` panels: one fills a column of a paper, several side by side are
    narrower each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN if columns == 1 else 2.5 * columns, height * rows), layout=layout)
    if title:
        figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def timestep_colours(count: int) -> list[tuple[float, ...]]:
    """Always the same, from early (dark) to late."""
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def timestep_axis(panel: Axes, timesteps: Sequence[int]) -> None:
    panel.set_xticks(
        range(len(timesteps)), [str(t) for t in timesteps], rotation=45 if len(timesteps) > 6 else 0
    )
    panel.set_xlabel("timestep t, early to late")


def iteration_axis(panel: Axes, label: str = "iteration") -> None:
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel(label)


def log_scale(panel: Axes) -> None:
    """A logarithmic axis, where a curve has a value that it can show."""
    if any((np.nan_to_num(np.asarray(line.get_ydata(), np.float64)) > 0).any() for line in panel.lines):
        panel.set_yscale("log")


def middle_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median and quartiles over the first axis, NaN left out; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about columns that are all NaN
        return tuple(np.nanquantile(values, (0.5, 0.25, 0.75), axis=0))


def mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis, NaN left out; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0), np.nanstd(values, 0)


def plot_curve(panel: Axes, x: Sequence[float], values: np.ndarray, **options) -> None:
    """The median of values `(images, len(x))`, and, of several images, their quartiles as a band."""
    middle, low, high = middle_and_spread(values)
    (line,) = panel.plot(x, middle, **options)
    if len(values) > 1:
        panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


@styled
def plot_weight_curves(
    runs: Mapping[str, np.ndarray],
    timesteps: Sequence[int],
    schedules: Mapping[str, np.ndarray] | None = None,
    images: int = 1,
) -> Figure:
    """The weight of each timestep over iterations, a panel for each run.

    Args:
        runs: by name, weights `(iterations, N)` that sum to 1 over N; of several images one after the other.
        timesteps: the N attacked timesteps, early to late.
        schedules: by name, weights `(N,)` that are drawn as reference lines.
        images: how many there are in a run, marked by lines between them.
    """
    from matplotlib.lines import Line2D

    figure, panels = new_figure("Weights of the attacked timesteps", 1, len(runs), sharey=True)
    colours, styles = (
        timestep_colours(len(timesteps)),
        dict(zip(schedules or {}, itertools.cycle(REFERENCE_LINES))),
    )
    for panel, (name, weights) in zip(panels[0], runs.items()):
        for i, t in enumerate(timesteps):
            panel.plot(
                np.arange(1, len(weights) + 1),
                weights[:, i],
                color=colours[i],
                label=f"t = {t}",
                marker="." if len(weights) == 1 else None,
            )
        for schedule, style in styles.items():
            for i, value in enumerate(schedules[schedule]):
                panel.axhline(value, color=colours[i], linestyle=style, linewidth=0.6, alpha=0.7)
        for k in range(1, images):
            panel.axvline(k * len(weights) / images + 0.5, color="0.85", linewidth=0.5, zorder=0)
        panel.set(title=name, ylim=(0, 1))
        iteration_axis(panel, "iteration" if images == 1 else f"iteration, over {images} images")
    panels[0, 0].set_ylabel("weight (sum 1)")
    handles = panels[0, 0].get_legend_handles_labels()[0] + [
        Line2D([], [], color="0.4", linestyle=style, linewidth=0.8, label=name)
        for name, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@styled
def plot_loss_per_timestep(runs: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """`L_i` over the timesteps at the first, middle and last iterations; the median over images, with
    quartiles.

    Args:
        runs: by name, `L_i` as `(images, iterations, N)`. In iteration 1 all are zero, so that the first that
            is drawn is 2.
        timesteps: the N attacked timesteps, early to late.
    """
    figure, panels = new_figure("Self-attention loss of each timestep", 1, len(runs), sharey=True)
    for panel, (name, losses) in zip(panels[0], runs.items()):
        last = losses.shape[1]
        shown = sorted({min(2, last), (last + 1) // 2, last} - ({1} if last > 1 else set()))
        for iteration, colour in zip(shown, ("#56B4E9", "#0072B2", "#000000")):
            values = losses[:, iteration - 1].astype(np.float64)
            plot_curve(
                panel,
                range(len(timesteps)),
                np.where(values > 0, values, np.nan),
                color=colour,
                marker="o",
                markersize=3,
                label=f"iteration {iteration}",
            )
        if not (losses[:, [iteration - 1 for iteration in shown]] > 0).any():
            panel.text(
                0.5,
                0.5,
                "zero: the attack starts at\nthe unperturbed run",
                ha="center",
                va="center",
                transform=panel.transAxes,
            )
        timestep_axis(panel, timesteps)
        panel.set_title(name)
        log_scale(panel)
    panels[0, 0].set_ylabel("$L_i$: squared change of attention,\nmean over a map, summed over layers")
    panels[0, -1].legend()
    return figure


@styled
def plot_loss_heatmap(runs: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """`L_i`, timestep by iteration, the mean over images; arguments as for `plot_loss_per_timestep`."""
    from matplotlib.colors import LogNorm, Normalize

    figure, panels = new_figure(
        "Self-attention loss by timestep and iteration", 1, len(runs), height=2.0, sharey=True
    )
    means = [mean_and_deviation(losses.astype(np.float64))[0] for losses in runs.values()]
    positive = np.concatenate([mean[mean > 0] for mean in means])
    norm = LogNorm(positive.min(), positive.max()) if len(positive) else Normalize(0, 1)
    for panel, name, mean in zip(panels[0], runs, means):
        panel.set_facecolor("0.85")  # seen where there is no value, or zero
        drawn = panel.imshow(
            np.where(mean > 0, mean, np.nan).T,
            aspect="auto",
            norm=norm,
            cmap="cividis",
            interpolation="none",
            extent=(0.5, len(mean) + 0.5, len(timesteps) - 0.5, -0.5),
        )
        panel.set_yticks(range(len(timesteps)), [str(t) for t in timesteps])
        panel.set_title(name)
        iteration_axis(panel)
    panels[0, 0].set_ylabel("timestep t, early to late")
    figure.colorbar(drawn, ax=panels, label="$L_i$")
    return figure


@styled
def plot_average_loss_per_timestep(runs: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """Each timestep's share of the self-attention loss, mean and standard deviation; above over all layers,
    below at the first layer alone.

    Args:
        runs: by name, losses `(images, iterations, N, L)`. The deviation is over images, of a single one over
            its iterations.
        timesteps: the N attacked timesteps, early to late.
    """
    single = all(len(losses) == 1 for losses in runs.values())
    figure, panels = new_figure(
        f"Share of the self-attention loss\n(mean and deviation over {'iterations' if single else 'images'})",
        2,
        len(runs),
        height=1.9,
        sharex=True,
        sharey=True,
    )
    for column, (name, losses) in zip(panels.T, runs.items()):
        for panel, of in zip(column, (losses, losses[..., :1])):
            shares = timestep_shares(of[0][:, None] if single else of)
            mean, deviation = mean_and_deviation(shares)
            panel.bar(
                range(len(timesteps)),
                100 * mean,
                yerr=100 * deviation,
                color=timestep_colours(len(timesteps)),
                error_kw={"linewidth": 0.8, "capsize": 2},
            )
            panel.axhline(100 / len(timesteps), color="0.3", linewidth=0.8, linestyle="--")
            for i, (m, d) in enumerate(zip(mean, deviation)):
                if np.isfinite(m):
                    panel.annotate(
                        f"{m * len(timesteps):.1f}x",
                        (i, 100 * (m + d)),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize=7,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
                    )
            panel.margins(y=0.15)
        column[0].set_title(name)
        timestep_axis(column[1], timesteps)
    panels[0, 0].set_ylabel("% of all layers")
    panels[1, 0].set_ylabel("% of the first layer")
    return figure


@styled
def plot_layer_shares(
    runs: Mapping[str, np.ndarray], timesteps: Sequence[int], layers: Sequence[str]
) -> Figure:
    """Each layer's share of each timestep's self-attention loss, and of all of it, in percent; the mean over
    images.

    Args:
        runs: by name, losses `(images, iterations, N, L)`.
        timesteps: the N attacked timesteps, early to late.
        layers: L names.
    """
    figure, panels = new_figure(
        "Share of each layer in the self-attention loss, %",
        1,
        len(runs),
        height=0.8 + 0.18 * len(layers),
        sharey=True,
    )
    means = []
    for losses in runs.values():
        by_timestep = np.stack(
            [layer_shares(losses[:, :, i : i + 1]) for i in range(len(timesteps))] + [layer_shares(losses)], 1
        )  # (images, N + 1, L)
        means.append(100 * mean_and_deviation(by_timestep)[0].T)
    top = max(1.0, np.nan_to_num(means).max())
    for panel, name, mean in zip(panels[0], runs, means):
        panel.imshow(mean, aspect="auto", vmin=0, vmax=top, cmap="cividis", interpolation="none")
        for (k, i), value in np.ndenumerate(mean):
            if np.isfinite(value):
                panel.text(
                    i,
                    k,
                    f"{value:.2g}" if value < 10 else f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 0.6 * top else "black",
                )
        panel.axvline(len(timesteps) - 0.5, color="white", linewidth=2)
        panel.set_xticks(
            range(len(timesteps) + 1), [*map(str, timesteps), "all"], rotation=45 if len(timesteps) > 6 else 0
        )
        panel.set_yticks(range(len(layers)), layers)
        panel.set(title=name, xlabel="timestep t, early to late")
    return figure


@styled
def plot_losses(
    runs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], factors: Sequence[float]
) -> Figure:
    """The losses before and after their factors, and the surrogate's confidence, over iterations; medians
    over images, with quartiles.

    Args:
        runs: by name, losses `(images, 4, iterations)` in the order of LOSSES, confidence in the true class
            and whether the image is fooled, `(images, iterations)` each. Of a single image the first
            iteration in which it is fooled is marked, of several the share that has been.
        factors: of the four in what is minimised.
    """
    figure, panels = new_figure("Losses and confidence", 3, len(runs), height=1.7, sharex="col", sharey="row")
    for column, (name, (losses, confidence, fooled)) in zip(panels.T, runs.items()):
        x = np.arange(1, losses.shape[-1] + 1)
        marker = "." if len(x) == 1 else None
        for k, label in enumerate(LOSSES):
            values = np.where(losses[:, k] > 0, losses[:, k], np.nan).astype(np.float64)
            plot_curve(column[0], x, values, color=PALETTE[k], label=label, marker=marker)
            if k != 1:
                plot_curve(column[1], x, factors[k] * values, color=PALETTE[k], label=label, marker=marker)
        plot_curve(
            column[2], x, confidence, color=PALETTE[6], label="confidence in the true class", marker=marker
        )
        ever = np.maximum.accumulate(fooled, axis=-1)
        if len(fooled) > 1:
            column[2].step(
                x,
                ever.mean(0),
                where="post",
                color=PALETTE[1],
                linestyle="--",
                label="share of images fooled so far",
            )
        elif ever.any():
            flip = int(x[ever[0].argmax()])
            for panel in column:
                panel.axvline(flip, color=PALETTE[1], linestyle="--", linewidth=0.9)
            column[2].annotate(
                f"fooled at iteration {flip}", (flip, 0.5), (4, 0), textcoords="offset points", fontsize=7
            )
        for panel in column[:2]:
            log_scale(panel)
        column[0].set_title(name)
        column[2].set_ylim(-0.02, 1.02)
        iteration_axis(column[2])
    for panel, label in zip(panels[:, 0], ("loss", "loss times factor", "probability")):
        panel.set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    more = panels[2, 0].get_legend_handles_labels()
    figure.legend(
        handles + more[0], labels + more[1], loc="outside lower center", ncols=1 if len(runs) == 1 else 3
    )
    return figure


@styled
def plot_attention(
    clean: np.ndarray,
    adversarial: np.ndarray,
    class_tokens: Sequence[str],
    class_attention: np.ndarray,
    components: np.ndarray,
) -> Figure:
    """Where the diffusion model looks without the attack (above) and with it: cross-attention to each class
    token, and the self-attention.

    Args:
        clean, adversarial: uint8 `(H, W, 3)`.
        class_tokens: T of them.
        class_attention: `(2, T, grid, grid)`, averaged over timesteps, heads and layers; drawn on the image.
        components: `(2, 3, h, w)`, the self-attention along its first principal components without the
            attack.
    """
    columns = len(class_tokens) + components.shape[1]
    figure, panels = new_figure(
        "Attention without the attack (above) and with it (below)", 2, columns, layout="compressed"
    )
    figure.set_size_inches(1.25 * columns, 3.1)
    side = clean.shape[0]
    for row, image in enumerate((clean, adversarial)):
        grey = np.asarray(Image.fromarray(image).convert("L"))
        for k, token in enumerate(class_tokens):
            panel, low, top = panels[row, k], class_attention[:, k].min(), class_attention[:, k].max()
            panel.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, side, side, 0))
            panel.imshow(
                class_attention[row, k],
                cmap="inferno",
                vmin=low,
                vmax=top,
                alpha=0.6,
                extent=(0, side, side, 0),
                interpolation="bilinear",
            )
            if row == 0:
                panel.set_title(f'"{short(token)}"\n{low:.2g} to {top:.2g}')
        for k in range(components.shape[1]):
            panel, top = panels[row, len(class_tokens) + k], np.abs(components[:, k]).max()
            panel.imshow(components[row, k], cmap="RdBu_r", vmin=-top, vmax=top)
            if row == 0:
                panel.set_title(f"component {k + 1}\n$\\pm${top:.2g}")
    for panel in panels.flat:
        panel.set_axis_off()
    return figure


@styled
def plot_contact_sheet(rows: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> Figure:
    """Clean, adversarial, signed difference and amplified absolute difference of images, a row each.

    Args:
        rows: clean and adversarial, uint8 `(H, W, 3)`, and a caption for each of the two. Signed differences
            are means over channels, and their colours have one scale on the whole sheet, symmetric around
            zero.
    """
    figure, panels = new_figure(
        "", len(rows), 4, layout=None
    )  # a grid of squares has its places without being searched for
    height = 2.1 * len(rows) + 0.7
    figure.set_size_inches(7, height)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.36 / height, bottom=0.62 / height, wspace=0.04, hspace=0.24
    )
    signed = [(adversarial.astype(np.float64) - clean).mean(-1) for clean, adversarial, _, _ in rows]
    top = max(
        1.0, np.ceil(np.quantile(np.abs(signed), 0.995))
    )  # the few strongest pixels would leave nothing to be seen of the others
    for row, difference, (clean, adversarial, before, after) in zip(panels, signed, rows):
        row[0].imshow(clean)
        row[1].imshow(adversarial)
        drawn = row[2].imshow(difference, cmap="RdBu_r", vmin=-top, vmax=top)
        row[3].imshow(
            (AMPLIFIED * np.abs(adversarial.astype(np.float64) - clean)).clip(0, 255).astype(np.uint8)
        )
        for panel, caption in zip(
            row,
            (before, after, f"difference, $\\pm${top:.0f} of 255", f"absolute difference, {AMPLIFIED} times"),
        ):
            panel.set_title(caption, fontsize=7)
            panel.set_axis_off()
    figure.colorbar(
        drawn,
        cax=figure.add_axes((0.3, 0.42 / height, 0.4, 0.08 / height)),
        orientation="horizontal",
        extend="both",
        label="signed difference, 8-bit levels (mean over channels)",
    )
    return figure


@styled
def plot_overlay(
    runs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], timesteps: Sequence[int]
) -> Figure:
    """Several runs on the same axes: self-attention and attack loss, confidence, and each timestep's share;
    medians over images, with quartiles.

    Args:
        runs: by name, losses by layer `(images, iterations, N, L)`, cross-entropy and confidence `(images,
            iterations)`.
        timesteps: the N attacked timesteps, early to late.
    """
    figure, ((structure, attack), (confidence_panel, share)) = new_figure(
        "Runs on the same axes", 2, 2, height=2.1
    )
    for colour, (name, (layer_losses, cross_entropy, confidence)) in zip(
        itertools.cycle(PALETTE), runs.items()
    ):
        x, options = (
            np.arange(1, confidence.shape[1] + 1),
            {"color": colour, "label": name, "marker": "." if confidence.shape[1] == 1 else None},
        )
        total = layer_losses.sum((-2, -1), dtype=np.float64)
        plot_curve(structure, x, np.where(total > 0, total, np.nan), **options)
        plot_curve(attack, x, cross_entropy, **options)
        plot_curve(confidence_panel, x, confidence, **options)
        plot_curve(
            share,
            range(len(timesteps)),
            100 * timestep_shares(layer_losses),
            **options | {"marker": "o", "markersize": 3},
        )
    share.axhline(100 / len(timesteps), color="0.3", linewidth=0.8, linestyle="--")
    timestep_axis(share, timesteps)
    structure.set_ylabel("sum of $L_i$")
    log_scale(structure)
    attack.set_ylabel("cross-entropy (nats)")
    confidence_panel.set(ylabel="confidence in the true class", ylim=(-0.02, 1.02))
    for panel in (structure, attack, confidence_panel):
        iteration_axis(panel)
    share.set_ylabel("share of the self-attention loss, %")
    figure.legend(*structure.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def plot_success_against_visibility(
    points: Mapping[str, Mapping[str, tuple[float, float, float]]], measure: str
) -> Figure:
    """Attack success rates over how visible the attack is, a panel for each classifier or mean of them, a
    point for each run.

    Args:
        points: by run, `measure` and success rates by name, each as value and ends of its 95 % interval.
        measure: SSIM or LPIPS.
    """
    rates = [name for name in next(iter(points.values())) if name != measure]
    figure, panels = new_figure(
        f"Attack success against {measure} (95 % intervals)", 1, len(rates), sharex=True, sharey=True
    )
    for panel, rate in zip(panels[0], rates):
        for colour, (run, figures) in zip(itertools.cycle(PALETTE), points.items()):
            (x, *x_ends), (y, *y_ends) = figures[measure], figures[rate]
            panel.errorbar(
                [x],
                [100 * y],
                xerr=np.abs(np.array(x_ends)[:, None] - x),
                yerr=100 * np.abs(np.array(y_ends)[:, None] - y),
                fmt="o",
                markersize=4,
                color=colour,
                capsize=2,
                elinewidth=0.8,
                label=run,
            )
        panel.set(
            title=rate,
            xlabel=f"{measure} ({'higher' if measure == 'SSIM' else 'lower'}: less visible)",
            ylim=(-2, 102),
        )
        panel.xaxis.get_major_locator().set_params(nbins=4)
    panels[0, 0].set_ylabel("attack success, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# ---------------------------------------------------------------- what belongs to a run


def named_schedules(num_timesteps: int) -> dict[str, np.ndarray]:
    """The schedules of timestep_weights.py, each `(N,)`."""
    from timestep_weights import (  # takes torch, which the processes that draw images do without
        SCHEDULES,
        schedule_weights,
    )

    return {name: schedule_weights(schedule, num_timesteps).numpy() for name, schedule in SCHEDULES.items()}


def draw_runs(runs: Mapping[str, Run], schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures that are pooled over images, by name; of several runs side by side, and on the same axes.

    Raises:
        ValueError: the runs have other timesteps or layers than each other.
    """
    first = next(iter(runs.values()))
    timesteps, layers = first.timesteps, first.records[0].layers
    if any(run.timesteps != timesteps or run.records[0].layers != layers for run in runs.values()):
        raise ValueError(f"the runs {', '.join(runs)} differ in timesteps or layers; draw them one by one")
    layer_losses = {name: run.layer_losses for name, run in runs.items()}
    timestep_losses = {name: losses.sum(-1) for name, losses in layer_losses.items()}
    weights = {name: np.concatenate([record.weights for record in run.records]) for name, run in runs.items()}
    curves = {
        name: tuple(
            np.stack([getattr(record, field) for record in run.records])
            for field in ("losses", "confidence", "fooled")
        )
        for name, run in runs.items()
    }
    images = {len(run.records) for run in runs.values()}
    yield (
        "weight_curves",
        plot_weight_curves(weights, timesteps, schedules, images.pop() if len(images) == 1 else 1),
    )
    yield "loss_per_timestep", plot_loss_per_timestep(timestep_losses, timesteps)
    yield "loss_heatmap", plot_loss_heatmap(timestep_losses, timesteps)
    yield "average_loss_per_timestep", plot_average_loss_per_timestep(layer_losses, timesteps)
    yield "layer_shares", plot_layer_shares(layer_losses, timesteps, layers)
    yield "losses", plot_losses(curves, first.factors)
    if len(runs) > 1:
        yield (
            "overlay",
            plot_overlay(
                {
                    name: (layer_losses[name], losses[:, 0], confidence)
                    for name, (losses, confidence, _) in curves.items()
                },
                timesteps,
            ),
        )


def draw_image(run: Run, schedules: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """The figures of one image, by name; `run` has its record alone."""
    (record,) = run.records
    yield from draw_runs({short(record.row["file"]): run}, schedules)
    clean, adversarial = read_pair(run.folder, record.index)
    yield (
        "attention",
        plot_attention(clean, adversarial, record.class_tokens, record.class_attention, record.components),
    )
    yield "contact_sheet", plot_contact_sheet([(clean, adversarial, *captions(record))])


def draw_contact_sheets(run: Run) -> Iterator[tuple[str, Figure]]:
    """All images of a run, SHEET on a page."""
    for page, first in enumerate(range(0, len(run.records), SHEET), 1):
        yield (
            f"contact_sheet_{page}",
            plot_contact_sheet(
                [
                    (*read_pair(run.folder, record.index), *captions(record))
                    for record in run.records[first : first + SHEET]
                ]
            ),
        )


def read_pair(folder: Path, index: int) -> list[np.ndarray]:
    """The clean and the adversarial picture that a run wrote, uint8 `(H, W, 3)`."""
    return [
        np.asarray(Image.open(folder / f"{index:04d}_{kind}.png").convert("RGB"))
        for kind in ("originImage", "adv_image")
    ]


def captions(record: ImageRecord) -> tuple[str, str]:
    """What is said of the clean and of the adversarial picture."""
    before, after = record.row["before"], record.row["after"]
    return (
        f"{short(record.row['file'])}\n{short(before['class'])} {before['confidence']:.2f}",
        f"{'fooled' if record.row['success'] else 'not fooled'}:\n{short(after['class'])} "
        f"{after['confidence']:.2f}",
    )


def short(name: str) -> str:
    """A name as it may stand in a figure: of bounded length, and nothing in it taken for a formula, or for a
    curve without a label.
    """
    name = name.encode("utf-8", "replace").decode()
    name = name if len(name) <= 28 else f"{name[:16]}...{name[-9:]}"
    return name.replace("$", r"\$") if name[:1] != "_" else " " + name.replace("$", r"\$")


def timestep_rows(layer_losses: np.ndarray, timesteps: Sequence[int]) -> list[list[str]]:
    """The table of what each timestep costs: `L_i`, mean and standard deviation over images of its mean over
    iterations, its share, and how many times the share is that of uniform losses; from losses `(images,
    iterations, N, L)`."""
    mean, deviation = mean_and_deviation(
        mean_and_deviation(layer_losses.sum(-1, dtype=np.float64).swapaxes(0, 1))[0]
    )
    share, share_deviation = mean_and_deviation(timestep_shares(layer_losses))
    return [["timestep", "mean L_i", "deviation", "share %", "deviation", "times uniform"]] + [
        [
            f"{i}: t = {t}",
            f"{mean[i]:.3g}",
            f"{deviation[i]:.2g}",
            f"{100 * share[i]:.1f}",
            f"{100 * share_deviation[i]:.1f}",
            f"{share[i] * len(timesteps):.2f}",
        ]
        for i, t in enumerate(timesteps)
    ]


def save_figure(figure: Figure, path: Path, pdf: bool = True, like: list | None = None) -> list:
    """Writes `path` with .png and, if wanted, with .pdf; without the date, so that the same figure is the
    same file.

    Finding the places of all panels takes half of the time, so that figures of many images with the same
    panels are laid out like the first of them.

    Args:
        like: what this returned for a figure with the same panels.
    Returns:
        the places of the panels.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks shows as boxes
        figure.set_dpi(DPI)
        if like is not None and len(like) == len(figure.axes):
            figure.set_layout_engine("none")
            for panel, place in zip(figure.axes, like):
                panel.set_position(place)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once: savefig would do it twice
        write_image(
            np.asarray(canvas.buffer_rgba())[..., :3], path.with_name(path.name + ".png"), compress_level=2
        )
        if pdf:
            figure.set_layout_engine("none")  # it has been laid out
            with replacing(path.with_name(path.name + ".pdf")) as temporary:
                figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        return [panel.get_position(original=True) for panel in figure.axes]


LAYOUTS: dict[
    tuple[str, int], list
] = {}  # of figures of images, by name and number of panels, in a process of a pool


def save_image_figures(run: Run, schedules: Mapping[str, np.ndarray], pdf: bool) -> None:
    """Draws the one image of `run`, in a process of a pool."""
    for name, figure in draw_image(run, schedules):
        kind = (name, len(figure.axes))
        LAYOUTS[kind] = save_figure(
            figure, run.folder / ANALYSIS / f"{run.records[0].index:04d}_{name}", pdf, LAYOUTS.get(kind)
        )


def save_contact_sheets(run: Run) -> None:
    """Draws all images of a run, in a process of a pool."""
    for name, figure in draw_contact_sheets(run):
        save_figure(figure, run.folder / ANALYSIS / name)


def draw_folders(runs: Iterable[Run], each_image: bool = True, anew: bool = True, pdf: bool = False) -> None:
    """Draws the figures of runs into their ANALYSIS folders.

    Those that are pooled over images are written as PNG and as PDF. Each image's, and the contact sheets,
    take most of the time and are drawn by several processes.

    Args:
        each_image: whether to draw each image's.
        anew: also those that are there and up to date.
        pdf: each image's as PDF, too.
    """
    runs = list(runs)
    work = [
        Run(run.folder, run.configuration, [record])
        for run in runs
        for record in run.records
        if each_image and (anew or not is_drawn(record.path))
    ]
    with ProcessPoolExecutor(
        min(os.cpu_count() or 1, 16, len(work) + len(runs)), multiprocessing.get_context("spawn")
    ) as pool:
        for run in runs:
            (run.folder / ANALYSIS).mkdir(exist_ok=True)
        schedules = {run.folder: named_schedules(len(run.timesteps)) for run in runs}
        images = [pool.submit(save_image_figures, image, schedules[image.folder], pdf) for image in work]
        sheets = [pool.submit(save_contact_sheets, run) for run in runs]
        for run in runs:
            for name, figure in draw_runs({short(run.folder.absolute().name): run}, schedules[run.folder]):
                save_figure(figure, run.folder / ANALYSIS / name)
        for drawn in (*images, *sheets):
            drawn.result()


def is_drawn(record: Path) -> bool:
    """Whether the figure of an image that is written last is there, and younger than the image's record and
    this file.
    """
    last = record.parent / ANALYSIS / record.name.replace("record.npz", "contact_sheet.png")
    return last.exists() and last.stat().st_mtime >= max(
        record.stat().st_mtime, Path(__file__).stat().st_mtime
    )


def draw_comparison(runs: Mapping[str, Run], folder: Path, prefix: str = "") -> None:
    """Draws the pooled figures of several runs, side by side with common axes and on the same axes, into the
    ANALYSIS folder of `folder`.
    """
    (folder / ANALYSIS).mkdir(parents=True, exist_ok=True)
    for name, figure in draw_runs(runs, named_schedules(len(next(iter(runs.values())).timesteps))):
        save_figure(figure, folder / ANALYSIS / f"{prefix}{name}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="output folder of main.py, or a mode's folder inside that of compare.py",
    )
    parser.add_argument(
        "--anew",
        action="store_true",
        help="draw each image's figures again, also where they are younger than the image's record and "
        "utils.py",
    )
    parser.add_argument(
        "--pdf",
        action="store_true",
        help="each image's figures as PDF, too; those that are pooled over images always are",
    )
    arguments = parser.parse_args(argv)
    try:
        names = [short(str(folder)) for folder in arguments.runs]
        runs = {
            name if names.count(name) == 1 else f"{k}: {name}": read_run(folder)
            for k, (name, folder) in enumerate(zip(names, arguments.runs), 1)
        }
        draw_folders(runs.values(), anew=arguments.anew or arguments.pdf, pdf=arguments.pdf)
        for run in runs.values():
            if (run.folder / "results.json").is_file():
                from report import write_page  # which needs this file itself

                write_page(run)
        if len(runs) > 1:
            draw_comparison(runs, arguments.runs[0], "compared_")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
