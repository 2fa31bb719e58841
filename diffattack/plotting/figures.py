"""Figures of runs, each a matplotlib `Figure`: losses by timestep and layer, weights, success.

Their margins are fixed, in inches, since matplotlib takes longer to search for them than to draw.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import LogFormatter, LogLocator

from diffattack.data.records import Run
from diffattack.data.summaries import mean_and_deviation, mean_without_nan, normalised
from diffattack.evaluation.statistics import Estimate
from diffattack.evaluation.tables import MEASURES

# beside matplotlib's own, which has neither Chinese nor Devanagari, for names of classes and files
OTHER_FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Devanagari", "WenQuanYi Zen Hei"}
OTHER_FONTS |= {"Microsoft YaHei", "PingFang SC", "Arial Unicode MS"}
STYLE = {  # legible at the width of one column of a two-column paper, and as real fonts in its PDF
    "font.family": ["DejaVu Sans", *(OTHER_FONTS & set(get_font_names()))],
    "font.size": 8,
    "axes.titlesize": 8,
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
styled = rc_context(STYLE)  # of a function that draws, which leaves matplotlib's settings as they were
# Okabe and Ito's, for the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
REFERENCE_LINES = (":", "--", "-.", (0, (1, 3)))
COLUMN, DPI = 3.4, 160  # inches, dots an inch
ONE_BY_ONE = 50  # images whose weights are drawn beside each other; of more nothing could be told apart
VISIBILITY = ("PSNR dB", "SSIM", "L2", "LPIPS")  # measures that success is drawn over, where they are known
LOSSES = (
    "attack: cross-entropy (nats)",
    "self-attention: sum of Lᵢ",
    "self-attention: sum of cᵢ Lᵢ",
    "cross-attention: variance",
)


def new_figure(
    title: str,
    names: Sequence[str],
    labels: Sequence[str],
    height: float = 1.5,
    left: float = 0.7,
    gaps: tuple[float, float] = (0.15, 0.15),
    right: float = 0.1,
    **options,
) -> tuple[Figure, np.ndarray]:
    """A figure with `(len(labels), len(names))` panels: one column fills that of a paper, several are
    narrower each.

    Args:
        names, labels: what stands above each column, and beside each row.
        height, left, gaps, right: inches of a panel, beside the panels, and between columns and rows.
        options: of `Figure.subplots`.
    """
    columns, rows, lines = len(names), len(labels), title.count("\n") + 1
    width = COLUMN if columns == 1 else 2.5 * columns
    top, bottom = 0.3 + 0.15 * lines, 0.45
    whole = top + rows * height + (rows - 1) * gaps[1] + bottom
    figure = Figure(figsize=(width, whole))
    panel_width = (width - left - right - (columns - 1) * gaps[0]) / columns
    place = {"left": left / width, "right": 1 - right / width, "wspace": gaps[0] / panel_width}
    place |= {"bottom": bottom / whole, "top": 1 - top / whole, "hspace": gaps[1] / height}
    figure.subplots_adjust(**place)
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title, y=1 - 0.05 / whole)
    for (row, column), panel in np.ndenumerate(panels):  # all texts without a search for their places
        panel.set_title(names[column] if row == 0 else "", y=1)
        panel.set_ylabel(labels[row] if column == 0 else "")
        panel.xaxis.set_label_coords(0.5, -0.25 / height)
        panel.yaxis.set_label_coords((0.05 - (gaps[0] if column else left)) / panel_width, 0.5)
        panel.yaxis.label.set_verticalalignment("top")
    return figure, panels


def legend_below(figure: Figure, *panels: Axes) -> None:
    """A legend of these panels, in as many columns as there is room for; the figure grows by its lines."""
    handles = [handle for panel in panels for handle in panel.get_legend_handles_labels()[0]]
    width, height = figure.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), max(1, int(width / (0.5 + 0.055 * longest))))
    below = 0.1 + 0.16 * -(-len(handles) // columns)
    place, scale = figure.subplotpars, height / (height + below)
    figure.set_size_inches(width, height + below)
    figure.subplots_adjust(top=1 - (1 - place.top) * scale, bottom=1 - (1 - place.bottom) * scale)
    figure.legend(handles=handles, loc="lower center", ncols=columns)


def timestep_colours(count: int) -> list[str]:
    """Always the same, from early (dark) to late."""
    return list(map(to_hex, colormaps["viridis"](np.linspace(0, 0.9, count))))


def timestep_axis(panel: Axes, timesteps: Sequence[int | str]) -> None:
    panel.set_xticks(range(len(timesteps)), timesteps, rotation=45 if len(timesteps) > 6 else 0)
    panel.set_xlabel("timestep t, early to late")


def iteration_axis(panel: Axes, label: str = "iteration") -> None:
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel(label)


def log_scale(panel: Axes) -> None:
    """Its numbers as plain text, which is drawn ten times as fast as formulas."""
    panel.set_yscale("log")
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 4)))
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 2)))


def plot_curve(panel: Axes, x: Sequence[float], values: np.ndarray, **options) -> None:
    """The median of values `(images, len(x))`, and, of several images, their quartiles as a band; NaN left
    out. A single point is a dot.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about columns that are all NaN
        middle, low, high = np.nanquantile(values, (0.5, 0.25, 0.75), axis=0)
    (line,) = panel.plot(x, middle, **{"marker": "." if len(x) == 1 else None} | options)
    if len(values) > 1:
        panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def positive(values: np.ndarray) -> np.ndarray:
    """In float64, for a logarithmic axis: NaN where they are not positive."""
    return np.where(values > 0, values, np.nan).astype(np.float64)


# ---------------------------------------------------------------- losses by timestep and layer

Runs = Mapping[str, Run]  # by the names that stand above their panels; of the same timesteps and layers


@styled
def plot_loss_per_timestep(losses: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """`L_i` over the timesteps at the first, middle and last iterations; the median over images, with
    quartiles. In iteration 1 all are zero, so that the first that is drawn is 2.

    Args:
        losses: by name, `(images, K, N)`, a panel for each.
        timesteps: N, early to late.
    """
    labels = ["Lᵢ, summed over layers"]
    figure, panels = new_figure("Self-attention loss of each timestep", [*losses], labels, sharey=True)
    log_scale(panels[0, 0])
    for panel, values in zip(panels[0], losses.values()):
        last = values.shape[1]
        shown = sorted({2, max(2, (last + 1) // 2), last}) if last > 1 else [1]
        for iteration, colour in zip(shown, ("#56B4E9", "#0072B2", "#000000")):
            look = {"color": colour, "marker": "o", "markersize": 3, "label": f"iteration {iteration}"}
            plot_curve(panel, range(len(timesteps)), positive(values[:, iteration - 1]), **look)
        timestep_axis(panel, timesteps)
    legend_below(figure, panels[0, 0])
    return figure


@styled
def plot_average_loss_per_timestep(runs: Runs) -> Figure:
    """Each timestep's share of the self-attention loss, mean and standard deviation over images; above over
    all layers, below at the first layer alone.
    """
    title = "Share of the self-attention loss\n(mean and deviation over images)"
    labels, timesteps = ["% of all layers", "% of the first layer"], next(iter(runs.values())).timesteps
    figure, panels = new_figure(title, [*runs], labels, sharex=True, sharey=True)
    look = {"color": timestep_colours(len(timesteps)), "error_kw": {"linewidth": 0.8, "capsize": 2}}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7}
    for column, run in zip(panels.T, runs.values()):
        sums = run.summary.structure
        for panel, shares in zip(column, (sums.timestep_shares, sums.first_layer_shares)):
            mean, deviation = mean_and_deviation(shares)
            bars = panel.bar(range(len(timesteps)), 100 * mean, yerr=100 * deviation, **look)
            panel.axhline(100 / len(timesteps), color="0.3", linewidth=0.8, linestyle="--")
            times = [f"{share * len(timesteps):.1f}x" for share in mean]
            panel.bar_label(bars, times, padding=2, fontsize=7, bbox=box)
            panel.margins(y=0.15)
        timestep_axis(column[1], timesteps)
    return figure


@styled
def plot_layer_shares(runs: Runs) -> Figure:
    """Each layer's share of each timestep's self-attention loss, and of all of it, in percent; the mean over
    images. Of a run whose layers are normalised, also what they would be without.
    """
    first, shown = next(iter(runs.values())), {}
    timesteps, layers = first.timesteps, first.layers
    for name, run in runs.items():
        losses = run.summary.structure.by_layer  # (images, N, L)
        if run.configuration["layer_norm"] == "mse":
            shown[name] = losses
        else:
            shown |= {f"{name}, mse": losses * run.summary.reference_squares, f"{name}, relative": losses}
    title, height = "Share of each layer in the self-attention loss, %", 0.18 * len(layers)
    figure, panels = new_figure(title, [*shown], [""], height=height, left=1.1, sharey=True)
    with_all = [np.concatenate([losses, losses.sum(1, keepdims=True)], 1) for losses in shown.values()]
    means = [100 * mean_without_nan(normalised(losses)).T for losses in with_all]  # (L, N + 1)
    top = max(1.0, np.nan_to_num(means).max())
    for panel, mean in zip(panels[0], means):
        panel.imshow(mean, aspect="auto", vmin=0, vmax=top, cmap="cividis", interpolation="none")
        for k, i in np.argwhere(np.isfinite(mean)):
            text = f"{mean[k, i]:.2g}" if mean[k, i] < 10 else f"{mean[k, i]:.0f}"
            colour = "white" if mean[k, i] < 0.6 * top else "black"
            panel.text(i, k, text, ha="center", va="center", fontsize=6, color=colour)
        panel.axvline(len(timesteps) - 0.5, color="white", linewidth=2)
        timestep_axis(panel, [*timesteps, "all"])
        panel.set_yticks(range(len(layers)), layers)
    return figure


# ---------------------------------------------------------------- what happens over the iterations


@styled
def plot_weight_curves(
    weights: Mapping[str, np.ndarray], timesteps: Sequence[int], schedules: Mapping[str, np.ndarray] = {}
) -> Figure:
    """The weight of each timestep over iterations.

    Args:
        weights: by name, `(images, K, N)`, a panel for each.
        timesteps: N, early to late.
        schedules: by name, weights `(N,)` that are drawn as reference lines.
    """
    title, labels = "Weights of the attacked timesteps", ["weight (sum 1)"]
    figure, panels = new_figure(title, [*weights], labels, sharey=True)
    styles = dict(zip(schedules, itertools.cycle(REFERENCE_LINES)))
    for panel, values in zip(panels[0], weights.values()):
        shown, label = weights_over_iterations(values)
        for i, (t, colour) in enumerate(zip(timesteps, timestep_colours(len(timesteps)))):
            plot_curve(panel, range(1, shown.shape[1] + 1), shown[..., i], color=colour, label=f"t = {t}")
            for name, style in styles.items():
                panel.axhline(schedules[name][i], color=colour, linestyle=style, linewidth=0.6, alpha=0.7)
        iteration_axis(panel, label)
        panel.set_ylim(0, 1)
    for name, style in styles.items():  # for the legend
        panels[0, 0].plot([], [], linestyle=style, color="0.4", linewidth=0.8, label=name)
    legend_below(figure, panels[0, 0])
    return figure


def weights_over_iterations(weights: np.ndarray) -> tuple[np.ndarray, str]:
    """What is drawn of weights `(images, K, N)`, `(images or 1, points, N)`, and over what.

    Up to ONE_BY_ONE images are drawn one after the other. Of more, where weights start anew with each image,
    all images in each iteration; where they go on from image to image, as in mode learnable, the weights at
    the end of each image.
    """
    images = f"{len(weights):,} images"
    if len(weights) <= ONE_BY_ONE:
        return weights.reshape(1, -1, weights.shape[2]), f"iteration, over {images}"
    if (weights[:, 0] == weights[0, 0]).all():
        return weights, f"iteration, median over {images}"
    return weights[None, :, -1], f"at the end of each of {images}"


@styled
def plot_losses(runs: Runs) -> Figure:
    """The losses before and after their factors, how strong the attention terms are beside the attack's, and
    the surrogate's confidence, with the share of images that have been fooled, over iterations; medians over
    images, with quartiles.
    """
    options = {"height": 1.1, "left": 0.8, "sharex": "col", "sharey": "row"}
    labels = ["loss", "loss times factor", "gradient, %\nof the attack's", "probability"]
    figure, panels = new_figure("Losses and confidence", [*runs], labels, **options)
    for panel in panels[:3].flat:
        log_scale(panel)
    for (raw, weighted, gradients, last), run in zip(panels.T, runs.values()):
        x = range(1, run.summary.losses.shape[-1] + 1)
        for k, label in enumerate(LOSSES):
            values, look = positive(run.summary.losses[:, k]), {"color": PALETTE[k], "label": label}
            plot_curve(raw, x, values, **look)
            if k != 1:
                plot_curve(weighted, x, run.factors[:, k] * values, **look)
        for k, shares in zip((2, 3), np.moveaxis(run.gradient_shares_by_image, -1, 0)):
            look = {"color": PALETTE[k], "marker": "o", "markersize": 3}
            plot_curve(gradients, run.gradient_iterations, 100 * positive(shares), **look)
        plot_curve(last, x, run.summary.confidence, color=PALETTE[6], label="confidence in the true class")
        share = np.maximum.accumulate(run.summary.fooled, axis=-1).mean(0)
        last.step(x, share, "--", where="mid", color=PALETTE[1], label="share of images fooled so far")
        last.set_ylim(-0.02, 1.02)
        iteration_axis(last)
    legend_below(figure, panels[0, 0], panels[3, 0])
    return figure


# ---------------------------------------------------------------- success over visibility


@styled
def plot_tradeoff(rates: Mapping[str, Sequence[Mapping[str, Estimate]]], title: str) -> Figure:
    """Success rates over how visible the attack is, of each run or mode at one or several points, such as its
    iterations or values of a flag; bars are 95 % intervals.

    Args:
        rates: by run, at each point, figures of visibility and success rates by name.
    """
    first = next(iter(rates.values()))[0]
    shown = [name for name, figure in first.items() if figure.is_share]
    measures = [name for name in VISIBILITY if name in first]
    rows, columns = (len(shown), len(measures)) if len(measures) > 1 else (1, len(shown))
    labels = ["attack success, %"] * rows
    figure, panels = new_figure(title, [""] * columns, labels, gaps=(0.25, 0.65), sharey=True)
    for panel, (rate, measure) in zip(panels.flat, itertools.product(shown, measures)):
        for colour, (run, points) in zip(itertools.cycle(PALETTE), rates.items()):
            points = sorted(points, key=lambda figures: figures[measure].value)
            x, x_ends = values_and_ends([figures[measure] for figures in points])
            y, y_ends = values_and_ends([figures[rate] for figures in points])
            look = {"color": colour, "marker": "o", "markersize": 3, "elinewidth": 0.7, "label": run}
            panel.errorbar(x, 100 * y, 100 * y_ends, x_ends, **look)
        panel.set_xlabel(f"{measure} ({MEASURES[measure][0]}: less visible)")
        panel.xaxis.get_major_locator().set_params(nbins=4)
        panel.set_title(rate, y=1)
    panels[0, 0].set_ylim(-2, 102)
    legend_below(figure, panels[0, 0])
    return figure


def values_and_ends(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """`(P,)`, and how far below and above them the intervals go, `(2, P)`."""
    values, *ends = np.transpose([(one.value, one.low, one.high) for one in estimates])
    return values, np.abs(ends - values)
