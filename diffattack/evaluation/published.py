"""Figures that papers report for the surrogates of a run, from docs/published.csv, to stand beside those that
were run here.

    sections = published_sections(("resnet", "efficientnet_lite0"))   # for evaluation.tables
    remarks = published_remarks(("resnet", "efficientnet_lite0"))

One line of the file is one figure. A surrogate's figures are those of its architecture: of "resnet" those of
"timm:resnet50.tv_in1k", and of every other "timm:resnet50".
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path

from diffattack import ROOT
from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import ALIASES, TIMM, check_name
from diffattack.common.errors import ClassifierError, InputError

PUBLISHED = ROOT / "docs" / "published.csv"

NOT_RUN = "not run here"
NO_RATE = "no rate"  # of a figure that counts no images, such as an SSIM
UNKNOWN = "unknown"
# what a rate is a share of
CONVENTIONS = (
    "accuracy after attack over all images",
    "success over all images",
    "success over images right before",
    UNKNOWN,
    NO_RATE,
)
SAME, MAY_DIFFER, OTHER = "the same", "may differ", "others"  # weights of the surrogate, there and here


@dataclass(frozen=True)
class PublishedFigure:
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
    convention: str
    checked: str  # whether it was read in the source itself
    notes: str

    @property
    def source(self) -> tuple[str, str, str, str]:
        """What shares a table: the paper, its table, and the surrogate."""
        return self.paper, self.table, self.surrogate, self.model_name

    @property
    def citation(self) -> str:
        about = ", ".join(part for part in (self.venue, self.year) if part)
        arxiv = f", arXiv {self.arxiv}" if self.arxiv else ""
        return f"{self.paper} ({about}{arxiv}), {self.table}"

    @property
    def column(self) -> tuple[str, str]:
        return self.measure, self.judge


COLUMNS = tuple(column.name for column in fields(PublishedFigure))
NEEDED = ("paper", "table", "attack", "surrogate", "measure", "value", "images", "side", "convention")


# ---------------------------------------------------------------- the file


def read_published(path: Path = PUBLISHED) -> list[PublishedFigure]:
    """All figures, in the order of the file.

    Raises:
        InputError: the file is missing, or one of its lines cannot be used; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    figures, lines = [], {}  # where each figure is
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if reader.line_num == 1:
                if tuple(cells) != COLUMNS:
                    raise ValueError(f"the columns must be {','.join(COLUMNS)}")
                continue
            if not any(cells):
                continue
            if len(cells) != len(COLUMNS):
                raise ValueError(
                    f"{len(cells)} cells for {len(COLUMNS)} columns; put cells with commas in quotes"
                )
            figure = PublishedFigure(*cells)
            check(figure)
            key = (*figure.source, figure.attack, *figure.column)
            if key in lines:
                raise ValueError(f"the figure of line {lines[key]} again")
            lines[key] = reader.line_num
            figures.append(figure)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    if not reader.line_num:
        raise InputError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
    return figures


def check(figure: PublishedFigure) -> None:
    """Raises ValueError for a figure that cannot be used; the message says which cell, and why."""
    for name in NEEDED:
        if not getattr(figure, name):
            raise ValueError(f"{name} is empty")
    try:
        value = float(figure.value)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"value {figure.value!r} is not a number")
    if figure.measure.endswith("%") and not 0 <= value <= 100:
        raise ValueError(f"value {figure.value} is no percentage")
    for name in ("images", "side"):
        cell = getattr(figure, name)
        if cell != UNKNOWN and not re.fullmatch(r"[1-9][0-9]*", cell):
            raise ValueError(f"{name} {cell!r} is neither a whole number, such as 1000, nor {UNKNOWN}")
    if figure.convention not in CONVENTIONS:
        raise ValueError(f"convention {figure.convention!r} is none of: {'; '.join(CONVENTIONS)}")
    if figure.measure.endswith("%") == (figure.convention == NO_RATE):
        raise ValueError(f"{figure.measure!r} does not go with the convention {figure.convention!r}")
    if figure.checked not in ("yes", "no"):
        raise ValueError(f"checked {figure.checked!r} is neither yes nor no")
    if not re.fullmatch(r"([0-9]{4})?", figure.year):
        raise ValueError(f"year {figure.year!r} is not four digits")
    if not re.fullmatch(r"([0-9]{4}\.[0-9]{4,5})?", figure.arxiv):
        raise ValueError(f"arxiv {figure.arxiv!r} is not an id such as 2305.08192")
    if figure.model_name:
        try:
            check_name(figure.model_name)
        except ClassifierError as error:
            raise ValueError(f"model_name: {error}") from None


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
        found = SAME if certain else MAY_DIFFER
    else:
        found = MAY_DIFFER if check_name(name) == architecture(name) else OTHER
    return f"{found}, with a defence here" if split_name(name)[1] else found


def figures_of(surrogate: str, figures: Iterable[PublishedFigure]) -> list[PublishedFigure]:
    wanted = architecture(surrogate)
    return [one for one in figures if one.model_name and architecture(one.model_name) == wanted]


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
    figures, sections, without = read_published(path), [], []
    for surrogate in dict.fromkeys(surrogates):
        by_source: dict[tuple[str, ...], list[PublishedFigure]] = {}
        for figure in figures_of(surrogate, figures):
            by_source.setdefault(figure.source, []).append(figure)
        for found in by_source.values():
            sections.append((title_of(surrogate, found), wide_rows(surrogate, found)))
        if not by_source:
            without.append([surrogate, "no published figures known"])
    if without:
        sections.append((f"Published, {NOT_RUN}", [["surrogate", ""], *without]))
    return sections


def title_of(surrogate: str, figures: Sequence[PublishedFigure]) -> str:
    shared = judged_measure(figures)
    return (
        f"Published, {NOT_RUN}: {figures[0].citation}, surrogate {figures[0].surrogate} (here {surrogate})"
        f"{f'; {shared} by judge' if shared else ''}"
    )


def judged_measure(figures: Sequence[PublishedFigure]) -> str | None:
    """The measure that several judges took, where there is one: their columns bear their names alone."""
    columns = dict.fromkeys(figure.column for figure in figures)
    measures = [measure for measure, _ in columns]
    several = [measure for measure in dict.fromkeys(measures) if measures.count(measure) > 1]
    return several[0] if len(several) == 1 else None


def wide_rows(surrogate: str, figures: Sequence[PublishedFigure]) -> list[list[str]]:
    """A line for each attack, a column for each measure and judge; figures of one source."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    shared = judged_measure(figures)
    names = [judge if measure == shared else f"{measure}, {judge}".rstrip(", ") for measure, judge in columns]
    by_attack: dict[str, list[PublishedFigure]] = {}
    for figure in figures:
        by_attack.setdefault(figure.attack, []).append(figure)
    heads = ["images", "side", "a rate is", "weights", "source", "seen in the source", "notes"]
    rows = [["attack", "", *names, *heads]]
    for attack, found in by_attack.items():
        values = {figure.column: figure.value for figure in found}
        rates = [figure.convention for figure in found if figure.convention != NO_RATE]
        rows.append(
            [
                attack,
                NOT_RUN,
                *(values.get(column, "") for column in columns),
                joined(figure.images for figure in found),
                joined(figure.side for figure in found),
                joined(rates or [NO_RATE]),
                weights(surrogate, found[0]),
                f"{found[0].paper}, {found[0].table}",
                joined(figure.checked for figure in found),
                joined(figure.notes for figure in found),
            ]
        )
    return rows


def joined(cells: Iterable[str]) -> str:
    """The cells that differ, in their order."""
    return "; ".join(dict.fromkeys(cell for cell in cells if cell))


def published_remarks(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[str]:
    """What has to be known to read the tables; nothing where there are none."""
    figures = read_published(path)
    found = {figure for surrogate in surrogates for figure in figures_of(surrogate, figures)}
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
    figures = read_published(path)
    return [
        {
            "name": surrogate,
            **asdict(figure),
            "year": whole(figure.year),
            "value": float(figure.value),
            "images": whole(figure.images),
            "side": whole(figure.side),
            "checked": figure.checked == "yes",
            "weights": weights(surrogate, figure),
            "run_here": False,
        }
        for surrogate in dict.fromkeys(surrogates)
        for figure in figures_of(surrogate, figures)
    ]


def whole(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None
