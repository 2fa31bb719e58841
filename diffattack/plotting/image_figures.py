"""Figures of pictures: arrays in, a matplotlib `Figure` out. Attention, and contact sheets."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from diffattack.plotting.figures import styled
from diffattack.plotting.run_page import AMPLIFIED, amplified_difference

GAP, LINE = 0.06, 0.13  # inches between pictures, and of a line of a caption


@styled
def plot_pictures(rows: Sequence[Sequence[tuple[np.ndarray, str]]], side: float, title: str = "") -> Figure:
    """Pictures in a grid of squares, each below its caption; all in one panel, which is drawn sooner than a
    panel for each.

    Args:
        rows: of equal length, of pictures, uint8 `(H, W, 3)`, and captions.
        side: of a picture, in inches.
    """
    width, bottom = len(rows[0]) * (side + GAP) + GAP, 0.25 if title else GAP
    figure = Figure()
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_axis_off()
    for row in rows:
        lines = max(caption.count("\n") + 1 if caption else 0 for _, caption in row)
        top = bottom + LINE * lines + GAP
        bottom = top + side
        for k, (picture, caption) in enumerate(row):
            left = GAP + k * (side + GAP)
            panel.imshow(picture, extent=(left, left + side, bottom, top))
            panel.text(left + side / 2, top - 0.03, caption, ha="center", va="bottom", fontsize=7)
    height = bottom + GAP
    panel.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    figure.set_size_inches(width, height)
    figure.suptitle(title, y=1 - 0.05 / height)
    return figure


def coloured(values: np.ndarray, colours: str, low: float, high: float) -> np.ndarray:
    """Values `(H, W)` in the colours of a map from low to high, uint8 `(H, W, 3)`."""
    return colormaps[colours]((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]


def plot_attention(
    clean: np.ndarray,
    adversarial: np.ndarray,
    class_tokens: Sequence[str],
    class_attention: np.ndarray,
    components: np.ndarray,
) -> Figure:
    """Where the diffusion model looks without the attack (above) and with it: cross-attention to each class
    token, and the self-attention, each on one scale above and below.

    Args:
        clean, adversarial: uint8 `(H, W, 3)`.
        class_tokens: T of them.
        class_attention: `(2, T, grid, grid)`, averaged over timesteps, heads and layers; drawn on the image.
        components: `(2, 3, h, w)`, the self-attention along its first principal components without the
            attack.
    """
    rows = []
    for image, attention, parts in zip((clean, adversarial), class_attention, components):
        grey, row = Image.fromarray(image).convert("L").convert("RGB"), []
        for k, token in enumerate(class_tokens):
            low, high = class_attention[:, k].min(), class_attention[:, k].max()
            heat = Image.fromarray(coloured(attention[k], "inferno", low, high))
            drawn = Image.blend(grey, heat.resize(grey.size, Image.BILINEAR), 0.6)
            row.append((np.asarray(drawn), f'"{short(token)}"\n{low:.2g} to {high:.2g}'))
        for k, part in enumerate(parts):
            top = np.abs(components[:, k]).max()
            row.append((coloured(part, "RdBu_r", -top, top), f"component {k + 1}\n±{top:.2g}"))
        rows.append([(picture, "" if rows else caption) for picture, caption in row])
    return plot_pictures(rows, 1.2, "Attention without the attack (above) and with it (below)")


def plot_contact_sheet(rows: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> Figure:
    """Clean, adversarial, signed difference and amplified absolute difference of images, a row each.

    Args:
        rows: clean and adversarial, uint8 `(H, W, 3)`, and a caption for each of the two. Signed differences
            are means over channels, and their colours have one scale on the whole sheet, symmetric around
            zero.
    """
    signed = [(adversarial.astype(np.float64) - clean).mean(-1) for clean, adversarial, _, _ in rows]
    # the few strongest pixels would leave nothing to be seen of the others
    top = max(1.0, np.ceil(np.quantile(np.abs(signed), 0.995)))
    scale = f"difference, mean over channels:\nblue −{top:.0f} to red +{top:.0f} of 255"
    sheet = []
    for difference, (clean, adversarial, before, after) in zip(signed, rows):
        last = (amplified_difference(clean, adversarial), f"absolute difference, {AMPLIFIED} times")
        sheet.append([(clean, before), (adversarial, after)])
        sheet[-1] += [(coloured(difference, "RdBu_r", -top, top), scale), last]
    return plot_pictures(sheet, 1.7)


def short(name: str) -> str:
    """A name as it may stand in a figure: of bounded length, and nothing in it taken for a formula, or for a
    curve without a label.
    """
    name = name.encode("utf-8", "replace").decode()
    name = name if len(name) <= 28 else f"{name[:16]}...{name[-9:]}"
    return name.replace("$", r"\$") if name[:1] != "_" else " " + name.replace("$", r"\$")
