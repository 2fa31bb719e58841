"""What people chose on a page of `compare.py --page`: which of two attacks' pictures looks more like the
original.

    key = read_key(Path("comparison/judging_key.json"))
    title, rows = judging_section(read_judgements(Path("judged.csv"), key), key.attacks)
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from diffattack.common.errors import InputError, one_line
from diffattack.evaluation.statistics import holm, share

CHOICES = ("left", "right", "neither")
COLUMNS = ("trial", "choice", "seconds")  # of what the page saves
GIVE = "give a file as the page saves it"
KEY = "judging_key.json"  # which attack is where, beside the page that does not say it


@dataclass(frozen=True)
class Trial:
    """Two attacks' pictures of an image, as the page shows them."""

    image: str
    left: str  # the attack's name
    right: str


@dataclass(frozen=True)
class Judgement:
    """What a person chose in a trial."""

    trial: Trial
    choice: str  # of CHOICES
    seconds: float  # from when the pictures were shown

    @property
    def nearer(self) -> str | None:
        """The attack whose picture was called nearer to the original."""
        return {"left": self.trial.left, "right": self.trial.right, "neither": None}[self.choice]


@dataclass(frozen=True)
class Key:
    """What a page does not say."""

    attacks: list[str]  # in the order of the comparison
    trials: dict[str, Trial]  # by their names, which are random


def read_key(path: Path) -> Key:
    """The key that was written beside a page.

    Raises:
        InputError: there is no key, or it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trials = {
            name: Trial(trial["image"], trial["left"], trial["right"])
            for name, trial in content["trials"].items()
        }
        return Key(list(content["attacks"]), trials)
    # what json raises, and what is no key holds something else in its places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--judged: {str(path)!r} cannot be read ({one_line(error, 120)}), and nothing else says which "
            f"attack was where; it is written by --page"
        ) from None


def read_judgements(path: Path, key: Key) -> list[Judgement]:
    """The choices of one person, from a file that the page saved, in its order.

    Raises:
        InputError: the file is missing, in another form or of another page; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"--judged: {str(path)!r}, line {line}: it is not text in UTF-8; {GIVE}") from None
    except OSError as error:
        raise InputError(f"--judged: {str(path)!r} cannot be read ({error.strerror}); {GIVE}") from None
    reader, found = csv.reader(StringIO(text, newline="")), {}
    try:
        columns = next(reader, [])
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"there is no column {missing[0]!r} of {','.join(COLUMNS)}")
        for cells in reader:
            if cells:
                name, judgement = judgement_of(dict(zip(columns, cells)), key)
                if name in found:
                    raise ValueError(f"trial {name!r} is there twice")
                found[name] = judgement
        if not found:
            raise ValueError("it holds no choice")
    except (csv.Error, ValueError) as error:
        raise InputError(
            f"--judged: {str(path)!r}, line {max(1, reader.line_num)}: {one_line(error)}; {GIVE}"
        ) from None
    return list(found.values())


def judgement_of(cells: Mapping[str, str], key: Key) -> tuple[str, Judgement]:
    """The trial's name and the judgement of a line, from its cells by column; raises ValueError if it is
    none.
    """
    name, choice, seconds = (cells.get(column, "").strip() for column in COLUMNS)
    if name not in key.trials:
        raise ValueError(f"trial {name[:40]!r} is not of the page that this comparison's key belongs to")
    if choice not in CHOICES:
        raise ValueError(f"choice {choice[:40]!r} is none of {', '.join(CHOICES)}")
    try:
        duration = float(seconds)
    except ValueError:
        duration = math.nan
    if not 0 <= duration < math.inf:
        raise ValueError(f"{seconds[:40]!r} are no seconds")
    return name, Judgement(key.trials[name], choice, duration)


def judging_section(judgements: Sequence[Judgement], attacks: Sequence[str]) -> tuple[str, list[list[str]]]:
    """The table of the pairs of attacks, each pair in the order of `attacks`: how often either was nearer to
    the original, the first one's share of the choices that were made with Wilson's interval, and exact
    binomial p against one half, also corrected by Holm over the pairs; choices of several people are taken
    together.
    """
    from scipy.stats import binomtest

    rows, p_values = [], []
    for first, second in itertools.combinations(attacks, 2):
        nearer = [
            each.nearer for each in judgements if {each.trial.left, each.trial.right} == {first, second}
        ]
        if not nearer:
            continue
        wins, losses = nearer.count(first), nearer.count(second)
        p_values.append(float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0)
        counts = (len(nearer), wins, losses, nearer.count(None))
        rows.append([f"{first} : {second}", *map(str, counts), str(share(wins, wins + losses))])
    header = [
        "",
        "judged",
        "first nearer",
        "second nearer",
        "neither",
        "first, of the chosen",
        "p",
        "corrected",
    ]
    return "Which looks more like the original", [header] + [
        [*row, f"{p:.2g}", f"{corrected:.2g}"] for row, p, corrected in zip(rows, p_values, holm(p_values))
    ]
