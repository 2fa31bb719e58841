"""Figures that papers report for the surrogates of a run, from docs/published.csv, to stand beside those that
were run here.

    sections = published_sections(("resnet", "efficientnet_lite0"))   # for evaluation.tables
    remarks = published_remarks(("resnet", "efficientnet_lite0"))

One line of the file is one figure. A surrogate's figures are those of its architecture: of "resnet" those of
"timm:resnet50.tv_in1k", and of every other "timm:resnet50".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffattack import ROOT
from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import ALIASES, TIMM, check_name
from diffattack.common.errors import InputError

PUBLISHED = ROOT / "docs" / "published.csv"

NOT_RUN = "not run here"
# columns of the file that say how a figure came about, and how a table calls them
DETAILS = {
    "images": "images",
    "side": "side",
    "convention": "a rate is",
    "checked": "seen in the source",
    "notes": "notes",
}


class PublishedFigure(NamedTuple):
    """A line of the file; the fields are its columns."""

    paper: str
    venue: str
    year: str
    arxiv: str
    table: str
    attack: str
    surrogate: str  # in the paper's words
    model_name: str  # the same as --model_name has it, or nothing
    measure: str
    judge: str  # who judged; nothing where pictures were measured
    value: str  # with the digits that the paper gives
    images: str
    side: str
    convention: str  # what a rate is a share of
    checked: str  # whether it was read in the source itself
    notes: str

    @property
    def column(self) -> tuple[str, str]:
        return self.measure, self.judge


COLUMNS = PublishedFigure._fields


# ---------------------------------------------------------------- the file


def read_published(path: Path = PUBLISHED) -> list[PublishedFigure]:
    """All figures, in the order of the file.

    Raises:
        InputError: the file is missing, or one of its lines cannot be used; the message names the line.
    """
    figures, line = [], 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise ValueError(f"the columns must be {','.join(COLUMNS)}")
            for cells in reader:
                line = reader.line_num
                if any(cells):
                    figures.append(figure_of(cells))
    except (OSError, csv.Error, ValueError) as error:
        raise InputError(f"{path}, line {line}: {error}") from None
    return figures


def figure_of(cells: Sequence[str]) -> PublishedFigure:
    """Raises ValueError for a line that cannot be used."""
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells for {len(COLUMNS)} columns; put cells with commas in quotes")
    figure = PublishedFigure(*map(str.strip, cells))
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", figure.value):
        raise ValueError(f"value is {figure.value!r}; expected a number such as 39.2")
    if figure.model_name:
        check_name(figure.model_name)
    return figure


# ---------------------------------------------------------------- whose figures


def architecture(name: str) -> str:
    """A surrogate's name without its alias, its defences and the name of its weights."""
    resolved = re.sub(r"^hf:timm/", "timm:", check_name(name))
    return resolved.split(".")[0] if resolved.startswith("timm:") else resolved


def weights(name: str, figure: PublishedFigure) -> str:
    """Whether the surrogate here has the weights of the paper's.

    Of the aliases that take timm's weights, the registry says that they need not be the paper's; and which
    weights a network without a name of weights has is timm's own choice.
    """
    if check_name(name) == check_name(figure.model_name):
        certain = figure.model_name not in ALIASES or ALIASES[figure.model_name][1] != TIMM
        found = "the same" if certain else "may differ"
    else:
        found = "may differ" if check_name(name) == architecture(name) else "others"
    return f"{found}, with a defence here" if split_name(name)[1] else found


def figures_of(surrogate: str, path: Path) -> list[PublishedFigure]:
    wanted = architecture(surrogate)
    return [one for one in read_published(path) if one.model_name and architecture(one.model_name) == wanted]


# ---------------------------------------------------------------- what is shown


def published_sections(
    surrogates: Sequence[str], path: Path = PUBLISHED
) -> list[tuple[str, list[list[str]]]]:
    """Tables with their titles, the first row of which names the columns: one for each surrogate and each
    table of a paper that has it, a line for each attack; and one of the surrogates that no paper has.

    Args:
        surrogates: as `--model_name` has them.
    Raises:
        InputError: the file cannot be used.
        ClassifierError: a surrogate's name has none of the forms.
    """
    sections, without = [], []
    for surrogate in dict.fromkeys(surrogates):
        tables: dict[tuple[str, ...], list[PublishedFigure]] = {}
        for figure in figures_of(surrogate, path):
            tables.setdefault((figure.paper, figure.table, figure.model_name), []).append(figure)
        sections += [section(surrogate, figures) for figures in tables.values()]
        if not tables:
            without.append([surrogate, "no published figures known"])
    if without:
        sections.append((f"Published, {NOT_RUN}", [["surrogate", ""], *without]))
    return sections


def section(surrogate: str, figures: Sequence[PublishedFigure]) -> tuple[str, list[list[str]]]:
    """Title and table of figures of one source: a line for each attack, a column for each measure and judge.
    Of the measure that several judges took the columns bear the judges' names alone.
    """
    columns = list(dict.fromkeys(figure.column for figure in figures))
    measures = [measure for measure, _ in columns]
    shared = next((measure for measure in measures if measures.count(measure) > 1), None)
    names = [judge if measure == shared else f"{measure}, {judge}".rstrip(", ") for measure, judge in columns]
    first = figures[0]
    about = ", ".join(filter(None, (first.venue, first.year, first.arxiv and f"arXiv {first.arxiv}")))
    title = f"Published, {NOT_RUN}: {first.paper} ({about}), {first.table}, surrogate {first.surrogate} "
    title += f"(here {surrogate})" + (f"; {shared} by judge" if shared else "")
    rows = [["attack", "", *names, *DETAILS.values(), "weights", "source"]]
    for attack in dict.fromkeys(figure.attack for figure in figures):
        found = {figure.column: figure for figure in figures if figure.attack == attack}
        values = [found[column].value if column in found else "" for column in columns]
        details = [joined(getattr(figure, name) for figure in found.values()) for name in DETAILS]
        source = f"{first.paper}, {first.table}"
        rows.append([attack, NOT_RUN, *values, *details, weights(surrogate, first), source])
    return title, rows


def joined(cells: Iterable[str]) -> str:
    """The cells that differ, in their order."""
    return "; ".join(dict.fromkeys(filter(None, cells)))


def published_remarks(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[str]:
    """What has to be known to read the tables; nothing where there are none."""
    found = [figure for surrogate in surrogates for figure in figures_of(surrogate, path)]
    if not found:
        return []
    remarks = [
        f"published figures were {NOT_RUN}: images, sizes, judges and conventions are each paper's own; a "
        f"surrogate is matched by its architecture, and its weights may differ from the paper's: see the "
        f"column weights"
    ]
    if any(figure.checked == "no" for figure in found):
        remarks.append("published figures that are not seen in the source are quoted from elsewhere")
    return remarks


def published_dicts(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[dict]:
    """The same for JSON: for each surrogate its figures, as in the file with numbers as numbers (None where
    unknown), and `run_here`, False in all of them.
    """

    def whole(cell: str) -> int | None:
        return int(cell) if cell.isdigit() else None

    return [
        {
            "name": surrogate,
            **figure._asdict(),
            **{name: whole(getattr(figure, name)) for name in ("year", "images", "side")},
            "value": float(figure.value),
            "checked": figure.checked == "yes",
            "weights": weights(surrogate, figure),
            "run_here": False,
        }
        for surrogate in dict.fromkeys(surrogates)
        for figure in figures_of(surrogate, path)
    ]
