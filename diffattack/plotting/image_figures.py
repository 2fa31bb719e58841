"""Figures of single images: arrays in, a matplotlib `Figure` out. Losses, attention, contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffattack.plotting.figures import PALETTE, iteration_axis, log_scale, new_figure, plot_curve, styled

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffattack.data.records import Run

AMPLIFIED = 8  # times, of the absolute difference
LOSSES = (
    "attack: cross-entropy (nats)",
    "self-attention: sum of $L_i$",
    "self-attention: sum of $c_i L_i$",
    "cross-attention: variance",
)


@dataclass(frozen=True)
class LossCurves:
    """What `plot_losses` draws of a run; K iterations, M of them measured."""

    losses: np.ndarray  # (images, 4, K), in the order of LOSSES
    factors: np.ndarray  # (images, 4, K), of each in what is minimised
    confidence: np.ndarray  # (images, K), in the true class
    fooled: np.ndarray  # (images, K), bool
    gradient_shares: np.ndarray  # (images, M, 2): self- and cross-attention's gradient over the attack's
    gradient_iterations: Sequence[int]  # M of them

    @classmethod
    def of(cls, run: Run) -> LossCurves:
        of_all, gradients = run.summary, (run.gradient_shares_by_image, run.gradient_iterations)
        return cls(of_all.losses, run.factors, of_all.confidence, of_all.fooled, *gradients)


@styled
def plot_losses(runs: Mapping[str, LossCurves]) -> Figure:
    """The losses before and after their factors, how strong the attention terms are beside the attack's, and
    the surrogate's confidence, over iterations; medians over images, with quartiles.

    Of a single image the first iteration in which it is fooled is marked, of several the share that has been.
    """
    figure, panels = new_figure("Losses and confidence", 4, len(runs), height=1.5, sharex="col", sharey="row")
    for column, (name, curves) in zip(panels.T, runs.items()):
        losses, confidence, fooled = curves.losses, curves.confidence, curves.fooled
        x = np.arange(1, losses.shape[-1] + 1)
        marker = "." if len(x) == 1 else None
        for k, label in enumerate(LOSSES):
            values = np.where(losses[:, k] > 0, losses[:, k], np.nan).astype(np.float64)
            look = {"color": PALETTE[k], "label": label, "marker": marker}
            plot_curve(column[0], x, values, **look)
            if k != 1:
                plot_curve(column[1], x, curves.factors[:, k] * values, **look)
        for k, shares in zip((2, 3), np.moveaxis(curves.gradient_shares, -1, 0)):
            shown = 100 * np.where(shares > 0, shares, np.nan).astype(np.float64)
            plot_curve(column[2], curves.gradient_iterations, shown, color=PALETTE[k], marker="o", ms=3)
        look = {"color": PALETTE[6], "label": "confidence in the true class", "marker": marker}
        plot_curve(column[3], x, confidence, **look)
        for panel in column[:3]:  # before there is a line that marks an iteration, and is no curve
            log_scale(panel)
        mark_fooled(column, np.maximum.accumulate(fooled, axis=-1))
        column[0].set_title(name)
        column[3].set_ylim(-0.02, 1.02)
        iteration_axis(column[3])
    labels = ("loss", "loss times factor", "gradient, %\nof the attack's", "probability")
    for panel, label in zip(panels[:, 0], labels):
        panel.set_ylabel(label)
    handles = [panel.get_legend_handles_labels()[0] for panel in (panels[0, 0], panels[3, 0])]
    figure.legend(handles=sum(handles, []), loc="outside lower center", ncols=min(3, len(runs)))
    return figure


def mark_fooled(panels: Sequence[Axes], ever: np.ndarray) -> None:
    """From which images have been fooled so far, `(images, K)`: of several images their share, into the last
    of the panels; of one where it is fooled first, into all.
    """
    x, look = np.arange(1, ever.shape[1] + 1), {"color": PALETTE[1], "linestyle": "--"}
    if len(ever) > 1:
        panels[-1].step(x, ever.mean(0), where="post", label="share of images fooled so far", **look)
    elif ever.any():
        flip = int(x[ever[0].argmax()])
        for panel in panels:
            panel.axvline(flip, linewidth=0.9, **look)
        text = f"fooled at iteration {flip}"
        panels[-1].annotate(text, (flip, 0.5), (4, 0), textcoords="offset points", fontsize=7)


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
    title = "Attention without the attack (above) and with it (below)"
    figure, panels = new_figure(title, 2, columns, layout="compressed")
    figure.set_size_inches(1.25 * columns, 3.1)
    side = clean.shape[0]
    for row, image in enumerate((clean, adversarial)):
        grey = np.asarray(Image.fromarray(image).convert("L"))
        for k, token in enumerate(class_tokens):
            panel, low, top = panels[row, k], class_attention[:, k].min(), class_attention[:, k].max()
            extent = (0, side, side, 0)
            panel.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
            look = {"cmap": "inferno", "vmin": low, "vmax": top, "alpha": 0.6, "interpolation": "bilinear"}
            panel.imshow(class_attention[row, k], extent=extent, **look)
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
    # a grid of squares has its places without being searched for
    figure, panels = new_figure("", len(rows), 4, layout=None)
    height = 2.1 * len(rows) + 0.7
    figure.set_size_inches(7, height)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.36 / height, bottom=0.62 / height, wspace=0.04, hspace=0.24
    )
    signed = [(adversarial.astype(np.float64) - clean).mean(-1) for clean, adversarial, _, _ in rows]
    # the few strongest pixels would leave nothing to be seen of the others
    top = max(1.0, np.ceil(np.quantile(np.abs(signed), 0.995)))
    for row, difference, (clean, adversarial, before, after) in zip(panels, signed, rows):
        row[0].imshow(clean)
        row[1].imshow(adversarial)
        drawn = row[2].imshow(difference, cmap="RdBu_r", vmin=-top, vmax=top)
        row[3].imshow(amplified_difference(clean, adversarial))
        names = (f"difference, $\\pm${top:.0f} of 255", f"absolute difference, {AMPLIFIED} times")
        for panel, caption in zip(row, (before, after, *names)):
            panel.set_title(caption, fontsize=7)
            panel.set_axis_off()
    bar = figure.add_axes((0.3, 0.42 / height, 0.4, 0.08 / height))
    label = "signed difference, 8-bit levels (mean over channels)"
    figure.colorbar(drawn, cax=bar, orientation="horizontal", extend="both", label=label)
    return figure


def short(name: str) -> str:
    """A name as it may stand in a figure: of bounded length, and nothing in it taken for a formula, or for a
    curve without a label.
    """
    name = name.encode("utf-8", "replace").decode()
    name = name if len(name) <= 28 else f"{name[:16]}...{name[-9:]}"
    return name.replace("$", r"\$") if name[:1] != "_" else " " + name.replace("$", r"\$")


def decibels(row: dict) -> str:
    return f"{row['psnr']:.1f} dB" if np.isfinite(row["psnr"]) else "the same picture"


def amplified_difference(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """The absolute difference of two pictures, uint8 `(H, W, 3)`, AMPLIFIED times."""
    return (AMPLIFIED * np.abs(adversarial.astype(np.int16) - clean)).clip(0, 255).astype(np.uint8)
