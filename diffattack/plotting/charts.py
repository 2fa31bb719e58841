"""An image's own curves on its page, as SVG: what is drawn where, in the coordinates of CHART. The pages turn
it into elements, by the macro `chart` of page_macros.html or by a script that does the same.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from diffattack.data.records import ImageRecord
from diffattack.data.shares import timestep_shares
from diffattack.plotting.figures import timestep_colours

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
    colours = colours_of(len(record.timesteps))
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


@functools.cache
def colours_of(timesteps: int) -> list[str]:
    return [
        "#" + "".join(f"{round(255 * c):02x}" for c in colour[:3]) for colour in timestep_colours(timesteps)
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
