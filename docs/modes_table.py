"""The table of docs/results.md that says what timestep weighting is worth, from the figures of each image in
modes.csv.

    python docs/modes_table.py

Of each setting the means of its first mode, and below them the differences to it on the same images, with
95 % intervals: of success in points, of SSIM and FLIP in millionths, of the structure loss in percent of its
geometric mean. Bold is what is more than chance, by McNemar's test of one classifier, else by random
signs, after Holm's correction over the table.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # to be run from anywhere

import diffattack.common.environment  # isort: skip  # noqa: F401

import numpy as np

from diffattack.evaluation.statistics import (
    ALPHA,
    Difference,
    correct,
    mean_rate,
    paired,
    shares_of_images,
    smallest_success_difference,
)
from diffattack.evaluation.tables import markdown

GROUPS = {
    "white-box": ["efficientnet_lite0"],
    "siblings": ["efficientnet_lite1", "efficientnet_lite2"],
    "other families": ["squeezenet", "mobilenet_v1", "mobilenet_v2"],
}
# by column of modes.csv: how a mean is written, how differences are, and by what these are multiplied
MEASURES = {
    "PSNR dB": (".1f", "+z.4f", 1),
    "SSIM": (".3f", "+z.0f", 1e6),
    "FLIP": (".4f", "+z.0f", 1e6),
    "SSIMULACRA2": (".1f", "+z.3f", 1),
    "Butteraugli": (".2f", "+z.3f", 1),
    "structure loss": (".2g", "+z.1f", 100),
}


def verdicts(rows: Sequence[dict], judges: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which images each of these classifiers had right before, and of which of them it is fooled, `(judges,
    B)` each.
    """
    told = np.array([[row[judge] for row in rows] for judge in judges])
    return told != "", told == "1"


def values(rows: Sequence[dict], measure: str) -> np.ndarray:
    return np.array([float(row[measure]) for row in rows])


def means(rows: Sequence[dict]) -> list[str]:
    cells = []
    for judges in GROUPS.values():
        counted, fooled = verdicts(rows, judges)
        rate = mean_rate(counted, fooled)
        percent = f"{100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
        cells.append(percent if len(judges) > 1 else f"{fooled.sum()}/{counted.sum()}")
    return cells + [f"{values(rows, name).mean():{form}}" for name, (form, *_) in MEASURES.items()]


def differences(first: Sequence[dict], rows: Sequence[dict]) -> list[Difference]:
    """Of the groups of classifiers, in points, and of the measures."""
    found = []
    for judges in GROUPS.values():
        sides = [verdicts(one, judges) for one in (first, rows)]
        if len(judges) == 1:
            of_images = [np.where(counted[0], 100 * fooled[0], np.nan) for counted, fooled in sides]
        else:
            of_images = [100 * shares_of_images(*side) for side in sides]
        found.append(paired(*of_images, yes_or_no=len(judges) == 1))
    for name, (*_, unit) in MEASURES.items():
        sides = [values(one, name) for one in (first, rows)]
        if name == "structure loss":  # of very different size from image to image
            sides = map(np.log, sides)
        found.append(paired(*(unit * side for side in sides)))
    return found


def cell(one: Difference, form: str) -> str:
    text = "0" if one.p == 1 and not one.difference.value else one.difference.with_interval(form)
    return f"**{text}**" if one.p_holm <= ALPHA else text


def main() -> None:
    settings: dict[str, dict[str, list[dict]]] = {}
    with open(HERE / "modes.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            settings.setdefault(row["setting"], {}).setdefault(row["mode"], []).append(row)
    for rows in (rows for modes in settings.values() for rows in modes.values()):
        rows.sort(key=lambda row: row["image"])  # in pairs
    found = {
        (setting, mode): differences(next(iter(modes.values())), rows)
        for setting, modes in settings.items()
        for mode, rows in list(modes.items())[1:]
    }
    tests, every = sum(found.values(), []), sum(GROUPS.values(), [])
    correct(tests)
    forms = ["+z.0f", "+z.1f", "+z.1f", *(form for _, form, _ in MEASURES.values())]
    lines, remarks = [["", *GROUPS, *MEASURES]], []
    for setting, modes in settings.items():
        name, *others = modes
        counted, before = verdicts(modes[name], every)
        lines.append([f"{setting}: `{name}`, {len(modes[name])} images", *means(modes[name])])
        for mode in others:
            lines.append([f"`{mode}`", *map(cell, found[setting, mode], forms)])
            changed = (verdicts(modes[mode], every)[1] != before).sum()
            remarks.append(f"{setting}, {mode}: {changed} of {counted.sum()} verdicts are not {name}'s")
        smallest = smallest_success_difference(int(counted[0].sum()), len(tests))
        remarks.append(f"{setting}: {100 * smallest:.0f} points of white-box success would have been seen")
    print(markdown("Timestep weighting", [("Beside the first mode of each setting", lines)], remarks))


if __name__ == "__main__":
    main()
