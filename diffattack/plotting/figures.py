"""Figures of runs: arrays in, a matplotlib `Figure` out. Losses by timestep and layer, weights, success."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffattack.data.summaries import LossSums, loss_sums, mean_and_deviation, mean_without_nan, normalised

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffattack.evaluation.statistics import Estimate

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
# beside matplotlib's own, which has neither Chinese nor Devanagari, for names of classes and files
OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Devanagari", "WenQuanYi Zen Hei")
OTHER_FONTS += ("Microsoft YaHei", "PingFang SC", "Arial Unicode MS")
# Okabe and Ito's, for the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
REFERENCE_LINES = (":", "--", "-.", (0, (1, 3)))
COLUMN, DPI = 3.4, 160  # inches, dots an inch
ONE_BY_ONE = 50  # images whose weights are drawn beside each other; of more nothing could be told apart
# measures of visibility that success is drawn over, and which way they go
MORE_IS_LESS_VISIBLE = {"PSNR dB": True, "SSIM": True, "L2": False}


@functools.cache
def style() -> dict[str, object]:
    """STYLE, with the fonts of other scripts that are here."""
    from matplotlib.font_manager import get_font_names

    return STYLE | {"font.family": ["DejaVu Sans", *(set(OTHER_FONTS) & set(get_font_names()))]}


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws with STYLE, and leaves matplotlib's settings as they were."""

    @functools.wraps(function)
    def draw(*arguments, **options) -> Figure:
        from matplotlib import rc_context

        with rc_context(style()):
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


@functools.cache
def timestep_colours(count: int) -> list[str]:
    """Always the same, from early (dark) to late."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return list(map(to_hex, colormaps["viridis"](np.linspace(0, 0.9, count))))


def timestep_axis(panel: Axes, timesteps: Sequence[int | str]) -> None:
    rotation = 45 if len(timesteps) > 6 else 0
    panel.set_xticks(range(len(timesteps)), list(map(str, timesteps)), rotation=rotation)
    panel.set_xlabel("timestep t, early to late")


def iteration_axis(panel: Axes, label: str = "iteration") -> None:
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel(label)


def legend_below(figure: Figure, panel: Axes) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def log_scale(panel: Axes) -> None:
    """A logarithmic axis, where a curve has a value that it can show."""
    if any((np.nan_to_num(np.asarray(line.get_ydata(), np.float64)) > 0).any() for line in panel.lines):
        panel.set_yscale("log")


def plot_curve(panel: Axes, x: Sequence[float], values: np.ndarray, **options) -> None:
    """The median of values `(images, len(x))`, and, of several images, their quartiles as a band; NaN left
    out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about columns that are all NaN
        middle, low, high = np.nanquantile(values, (0.5, 0.25, 0.75), axis=0)
    (line,) = panel.plot(x, middle, **options)
    if len(values) > 1:
        panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


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
            values = np.where(values > 0, values, np.nan)
            look = {"color": colour, "marker": "o", "markersize": 3, "label": f"iteration {iteration}"}
            plot_curve(panel, range(len(timesteps)), values, **look)
        if not (losses[:, [iteration - 1 for iteration in shown]] > 0).any():
            text = "zero: the attack starts at\nthe unperturbed run"
            panel.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
        timestep_axis(panel, timesteps)
        panel.set_title(name)
        log_scale(panel)
    panels[0, 0].set_ylabel("$L_i$, summed over layers")
    legend_below(figure, panels[0, -1])
    return figure


@styled
def plot_loss_heatmap(runs: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """`L_i`, timestep by iteration, the mean over images; arguments as for `plot_loss_per_timestep`."""
    from matplotlib.colors import LogNorm, Normalize

    title = "Self-attention loss by timestep and iteration"
    figure, panels = new_figure(title, 1, len(runs), height=2.0, sharey=True)
    means = [mean_without_nan(losses) for losses in runs.values()]
    positive = np.concatenate([mean[mean > 0] for mean in means])
    norm = LogNorm(positive.min(), positive.max()) if len(positive) else Normalize(0, 1)
    for panel, name, mean in zip(panels[0], runs, means):
        panel.set_facecolor("0.85")  # seen where there is no value, or zero
        look = {"norm": norm, "cmap": "cividis", "aspect": "auto", "interpolation": "none"}
        extent = (0.5, len(mean) + 0.5, len(timesteps) - 0.5, -0.5)
        drawn = panel.imshow(np.where(mean > 0, mean, np.nan).T, extent=extent, **look)
        panel.set_yticks(range(len(timesteps)), [str(t) for t in timesteps])
        panel.set_title(name)
        iteration_axis(panel)
    panels[0, 0].set_ylabel("timestep t, early to late")
    figure.colorbar(drawn, ax=panels, label="$L_i$")
    return figure


@styled
def plot_weight_curves(
    runs: Mapping[str, np.ndarray], timesteps: Sequence[int], schedules: Mapping[str, np.ndarray] = {}
) -> Figure:
    """The weight of each timestep over iterations, a panel for each run.

    Up to ONE_BY_ONE images are drawn one after the other. Of more, where weights start anew with each image,
    it is the median over images in each iteration, with quartiles; where they go on from image to image, as
    in mode learnable, the weights at the end of each image.

    Args:
        runs: by name, weights `(images, iterations, N)` that sum to 1 over N.
        timesteps: the N attacked timesteps, early to late.
        schedules: by name, weights `(N,)` that are drawn as reference lines.
    """
    from matplotlib.lines import Line2D

    figure, panels = new_figure("Weights of the attacked timesteps", 1, len(runs), sharey=True)
    colours, styles = timestep_colours(len(timesteps)), dict(zip(schedules, itertools.cycle(REFERENCE_LINES)))
    for panel, (name, weights) in zip(panels[0], runs.items()):
        subtitle = draw_weights(panel, weights, timesteps)
        for (schedule, style), (i, colour) in itertools.product(styles.items(), enumerate(colours)):
            panel.axhline(schedules[schedule][i], color=colour, linestyle=style, linewidth=0.6, alpha=0.7)
        panel.set(title=f"{name}{subtitle}", ylim=(0, 1))
    panels[0, 0].set_ylabel("weight (sum 1)")
    handles = panels[0, 0].get_legend_handles_labels()[0]
    for name, style in styles.items():
        handles.append(Line2D([], [], color="0.4", linestyle=style, linewidth=0.8, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2 + len(runs), 4))
    return figure


def draw_weights(panel: Axes, weights: np.ndarray, timesteps: Sequence[int]) -> str:
    """Draws weights `(images, iterations, N)`, and returns what of them that is, where it is not all."""
    images, iterations = weights.shape[:2]
    subtitle, label = "", "iteration" if images == 1 else f"iteration, over {images} images"
    if images <= ONE_BY_ONE:
        shown = weights.reshape(1, -1, len(timesteps))
    elif (weights[:, 0] == weights[0, 0]).all():  # they start anew
        # of a view of one image's, since all have the same, that one
        shown = weights[:1] if weights.strides[0] == 0 else weights
        subtitle, label = f"\n(median and quartiles over {images:,} images)", "iteration"
    else:
        shown = weights[None, :, -1]
        subtitle, label = f"\n(at the end of each of {images:,} images)", "image"
    x = np.arange(1, shown.shape[1] + 1)
    for i, (t, colour) in enumerate(zip(timesteps, timestep_colours(len(timesteps)))):
        options = {"color": colour, "label": f"t = {t}", "marker": "." if len(x) == 1 else None}
        plot_curve(panel, x, shown[..., i], **options)
    for k in range(1, images if images <= ONE_BY_ONE else 0):
        panel.axvline(k * iterations + 0.5, color="0.85", linewidth=0.5, zorder=0)
    iteration_axis(panel, label)
    return subtitle


@styled
def plot_average_loss_per_timestep(
    runs: Mapping[str, np.ndarray | LossSums], timesteps: Sequence[int]
) -> Figure:
    """Each timestep's share of the self-attention loss, mean and standard deviation; above over all layers,
    below at the first layer alone.

    Args:
        runs: by name, losses `(images, iterations, N, L)`, or their sums. The deviation is over images, of a
            single one over its iterations.
        timesteps: the N attacked timesteps, early to late.
    """
    single = all(len(losses) == 1 for losses in runs.values())
    over = "iterations" if single else "images"
    title = f"Share of the self-attention loss\n(mean and deviation over {over})"
    figure, panels = new_figure(title, 2, len(runs), 1.9, sharex=True, sharey=True)
    look = {"color": timestep_colours(len(timesteps)), "error_kw": {"linewidth": 0.8, "capsize": 2}}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7}
    for column, (name, losses) in zip(panels.T, runs.items()):
        sums = loss_sums(losses)
        shown = [sums.timestep_shares, sums.first_layer_shares]
        if single:
            shown = [normalised(losses[0]) for losses in (sums.by_timestep, sums.of_first_layer)]
        for panel, shares in zip(column, shown):
            mean, deviation = mean_and_deviation(shares)
            bars = panel.bar(range(len(timesteps)), 100 * mean, yerr=100 * deviation, **look)
            panel.axhline(100 / len(timesteps), color="0.3", linewidth=0.8, linestyle="--")
            times = [f"{share * len(timesteps):.1f}x" for share in mean]
            panel.bar_label(bars, times, padding=2, fontsize=7, bbox=box)
            panel.margins(y=0.15)
        column[0].set_title(name)
        timestep_axis(column[1], timesteps)
    panels[0, 0].set_ylabel("% of all layers")
    panels[1, 0].set_ylabel("% of the first layer")
    return figure


@styled
def plot_layer_shares(
    runs: Mapping[str, np.ndarray | LossSums], timesteps: Sequence[int], layers: Sequence[str]
) -> Figure:
    """Each layer's share of each timestep's self-attention loss, and of all of it, in percent; the mean over
    images.

    Args:
        runs: by name, losses `(images, iterations, N, L)`, or their sums.
        timesteps: the N attacked timesteps, early to late.
        layers: L names.
    """
    title, height = "Share of each layer in the self-attention loss, %", 0.8 + 0.18 * len(layers)
    figure, panels = new_figure(title, 1, len(runs), height, sharey=True)
    means = []
    for losses in runs.values():
        sums = loss_sums(losses)
        # one timestep after the other, since shares take more memory than the sums
        by_timestep = [mean_without_nan(normalised(sums.by_layer[:, i])) for i in range(len(timesteps))]
        means.append(100 * np.stack([*by_timestep, mean_without_nan(sums.layer_shares)], 1))
    top = max(1.0, np.nan_to_num(means).max())
    for panel, name, mean in zip(panels[0], runs, means):
        panel.imshow(mean, aspect="auto", vmin=0, vmax=top, cmap="cividis", interpolation="none")
        for (k, i), value in np.ndenumerate(mean):
            if np.isfinite(value):
                text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
                colour = "white" if value < 0.6 * top else "black"
                panel.text(i, k, text, ha="center", va="center", fontsize=6, color=colour)
        panel.axvline(len(timesteps) - 0.5, color="white", linewidth=2)
        timestep_axis(panel, [*timesteps, "all"])
        panel.set_yticks(range(len(layers)), layers)
        panel.set_title(name)
    return figure


@styled
def plot_overlay(
    runs: Mapping[str, tuple[np.ndarray | LossSums, np.ndarray, np.ndarray]], timesteps: Sequence[int]
) -> Figure:
    """Several runs on the same axes: self-attention and attack loss, confidence, and each timestep's share;
    medians over images, with quartiles.

    Args:
        runs: by name, losses by layer `(images, iterations, N, L)` or their sums, cross-entropy and
            confidence `(images, iterations)`.
        timesteps: the N attacked timesteps, early to late.
    """
    figure, ((structure, attack), (certainty, share)) = new_figure("Runs on the same axes", 2, 2, height=2.1)
    for colour, (name, (losses, cross_entropy, confidence)) in zip(itertools.cycle(PALETTE), runs.items()):
        sums, x = loss_sums(losses), np.arange(1, confidence.shape[1] + 1)
        options = {"color": colour, "label": name, "marker": "." if len(x) == 1 else None}
        plot_curve(structure, x, np.where(sums.by_iteration > 0, sums.by_iteration, np.nan), **options)
        plot_curve(attack, x, cross_entropy, **options)
        plot_curve(certainty, x, confidence, **options)
        options |= {"marker": "o", "markersize": 3}
        plot_curve(share, range(len(timesteps)), 100 * sums.timestep_shares, **options)
    share.axhline(100 / len(timesteps), color="0.3", linewidth=0.8, linestyle="--")
    timestep_axis(share, timesteps)
    log_scale(structure)
    for panel in (structure, attack, certainty):
        iteration_axis(panel)
    structure.set_ylabel("sum of $L_i$")
    attack.set_ylabel("cross-entropy (nats)")
    certainty.set(ylabel="confidence in the true class", ylim=(-0.02, 1.02))
    share.set_ylabel("share of the sum, %")
    legend_below(figure, structure)
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
    title = f"Attack success against {measure} (95 % intervals)"
    figure, panels = new_figure(title, 1, len(rates), sharex=True, sharey=True)
    for panel, rate in zip(panels[0], rates):
        for colour, (run, figures) in zip(itertools.cycle(PALETTE), points.items()):
            x, y = np.array(figures[measure]), 100 * np.array(figures[rate])  # value, low, high
            ends = {"xerr": np.abs(x[1:, None] - x[0]), "yerr": np.abs(y[1:, None] - y[0])}
            look = {"fmt": "o", "markersize": 4, "color": colour, "capsize": 2, "elinewidth": 0.8}
            panel.errorbar(x[:1], y[:1], **ends, **look, label=run)
        way = "higher" if measure == "SSIM" else "lower"
        panel.set(title=rate, xlabel=f"{measure} ({way}: less visible)", ylim=(-2, 102))
        panel.xaxis.get_major_locator().set_params(nbins=4)
    panels[0, 0].set_ylabel("attack success, % of right before")
    legend_below(figure, panels[0, 0])
    return figure


@styled
def plot_tradeoff(rates: Mapping[str, Sequence[Mapping[str, Estimate]]], title: str) -> Figure:
    """Success rates over how visible the attack is, a curve for each run or mode with a point for each of its
    iterations, or values of a flag; bands are 95 % intervals of the rates.

    Args:
        rates: by run, at each point, figures of visibility and success rates by name.
    """
    first = next(iter(rates.values()))[0]
    shown = [name for name, figure in first.items() if figure.is_share]
    measures = [name for name in MORE_IS_LESS_VISIBLE if name in first]
    figure, panels = new_figure(title, len(shown), len(measures), sharey=True)
    for row, rate in zip(panels, shown):
        for panel, measure in zip(row, measures):
            for colour, (run, points) in zip(itertools.cycle(PALETTE), rates.items()):
                points = sorted(points, key=lambda figures: figures[measure].value)
                x = [figures[measure].value for figures in points]
                ends = [(figures[rate].value, figures[rate].low, figures[rate].high) for figures in points]
                y, low, high = 100 * np.transpose(ends)
                panel.plot(x, y, color=colour, marker="o", markersize=3, label=run)
                panel.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
            way = "higher" if MORE_IS_LESS_VISIBLE[measure] else "lower"
            panel.set(xlabel=f"{measure} ({way}: less visible)", ylim=(-2, 102))
        row[0].set_ylabel(f"{rate}, %")
    legend_below(figure, panels[0, 0])
    return figure
