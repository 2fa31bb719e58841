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
from collections import namedtuple
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffattack import ROOT
from diffattack.classifiers.registry import ALIASES, TIMM, check_name
from diffattack.common.errors import InputError

PUBLISHED = ROOT / "docs" / "published.csv"

NOT_RUN = "not run here"
# The columns of the file. The surrogate is in the paper's words, `model_name` the same as --model_name has
# it, or nothing; `judge` is nothing where pictures were measured; `value` has the digits that the paper
# gives; `convention` says what a rate is a share of, and `checked` whether it was read in the source itself.
Figure = namedtuple(
    "Figure",
    "paper venue year arxiv table attack surrogate model_name measure judge value images side convention "
    "checked notes",
)
COLUMNS = Figure._fields
# columns that say how a figure came about, and how a table calls them
DETAILS = {
    "images": "images",
    "side": "side",
    "convention": "a rate is",
    "checked": "seen in the source",
    "notes": "notes",
}


def read_published(path: Path = PUBLISHED) -> list[Figure]:
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
            for cells in filter(any, reader):
                line = reader.line_num
                if len(cells) != len(COLUMNS):
                    raise ValueError(f"{len(cells)} cells for {len(COLUMNS)} columns")
                figure = Figure(*map(str.strip, cells))
                float(figure.value)
                if figure.model_name:
                    check_name(figure.model_name)
                figures.append(figure)
    except (OSError, csv.Error, ValueError) as error:
        raise InputError(f"{path}, line {line}: {error}") from None
    return figures


# ---------------------------------------------------------------- whose figures


def architecture(name: str) -> str:
    """A surrogate's name without its alias, its defences and the name of its weights."""
    resolved = re.sub(r"^hf:timm/", "timm:", check_name(name))
    return resolved.split(".")[0] if resolved.startswith("timm:") else resolved


def weights(name: str, figure: Figure) -> str:
    """Whether the surrogate here has the weights of the paper's; of the aliases that take timm's, the
    registry says that they need not be the paper's.
    """
    is_timms = ALIASES.get(figure.model_name, ("", ""))[1] == TIMM
    is_same = check_name(name) == check_name(figure.model_name) and not is_timms
    return "the same" if is_same else "may differ"


def figures_of(surrogates: Sequence[str], path: Path) -> dict[str, list[Figure]]:
    """By surrogate, as `--model_name` has it."""
    known = [figure for figure in read_published(path) if figure.model_name]
    wanted = {name: architecture(name) for name in surrogates}
    return {
        name: [figure for figure in known if architecture(figure.model_name) == one]
        for name, one in wanted.items()
    }


# ---------------------------------------------------------------- what is shown


def published_sections(
    surrogates: Sequence[str], path: Path = PUBLISHED
) -> list[tuple[str, list[list[str]]]]:
    """Tables with their titles, the first row of which names the columns: one for each surrogate and each
    table of a paper that has it, a line for each attack; and one of the surrogates that no paper has.

    Raises:
        InputError: the file cannot be used.
        ClassifierError: a surrogate's name has none of the forms.
    """
    sections, without = [], []
    for surrogate, figures in figures_of(surrogates, path).items():
        tables: dict[tuple[str, ...], list[Figure]] = {}
        for figure in figures:
            tables.setdefault((figure.paper, figure.table, figure.model_name), []).append(figure)
        sections += [section(surrogate, of_table) for of_table in tables.values()]
        without += [] if figures else [[surrogate, "no published figures known"]]
    return sections + ([(f"Published, {NOT_RUN}", [["surrogate", ""], *without])] if without else [])


def section(surrogate: str, figures: Sequence[Figure]) -> tuple[str, list[list[str]]]:
    """Title and table of figures of one source: a line for each attack, a column for each measure and
    judge.
    """
    columns, first = list(dict.fromkeys((figure.measure, figure.judge) for figure in figures)), figures[0]
    about = ", ".join(filter(None, (first.venue, first.year, first.arxiv and f"arXiv {first.arxiv}")))
    source = f"{first.paper}, {first.table}"
    title = f"Published, {NOT_RUN}: {first.paper} ({about}), {first.table}, surrogate {first.surrogate} "
    rows = [["attack", "", *map(joined, columns), *DETAILS.values(), "weights", "source"]]
    for attack in dict.fromkeys(figure.attack for figure in figures):
        found = {(one.measure, one.judge): one for one in figures if one.attack == attack}
        values = (found[column].value if column in found else "" for column in columns)
        details = (joined(getattr(figure, name) for figure in found.values()) for name in DETAILS)
        rows.append([attack, NOT_RUN, *values, *details, weights(surrogate, first), source])
    return f"{title}(here {surrogate})", rows


def joined(cells: Iterable[str]) -> str:
    """The cells that differ, in their order."""
    return "; ".join(dict.fromkeys(filter(None, cells)))


def published_remarks(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[str]:
    """What has to be known to read the tables; nothing where there are none."""
    remark = (
        f"published figures were {NOT_RUN}: images, sizes, judges and conventions are each paper's own; a "
        f"surrogate is matched by its architecture, and its weights may differ from the paper's: see the "
        f"column weights; those that are not seen in the source are quoted from elsewhere"
    )
    return [remark] if any(figures_of(surrogates, path).values()) else []


def published_dicts(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[dict]:
    """The same for JSON: for each surrogate its figures, as in the file with numbers as numbers (None where
    unknown), and `run_here`, False in all of them.
    """

    def number(cell: str) -> int | None:
        return int(cell) if cell.isdigit() else None

    return [
        {
            "name": surrogate,
            **figure._asdict(),
            "year": number(figure.year),
            "images": number(figure.images),
            "side": number(figure.side),
            "value": float(figure.value),
            "checked": figure.checked == "yes",
            "weights": weights(surrogate, figure),
            "run_here": False,
        }
        for surrogate, figures in figures_of(surrogates, path).items()
        for figure in figures
    ]
