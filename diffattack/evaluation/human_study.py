"""What people chose on a page of `compare.py --page`: which of two attacks' pictures looks more like the
original.

    attacks, judgements = read_study([Path("judged.csv")], Path("comparison/judging_key.json"))
    title, rows = judging_section(judgements, attacks)
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffattack.common.errors import InputError, one_line
from diffattack.evaluation.statistics import holm, share

CHOICES = ("left", "right", "neither")
COLUMNS = ("trial", "choice", "seconds")  # of what the page saves
KEY = "judging_key.json"  # which attack is where, beside the page that does not say it


def read_study(paths: Sequence[Path], key: Path) -> tuple[list[str], list[dict]]:
    """The attacks in the order of the comparison, and the choices of all people as JSON has them: the two
    `attacks`, the `image`, and which attack is `nearer` to it, None for neither.

    Args:
        paths: files that the page saved, one a person.
        key: the file that was written beside the page.
    Raises:
        InputError: one of the files is missing, damaged, or of another page; the message names the line.
    """
    try:
        content = json.loads(key.read_text(encoding="utf-8"))
        attacks, trials = list(content["attacks"]), dict(content["trials"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--judged: {str(key)!r} cannot be read ({one_line(error, 120)}), and nothing else says which "
            f"attack was where; it is written by --page"
        ) from None
    return attacks, [judgement for path in paths for judgement in read_judgements(path, trials)]


def read_judgements(path: Path, trials: Mapping[str, dict]) -> list[dict]:
    """The choices of one person."""
    found, line = {}, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                line = reader.line_num
                name, choice = (str(cells.get(column)).strip() for column in COLUMNS[:2])
                if name not in trials or name in found or choice not in CHOICES:
                    raise ValueError(
                        f"trial {name[:40]!r}, choice {choice[:40]!r}; expected trials of this comparison's "
                        f"page, each once, and one of {', '.join(CHOICES)}"
                    )
                trial = trials[name]
                both = {"attacks": [trial["left"], trial["right"]], "image": trial["image"]}
                found[name] = both | {"nearer": trial.get(choice)}
        if not found:
            raise ValueError("it holds no choice")
    except (OSError, csv.Error, ValueError) as error:
        raise InputError(
            f"--judged: {str(path)!r}, line {line}: {one_line(error)}; give a file as the page saves it"
        ) from None
    return list(found.values())


def judging_section(judgements: Sequence[dict], attacks: Sequence[str]) -> tuple[str, list[list[str]]]:
    """The table of the pairs of attacks, each pair in the order of `attacks`: how often either was nearer to
    the original, the first one's share of the choices that were made with Wilson's interval, and exact
    binomial p against one half, also corrected by Holm over the pairs; choices of several people are taken
    together.
    """
    from scipy.stats import binomtest

    rows, p_values = [], []
    for first, second in itertools.combinations(attacks, 2):
        nearer = [each["nearer"] for each in judgements if {first, second} == {*each["attacks"]}]
        if not nearer:
            continue
        wins, losses = nearer.count(first), nearer.count(second)
        p_values.append(float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0)
        counts = (len(nearer), wins, losses, nearer.count(None))
        rows.append([f"{first} : {second}", *map(str, counts), str(share(wins, wins + losses))])
    heads = "judged", "first nearer", "second nearer", "neither", "first, of the chosen", "p", "corrected"
    return "Which looks more like the original", [["", *heads]] + [
        [*row, f"{p:.2g}", f"{corrected:.2g}"] for row, p, corrected in zip(rows, p_values, holm(p_values))
    ]
