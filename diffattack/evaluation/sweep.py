"""What a sweep says: every weight mode at several values of one flag, compared where it is equally visible.

A weighting that changes the picture less also fools less, so that two modes at one setting say little of
which is better. Here each mode gives a curve for each image, of transfer over visibility, and the curves of
two modes are compared where both reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from diffattack.common.flags import number_or_none
from diffattack.data.records import Run
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.comparison import Report
from diffattack.evaluation.curves import VISIBILITIES, compare_curves, curve_of, figures_of, pair_rows
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.statistics import Estimate, mean_over_images
from diffattack.evaluation.tables import COUNTED, figure_rows, legend

# at which all modes are the same attack
WITHOUT_STRUCTURE = ("self_attn_loss_weight", "structure_share")


@dataclass(frozen=True)
class Sweep:
    """A flag of the attack and the values it takes."""

    flag: str
    values: tuple[float, ...]
    measure: str = ""  # of a budget

    def __str__(self) -> str:
        numbers = ",".join(f"{value:g}" for value in self.values)
        return f"{self.flag}={self.measure}{'=' if self.measure else ''}{numbers}"

    def folder(self, value: float) -> str:
        return f"{self.flag}_{self.measure}{'_' if self.measure else ''}{value:g}"

    def option(self, value: float) -> float | str:
        """The flag's value."""
        return str(Budget(self.measure, value)) if self.measure else value

    def modes_are_one(self, value: float) -> bool:
        """Whether the structure term is left out, so that there is nothing to weight."""
        return self.flag in WITHOUT_STRUCTURE and value == 0


def parse_sweep(kind: type, text: str) -> Sweep:
    """From "structure_share=0,0.1,0.3", a flag of the dataclass `kind` that takes a number, or from
    "budget=psnr=40,36.5,33", budgets of one measure.
    """
    name, _, numbers = text.partition("=")
    measure, _, numbers = numbers.partition("=") if name == "budget" else ("", "", numbers)
    kinds = {one.name: one.metadata for one in fields(kind)}
    if name != "budget" and kinds.get(name, {}).get("parse") not in (int, float, number_or_none):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no flag of the attack that takes a number; expected FLAG=A,B,... such as "
            f"structure_share=0,0.1,0.3 or budget=psnr=40,36.5,33"
        )

    def parse(number: str) -> float:
        if name == "budget":
            return parse_budget(f"{measure}={number}").value
        value, allowed = kinds[name]["parse"](number), kinds[name]["range"]
        if value is None or (allowed and not allowed.holds(value)):
            raise ValueError(f"{name} is {number}; expected {allowed.name if allowed else 'a number'}")
        return value

    try:
        values = tuple(map(parse, numbers.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{numbers!r} are no values of {name}: {error}") from None
    if len(values) < 2 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError("expected at least two values, none of them twice")
    return Sweep(name, values, measure)


def report_sweep(
    sweep: Sweep, points: Mapping[str, Sequence[tuple[Run, Evaluation]]], failures: Sequence[str]
) -> Report:
    """Compares modes over a sweep.

    Args:
        points: by mode, one at each value, all on the same images.
        failures: which images are left out, and why.
    """
    first_run, first_evaluation = next(iter(points.values()))[0]
    figures = {mode: [point_figures(*point) for point in each] for mode, each in points.items()}
    pairs = []
    if first_evaluation.transfers:
        curves = {mode: curve_of(evaluation for _, evaluation in each) for mode, each in points.items()}
        pairs = compare_curves(curves)
    lines = [
        ((mode, f"{value:g}"), at_value)
        for mode, at_values in figures.items()
        for value, at_value in zip(sweep.values, at_values)
    ]
    sections = [(f"Every mode at every {sweep.flag}", figure_rows(["mode", sweep.flag], lines))]
    if pairs:
        sections.append(("At equal visibility", pair_rows(pairs)))
    remarks = [
        f"{len(first_run.records)} images; white-box and transfer are attack success {COUNTED}; in brackets "
        f"95 % intervals, Wilson's for success and bootstrap over images for the rest; iterations and L2 "
        f"when first fooled are of images that are fooled at all",
        *legend(VISIBILITIES),
        "at equal visibility: each image's curves, points joined by straight lines, are compared over the "
        "visibilities that both modes reach, and their difference is averaged; p is of a permutation of "
        f"signs, corrected by Holm over the {len(pairs)} differences",
        *(
            f"at {sweep.flag} 0 there is nothing to weight: one attack stands for all modes"
            for value in sweep.values
            if sweep.modes_are_one(value)
        ),
        *(f"left out: {failure}" for failure in failures),
    ]
    results = {
        "flag": sweep.flag,
        "values": list(sweep.values),
        "images": [row["file"] for row in first_run.rows],
        "figures": figures,
        "at_equal_visibility": pairs,
    }
    return Report(sections, remarks, results)


def point_figures(run: Run, evaluation: Evaluation) -> dict[str, Estimate]:
    """Of a mode at one value."""
    iterations, distances = (values[np.isfinite(values)] for values in run.first_fooled)
    return figures_of(evaluation, VISIBILITIES) | {
        "first fooled in iteration": mean_over_images(iterations),
        "L2 then": mean_over_images(distances),
    }
