"""Tables of cells as text, as Markdown and as LaTeX; a section is a title and its table, the first row of
which names the columns. What a table is read by, and the table of costs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffattack.evaluation.statistics import mean_over_images

Sections = Sequence[tuple[str, list[list[str]]]]


@dataclass(frozen=True)
class Report:
    """What a comparison or a sweep says."""

    sections: list[tuple[str, list[list[str]]]]  # titles and tables, whose first row names the columns
    remarks: list[str]  # below them; the first ones are what a reader of the first table must know
    results: dict  # for `json_text`

    @property
    def caption(self) -> str:
        return ". ".join(self.remarks[: 1 + len(self.results.get("legend", ()))])


def table(rows: list[list[str]]) -> list[str]:
    """Aligned columns, with a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def figure_rows(lines: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """A table with a line for each of several things, and a column for each of their figures."""
    cells = [["" if cell is None else str(cell) for cell in line.values()] for line in lines]
    return [list(*lines[:1]), *cells]


def as_text(sections: Sections, remarks: Sequence[str]) -> str:
    return "\n\n".join(["\n".join([title, *table(rows)]) for title, rows in sections] + ["\n".join(remarks)])


def markdown(heading: str, sections: Sections, remarks: Sequence[str]) -> str:
    parts = [f"# {heading}"]
    for title, (head, *rows) in sections:
        lines = [head, ["---"] * len(head), *([cell.strip() for cell in row] for row in rows)]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in remarks)])


LATEX = r"""% needs \usepackage{{booktabs}}
\begin{{table}}
\centering
\caption{{{caption}.}}
\begin{{tabular}}{{{columns}}}
\toprule
{head}
\midrule
{lines}
\bottomrule
\end{{tabular}}
\end{{table}}"""


def latex(rows: Sequence[Sequence[str]], caption: str) -> str:
    """A booktabs table that goes into a paper as it is; a last column without a title, of notes, stays
    out.
    """
    rows = [row if rows[0][-1] else row[:-1] for row in rows]
    escaped = str.maketrans({character: f"\\{character}" for character in "%_&#$"})
    head, *lines = (" & ".join(cell.strip().translate(escaped) for cell in row) + r" \\" for row in rows)
    caption, columns = caption.strip().translate(escaped), "l" * len(rows[0])
    return LATEX.format(caption=caption, columns=columns, head=head, lines="\n".join(lines))


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
    "FLIP": ("lower", "0 to 1"),
    "SSIMULACRA2": ("higher", "up to 100; 90: hardly told apart at 1:1"),
    "Butteraugli": ("lower", "0 up; below 1: the same to most"),
    "kernel distance": ("lower", "about 0 up"),
    "KID": ("lower", "about 0 up"),
    "Frechet distance": ("lower", "0 up"),
    "FID": ("lower", "0 up"),
}


def legend_of_head(threshold: float | None) -> list[str]:
    """What is right and what is fooled, where the head is sigmoid."""
    line = (
        f"right: at least one of an image's true classes has a probability above {threshold}, and before the "
        f"attack not the target, if it has one; fooled: none of them has, or the target has"
    )
    return [] if threshold is None else [line]


def legend(rows: Iterable[str]) -> list[str]:
    """A line for each direction, of the measures that rows are named after, such as "FID"."""
    present, lines = {name.split(",")[0] for name in rows}, []
    for way in ("higher", "lower"):
        known = [name for name, (direction, _) in MEASURES.items() if direction == way and name in present]
        ranges = ", ".join(f"{name.removesuffix(' (levels)')} ({MEASURES[name][1]})" for name in known)
        lines += [f"the {way}, the nearer: {ranges}"] * bool(known)
    return lines


# ---------------------------------------------------------------- costs

EVALUATIONS = ("surrogate", "surrogate, backward", "UNet", "decoder")  # the first is forward


def cost_dict(rows: Sequence[dict]) -> dict[str, float]:
    """Means over the images of a run; of memory the largest."""
    return {
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "peak_memory": max(row["peak_memory"] for row in rows),
        **{name: float(np.mean([row["evaluations"].get(name, 0) for row in rows])) for name in EVALUATIONS},
    }


def cost_rows(runs: Mapping[str, Sequence[dict]]) -> list[list[str]]:
    """A table with a line a run; rows of records by the run's name."""
    lines = []
    for name, rows in runs.items():
        costs = cost_dict(rows)
        line = {"costs an image": name, "s": mean_over_images(np.array([row["seconds"] for row in rows]))}
        line |= {"peak memory GB": f"{costs['peak_memory'] / 1e9:.2f}"}
        line |= {key: f"{costs[key]:.4g}" for key in EVALUATIONS}
        tried = np.mean([row.get("attack_runs", 1) for row in rows])
        lines.append(line | {"runs for the budget": f"{tried:.2g}"})
    return figure_rows(lines)


# ---------------------------------------------------------------- a prediction of results.json in words


def in_words(prediction: dict) -> str:
    """The class that a classifier sees, and how sure it is."""
    return f"{prediction['class']} {prediction['confidence']:.2f}"
