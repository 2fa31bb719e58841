"""Tables of cells as text, as Markdown and as LaTeX; a section is a title and its table, the first row of
which names the columns. What a table is read by, and the table of costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffattack.evaluation.statistics import Estimate, mean_over_images

if TYPE_CHECKING:
    from diffattack.evaluation.predictions import ClassifierResult

Sections = Sequence[tuple[str, list[list[str]]]]


def table(rows: list[list[str]]) -> list[str]:
    """Aligned columns, with a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def figure_rows(
    heads: Sequence[str], lines: Iterable[tuple[Sequence[str], Mapping[str, Estimate]]]
) -> list[list[str]]:
    """A table with a line for each of several things, and a column for each of their figures; before these,
    cells that say what it is, below `heads`.
    """
    lines = list(lines)
    return [[*heads, *lines[0][1]]] + [[*cells, *map(str, figures.values())] for cells, figures in lines]


def as_text(sections: Sections, remarks: Sequence[str]) -> str:
    return "\n\n".join(["\n".join([title, *table(rows)]) for title, rows in sections] + ["\n".join(remarks)])


def markdown(heading: str, sections: Sections, remarks: Sequence[str]) -> str:
    lines = [f"# {heading}", ""]
    for title, rows in sections:
        lines += [
            f"## {title}",
            "",
            "| " + " | ".join(rows[0]) + " |",
            "|" + "---|" * len(rows[0]),
            *("| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows[1:]),
            "",
        ]
    return "\n".join(lines + [f"- {remark}" for remark in remarks])


def latex(rows: Sequence[Sequence[str]], caption: str) -> str:
    """A booktabs table that goes into a paper as it is; a last column without a title, of notes, stays
    out.
    """
    rows = [row if rows[0][-1] else row[:-1] for row in rows]
    escaped = str.maketrans({character: f"\\{character}" for character in "%_&#$"})
    head, *lines = (" & ".join(cell.strip().translate(escaped) for cell in row) + r" \\" for row in rows)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.strip().translate(escaped)}.}}",
            rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}",
            r"\toprule",
            head,
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


# ---------------------------------------------------------------- what a table is read by


COUNTED = "of the images that a classifier had right before"  # by ClassifierResult.success

# by measure: whether pictures are nearer to the clean ones the "higher" or the "lower" it is, and its range
MEASURES = {
    "SSIM": ("higher", "-1 to 1"),
    "MS-SSIM": ("higher", "0 to 1"),
    "FSIMc": ("higher", "0 to 1"),
    "HaarPSI": ("higher", "0 to 1"),
    "PSNR dB": ("higher", "0 up, infinite for equal pictures"),
    "GMSD": ("lower", "0 to 0.5"),
    "CIEDE2000": ("lower", "0 up, in units of CIELAB"),
    "L1 (levels)": ("lower", "0 to 255"),
    "L2": ("lower", "0 up, of values in [0, 1]"),
    "Linf (levels)": ("lower", "0 to 255"),
    "where smooth (levels)": ("lower", "0 to 255"),
    "LPIPS": ("lower", "0 up"),
    "kernel distance": ("lower", "about 0 up"),
    "KID": ("lower", "about 0 up"),
    "Frechet distance": ("lower", "0 up"),
    "FID": ("lower", "0 up"),
}


def legend_of_head(result: ClassifierResult) -> list[str]:
    """What is right, what is fooled, and what mAP is a mean of, where the head is sigmoid."""
    if result.head.threshold is None:
        return []
    line = f"right: at least one of an image's true classes has a probability above {result.head.threshold:g}"
    if (result.targets >= 0).any():
        line += ", and before the attack its target has none; fooled: its target has one"
    else:
        line += "; fooled: none of them has"
    if not result.precisions:
        return [line]
    known = ~np.isnan(result.precisions["after"])
    mean = f"the mean average precision over those {known.sum()} of {len(known)} classes that an image shows"
    return [line, f"mAP: {mean}"]


def legend(rows: Iterable[str]) -> list[str]:
    """A line for each direction, of the measures that rows are named after, such as "FID"."""
    present = {name.split(",")[0] for name in rows}
    lines = []
    for way in ("higher", "lower"):
        told = [
            f"{name.removesuffix(' (levels)')} ({limits})"
            for name, (direction, limits) in MEASURES.items()
            if direction == way and name in present
        ]
        if told:
            lines.append(f"the {way}, the nearer: {', '.join(told)}")
    return lines


# ---------------------------------------------------------------- costs

# of results.json, and how a table calls them
EVALUATIONS = {
    "surrogate": "surrogate, forward",
    "surrogate, backward": "surrogate, backward",
    "UNet": "UNet",
    "decoder": "decoder",
}


def cost_dict(rows: Sequence[dict]) -> dict[str, float]:
    """Means over the images of a run; of memory the largest."""
    return {
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "peak_memory": max(row["peak_memory"] for row in rows),
        **{name: float(np.mean([row["evaluations"].get(name, 0) for row in rows])) for name in EVALUATIONS},
    }


def cost_rows(runs: Mapping[str, Sequence[dict]]) -> list[list[str]]:
    """A table with a line a run; rows of records by the run's name."""
    table_rows = [["costs an image", "s", "peak memory GB", *EVALUATIONS.values(), "runs for the budget"]]
    for name, rows in runs.items():
        costs = cost_dict(rows)
        tried = [row["attack_runs"] for row in rows if "attack_runs" in row]
        table_rows.append(
            [
                name,
                str(mean_over_images(np.array([row["seconds"] for row in rows]))),
                f"{costs['peak_memory'] / 1e9:.2f}",
                *(f"{costs[key]:.4g}" for key in EVALUATIONS),
                f"{np.mean(tried):.2g}" if tried else "1",
            ]
        )
    return table_rows


# ---------------------------------------------------------------- a prediction of results.json in words


def in_words(prediction: dict) -> str:
    """The class that it says and how sure it is; with a sigmoid head how sure it is of the target, if there
    is one, and of each true class.
    """
    pairs = prediction.get("of_classes") or [(prediction["class"], prediction["confidence"])]
    return ", ".join(f"{name} {probability:.2f}" for name, probability in pairs)


def deciding(prediction: dict) -> tuple[str, float]:
    """The class that is told where there is room for one, and how sure the classifier is of it: the one that
    it says, or with a sigmoid head the target, or the surest of the true classes.
    """
    name, probability = prediction.get("of_classes", [(prediction["class"], prediction["confidence"])])[0]
    return name, probability
