"""Tables of cells as text, as Markdown and as LaTeX; a section is a title and its table, the first row of
which names the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

Sections = Sequence[tuple[str, list[list[str]]]]


def table(rows: list[list[str]]) -> list[str]:
    """Aligned columns, with a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


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
    """A booktabs table that goes into a paper as it is."""

    def escape(text):
        return "".join(
            {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$"}.get(c, c) for c in text.strip()
        )

    def line(row):
        return " & ".join(map(escape, row)) + r" \\"

    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}.}}",
            rf"\begin{{tabular}}{{l{'l' * (len(rows[0]) - 1)}}}",
            r"\toprule",
            line(rows[0]),
            r"\midrule",
            *map(line, rows[1:]),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
