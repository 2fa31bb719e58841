"""Figures that were not run here, to stand beside those that were: what papers report for the surrogates of a
run, from docs/published.csv, and which of two attacks' pictures people found more like the original on a page
of `compare.py --page`.

    title, rows = published_section(published(("resnet", "vgg")), ("resnet", "vgg"))
    attacks, judgements = read_study([Path("judged.csv")], Path("comparison/judging_key.json"))
    title, rows = judging_section(judgements, attacks)
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from diffattack import ROOT
from diffattack.classifiers.registry import ALIASES, TIMM, check_name
from diffattack.common.errors import InputError, one_line
from diffattack.evaluation.statistics import holm, share, sign_test
from diffattack.evaluation.tables import figure_rows

PUBLISHED = ROOT / "docs" / "published.csv"
NOT_RUN = "not run here"
PUBLISHED_REMARK = (
    f"published figures were {NOT_RUN}: images, sizes, judges and conventions are each paper's own; a "
    f"surrogate is matched by its architecture, and its weights may differ from the paper's; what is not "
    f"seen in the source is quoted from elsewhere"
)
DETAILS = ("images", "side", "convention", "checked", "notes", "weights")  # how a figure came about
NUMBERS = ("year", "images", "side")
CHOICES = ("left", "right", "neither")
COLUMNS = ("trial", "choice", "seconds")  # of what the page saves
KEY = "judging_key.json"  # which attack is where, beside the page that does not say it


def read_table(path: Path, parse: Callable[[dict[str, str]], dict], expected: str) -> list[dict]:
    """What `parse` makes of each row of a CSV file, by column.

    Raises:
        InputError: the file cannot be read or is empty, or one of its lines cannot be used; the message names
            the line.
    """
    found, line = [], 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                line = reader.line_num
                found.append(parse(cells))
        if not found:
            raise ValueError("it holds no row")
    except (OSError, csv.Error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}, line {line}: {one_line(error)}; expected {expected}") from None
    return found


# ---------------------------------------------------------------- what papers report


def read_published(path: Path = PUBLISHED) -> list[dict]:
    """All figures, in the order of the file, by column, numbers as numbers (None where unknown). The
    surrogate is in the paper's words, `model_name` the same as --model_name has it, or nothing; `judge` is
    nothing where pictures were measured; `convention` says what a rate is a share of, and `checked` whether
    it was read in the source itself.
    """

    def parse(cells: dict[str, str]) -> dict:
        if cells["model_name"]:
            check_name(cells["model_name"])
        known = {"value": float(cells["value"]), "checked": cells["checked"] == "yes"}
        return cells | known | {n: int(cells[n]) if cells[n].isdigit() else None for n in NUMBERS}

    return read_table(path, parse, "a number as value, and the other columns of docs/published.csv")


def architecture(name: str) -> str:
    """A surrogate's name without its alias, its defences and the name of its weights: of "resnet" that of
    "timm:resnet50.tv_in1k", and of every other "timm:resnet50".
    """
    resolved = re.sub(r"^hf:timm/", "timm:", check_name(name))
    return resolved.split(".")[0] if resolved.startswith("timm:") else resolved


def weights(name: str, model_name: str) -> str:
    """Whether the surrogate here has the weights of the paper's; of the aliases that take timm's, the
    registry says that they need not be the paper's.
    """
    is_timms = ALIASES.get(model_name, ("", ""))[1] == TIMM
    return "the same" if check_name(name) == check_name(model_name) and not is_timms else "may differ"


def published(surrogates: Sequence[str], path: Path = PUBLISHED) -> list[dict]:
    """For JSON: for each surrogate, as `--model_name` has it, the figures of its architecture, whether its
    weights are the paper's, and `run_here`, False in all of them.
    """
    figures = [figure for figure in read_published(path) if figure["model_name"]]
    return [
        {"name": name} | figure | {"weights": weights(name, figure["model_name"]), "run_here": False}
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
    rows = [["surrogate", "source", "attack", "", "figures", *DETAILS]]
    for key, found in by_attack.items():
        told = "; ".join(f"{one['measure']} {one['judge']}".rstrip() + f" {one['value']:g}" for one in found)
        details = (dict.fromkeys(str(one[name]) for one in found) for name in DETAILS)
        rows.append([*key, NOT_RUN, told, *("; ".join(filter(None, cells)) for cells in details)])
    without = [name for name in dict.fromkeys(surrogates) if name not in {key[0] for key in by_attack}]
    rows += [[name, "no published figures known", *[""] * (len(rows[0]) - 2)] for name in without]
    return f"Published, {NOT_RUN}", rows


# ---------------------------------------------------------------- what people chose


def read_study(paths: Sequence[Path], key: Path) -> tuple[list[str], list[dict]]:
    """The attacks in the order of the comparison, and the choices of all people as JSON has them: the two
    `attacks`, the `image`, and which attack is `nearer` to it, None for neither.

    Args:
        paths: files that the page saved, one a person.
        key: the file that was written beside the page.
    """
    try:
        content = json.loads(key.read_text(encoding="utf-8"))
        attacks, trials = list(content["attacks"]), dict(content["trials"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--judged: {str(key)!r} cannot be read ({one_line(error, 120)}), and nothing else says which "
            f"attack was where; it is written by --page"
        ) from None
    return attacks, [judgement for path in paths for judgement in read_judgements(path, dict(trials))]


def read_judgements(path: Path, trials: dict[str, dict]) -> list[dict]:
    """The choices of one person, of which each is taken out of the trials."""

    def parse(cells: dict[str, str]) -> dict:
        name, choice = (str(cells.get(column)).strip() for column in COLUMNS[:2])
        if name not in trials or choice not in CHOICES:
            raise ValueError(f"trial {name[:40]!r}, choice {choice[:40]!r}")
        trial = trials.pop(name)
        both = [trial["left"], trial["right"]]
        return {"attacks": both, "image": trial["image"], "nearer": trial.get(choice)}

    expected = f"trials of this comparison's page, each once, and one of {', '.join(CHOICES)}"
    return read_table(path, parse, f"a file of --judged as the page saves it, with {expected}")


def judging_section(judgements: Sequence[dict], attacks: Sequence[str]) -> tuple[str, list[list[str]]]:
    """The table of the pairs of attacks, each pair in the order of `attacks`: how often either was nearer to
    the original, the first one's share of the choices that were made with Wilson's interval, and exact
    binomial p against one half, also corrected by Holm over the pairs; choices of several people are taken
    together.
    """
    lines, p_values = [], []
    for first, second in itertools.combinations(attacks, 2):
        nearer = [each["nearer"] for each in judgements if {first, second} == {*each["attacks"]}]
        wins, losses = nearer.count(first), nearer.count(second)
        if nearer:
            line = {"": f"{first} : {second}", "judged": len(nearer)}
            line |= {"first nearer": wins, "second nearer": losses, "neither": nearer.count(None)}
            lines.append(line | {"first, of the chosen": share(wins, wins + losses)})
            p_values.append(sign_test(wins, losses))
    for line, p, corrected in zip(lines, p_values, holm(p_values)):
        line |= {"p": f"{p:.2g}", "corrected": f"{corrected:.2g}"}
    return "Which looks more like the original", figure_rows(lines)
