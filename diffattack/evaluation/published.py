"""Figures that papers report for the surrogates of a run, from docs/published.csv, to stand beside those that
were run here.

    figures = published(("resnet", "efficientnet_lite0"))
    title, rows = published_section(figures, ("resnet", "efficientnet_lite0"))

One line of the file is one figure. A surrogate's figures are those of its architecture: of "resnet" those of
"timm:resnet50.tv_in1k", and of every other "timm:resnet50".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from diffattack import ROOT
from diffattack.classifiers.registry import ALIASES, TIMM, check_name
from diffattack.common.errors import InputError

PUBLISHED = ROOT / "docs" / "published.csv"

NOT_RUN = "not run here"
PUBLISHED_REMARK = (
    f"published figures were {NOT_RUN}: images, sizes, judges and conventions are each paper's own; a "
    f"surrogate is matched by its architecture, and its weights may differ from the paper's; what is not "
    f"seen in the source is quoted from elsewhere"
)
# columns that say how a figure came about, and how a table calls them
DETAILS = {
    "images": "images",
    "side": "side",
    "convention": "a rate is",
    "checked": "seen in the source",
    "notes": "notes",
    "weights": "weights",
}


def read_published(path: Path = PUBLISHED) -> list[dict[str, str]]:
    """All figures, in the order of the file, by column. The surrogate is in the paper's words, `model_name`
    the same as --model_name has it, or nothing; `judge` is nothing where pictures were measured; `value` has
    the digits that the paper gives; `convention` says what a rate is a share of, and `checked` whether it was
    read in the source itself.

    Raises:
        InputError: the file is missing, or one of its lines cannot be used; the message names the line.
    """
    figures, line = [], 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for figure in reader:
                line = reader.line_num
                float(figure["value"])
                if figure["model_name"]:
                    check_name(figure["model_name"])
                figures.append(figure)
    except (OSError, csv.Error, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}, line {line}: {error}; expected a number as value, and the other columns of "
            f"docs/published.csv"
        ) from None
    return figures


def architecture(name: str) -> str:
    """A surrogate's name without its alias, its defences and the name of its weights."""
    resolved = re.sub(r"^hf:timm/", "timm:", check_name(name))
    return resolved.split(".")[0] if resolved.startswith("timm:") else resolved


def weights(name: str, model_name: str) -> str:
    """Whether the surrogate here has the weights of the paper's; of the aliases that take timm's, the
    registry says that they need not be the paper's.
    """
    is_timms = ALIASES.get(model_name, ("", ""))[1] == TIMM
    return "the same" if check_name(name) == check_name(model_name) and not is_timms else "may differ"


def published(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[dict]:
    """For JSON: for each surrogate, as `--model_name` has it, its figures, as in the file with numbers as
    numbers (None where unknown), and `run_here`, False in all of them.

    Raises:
        InputError: the file cannot be used.
        ClassifierError: a surrogate's name has none of the forms.
    """

    def number(cell: str) -> int | None:
        return int(cell) if cell.isdigit() else None

    figures = [figure for figure in read_published(path) if figure["model_name"]]
    return [
        {"name": name}
        | figure
        | {column: number(figure[column]) for column in ("year", "images", "side")}
        | {"value": float(figure["value"]), "checked": figure["checked"] == "yes"}
        | {"weights": weights(name, figure["model_name"]), "run_here": False}
        for name in dict.fromkeys(surrogates)
        for figure in figures
        if architecture(figure["model_name"]) == architecture(name)
    ]


def published_section(figures: Sequence[dict], surrogates: Sequence[str]) -> tuple[str, list[list[str]]]:
    """Title and table of these figures, a line for each attack in each table of a paper; and for each
    surrogate that no paper has.
    """
    by_attack: dict[tuple[str, ...], list[dict]] = {}
    for one in figures:
        source = f"{one['paper']}, {one['table']}, surrogate {one['surrogate']}"
        by_attack.setdefault((one["name"], source, one["attack"]), []).append(one)
    rows = [["surrogate", "source", "attack", "", "figures", *DETAILS.values()]]
    for key, found in by_attack.items():
        told = "; ".join(f"{one['measure']} {one['judge']}".rstrip() + f" {one['value']:g}" for one in found)
        details = (dict.fromkeys(str(one[name]) for one in found) for name in DETAILS)
        rows.append([*key, NOT_RUN, told, *("; ".join(filter(None, cells)) for cells in details)])
    without = [name for name in dict.fromkeys(surrogates) if name not in {key[0] for key in by_attack}]
    rows += [[name, "no published figures known", *[""] * (len(rows[0]) - 2)] for name in without]
    return f"Published, {NOT_RUN}", rows
