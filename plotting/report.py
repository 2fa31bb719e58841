"""Writes report.html, one self-contained page on which a run is looked through.

    python main.py --save_dir output_fixed/      # writes output_fixed/report.html at its end
    python utils.py output_fixed                 # writes it anew, with the figures

The page is filled in from report_template.html; pictures are part of it (plotting/pages.py).
"""

from __future__ import annotations

import json
import math

import numpy as np

from data.records import ANALYSIS, ImageRecord, Run, read_pair
from data.shares import timestep_rows, timestep_shares
from plotting.figures import timestep_colours
from plotting.image_figures import AMPLIFIED
from plotting.pages import PICTURES_BUDGET, amplified_difference, data_url, encode, write_filled

FIGURES = {  # pooled, in the order of the page: what is shown, for those who do not see it, too
    "average_loss_per_timestep": "Share of each timestep in the self-attention loss, over all layers and at "
    "the first layer, as bars with deviations; a dashed line marks equal shares",
    "layer_shares": "Share of each self-attention layer in the loss of each timestep, as a grid of "
    "percentages",
    "weight_curves": "Weight of each timestep over the iterations of the run, with the named schedules as "
    "reference lines",
    "losses": "The three losses before and after their factors, the gradients of the attention terms in "
    "percent of the attack's, and the confidence in the true class, over iterations",
    "loss_per_timestep": "Self-attention loss of each timestep at the second, middle and last iterations",
    "loss_heatmap": "Self-attention loss by timestep and iteration",
    "tradeoff": "Attack success, of the images that were right before, over PSNR, SSIM and L2, with a point "
    "for each iteration at which pictures were judged",
}
LARGEST_SHARE = 120_000  # bytes of one image's pictures, before base64


def write_page(run: Run) -> None:
    """Writes `report.html` into the folder of a finished run, from its records, pictures, figures and
    results.json.

    Raises:
        OSError: results.json or a figure is missing, or the page cannot be written.
    """
    results = json.loads((run.folder / "results.json").read_text())
    rows = {row["index"]: row for row in results["images"]}
    shown = len(rows.keys() & set(run.pooled.indices.tolist()))
    budget = min(LARGEST_SHARE, PICTURES_BUDGET // max(1, shown))
    write_filled(
        run.folder / "report.html",
        "report_template.html",
        name=run.folder.absolute().name,
        results=results,
        amplified=AMPLIFIED,
        timestep_table=timestep_rows(run.pooled.structure, run.timesteps) if run.timesteps else None,
        figures=[
            (name, alternative, data_url((run.folder / ANALYSIS / f"{name}.png").read_bytes(), "image/png"))
            for name, alternative in FIGURES.items()
            if run.timesteps and (name != "tradeoff" or "curve" in run.records[0].row)
        ],
        images=[
            describe_image(run, record, rows[record.index], budget)
            for record in run.records
            if record.index in rows
        ],
    )


def describe_image(run: Run, record: ImageRecord, row: dict, budget: int) -> dict:
    """All that the gallery shows of an image."""
    clean, adversarial = read_pair(run.layout, record.index)
    difference = amplified_difference(clean, adversarial, AMPLIFIED)
    before, after = row["before"], row["after"]
    return {
        "row": row,
        "outcome": record.outcome,
        "drop": before["true_confidence"] - after["true_confidence"],
        "side": clean.shape[0],
        **dict(zip(("clean", "adversarial", "difference"), encode([clean, adversarial, difference], budget))),
        "charts": charts(record),
    }


# ---------------------------------------------------------------- an image's own curves, as SVG in the
# template

CHART = {"left": 38, "right": 254, "top": 8, "bottom": 92}  # of the axes inside a chart of 260 x 120


def charts(record: ImageRecord) -> list[dict]:
    """Confidence, self-attention loss and weights over iterations, and the shares of the timesteps, in the
    coordinates of CHART.
    """
    total = record.layer_losses.sum((1, 2), dtype=np.float64)
    flip = int(record.fooled.argmax()) + 1 if record.fooled.any() else None
    confidence = {
        "title": "confidence in the true class" + (f"; fooled at iteration {flip}" if flip else ""),
        "low": "0",
        "high": "1",
        "bars": [],
        "x": (1, len(total)),
        "lines": [("currentColor", polylines(record.confidence, 0, 1))],
        "mark": None if flip is None else horizontal(flip - 1, len(total)),
    }
    if not len(record.timesteps):
        return [confidence]
    colours = [
        "#" + "".join(f"{round(255 * c):02x}" for c in colour[:3])
        for colour in timestep_colours(len(record.timesteps))
    ]
    shares = timestep_shares(record.layer_losses)
    highest = max(0.01, np.nanmax(np.nan_to_num(shares)))
    return [
        confidence,
        log_chart("self-attention loss (log)", total),
        log_chart("self-attention's gradient, % of the attack's (log)", gradient_curve(record)),
        {
            "title": "share of the loss by timestep",
            "low": "0",
            "high": f"{100 * highest:.0f}%",
            "lines": [],
            "mark": None,
            "x": record.timesteps[[0, -1]].tolist(),
            "bars": [
                (colour, *bar(i, len(shares), value / highest))
                for i, (colour, value) in enumerate(zip(colours, np.nan_to_num(shares)))
            ],
        },
        {
            "title": "weight of each timestep",
            "low": "0",
            "high": "1",
            "bars": [],
            "mark": None,
            "x": (1, len(total)),
            "lines": [(colour, polylines(record.weights[:, i], 0, 1)) for i, colour in enumerate(colours)],
        },
    ]


def log_chart(title: str, values: np.ndarray) -> dict:
    """A curve of values `(K,)` on a logarithmic axis, with gaps where they are not above zero."""
    logarithm = np.log10(values, out=np.full(len(values), np.nan), where=values > 0)
    finite = logarithm[np.isfinite(logarithm)]
    low, high = (math.floor(finite.min()), math.ceil(finite.max() + 1e-9)) if len(finite) else (-1, 0)
    return {
        "title": title,
        "low": f"1e{low}",
        "high": f"1e{high}",
        "bars": [],
        "x": (1, len(values)),
        "lines": [("currentColor", polylines(logarithm, low, high))],
        "mark": None,
    }


def gradient_curve(record: ImageRecord) -> np.ndarray:
    """`(K,)`, how long the self-attention term's gradient is in percent of the attack's, straight between the
    iterations in which it was measured; NaN before the first of them.
    """
    attack, structure = record.gradient_norms.T[:2].astype(np.float64)
    shares = 100 * np.divide(structure, attack, out=np.full(len(attack), np.nan), where=attack > 0)
    iterations = np.arange(1, len(record.fooled) + 1)
    return np.interp(iterations, record.gradient_iterations, shares, left=np.nan)


def horizontal(k: int, count: int) -> float:
    return round(
        CHART["left"] + (CHART["right"] - CHART["left"]) * (k / (count - 1) if count > 1 else 0.5), 1
    )


def polylines(values: np.ndarray, low: float, high: float) -> list[str]:
    """Points of the pieces of a curve, which has gaps where values `(K,)` are not finite; a piece of one
    point becomes a short dash.
    """
    pieces: list[list[str]] = [[]]
    for k, value in enumerate(values):
        if not np.isfinite(value):
            pieces.append([])
            continue
        x, y = (
            horizontal(k, len(values)),
            CHART["bottom"] - (CHART["bottom"] - CHART["top"]) * (value - low) / (high - low),
        )
        pieces[-1].append(f"{x:.1f},{y:.1f}")
    return [
        " ".join(
            piece
            if len(piece) > 1
            else [piece[0], f"{float(piece[0].split(',')[0]) + 2:.1f},{piece[0].split(',')[1]}"]
        )
        for piece in pieces
        if piece
    ]


def bar(i: int, count: int, height: float) -> tuple[float, float, float, float]:
    """x, y, width and height of the i-th bar."""
    width = (CHART["right"] - CHART["left"]) / count
    full = (CHART["bottom"] - CHART["top"]) * height
    return (
        round(CHART["left"] + width * (i + 0.1), 1),
        round(CHART["bottom"] - full, 1),
        round(0.8 * width, 1),
        round(full, 1),
    )
