"""What a sweep says: every weight mode at several values of one flag, compared where it is equally visible.

A weighting that changes the picture less also fools less, so that two modes at one setting say little of
which is better. Here each mode gives a curve for each image, of transfer over visibility, and the curves of
two modes are compared where both reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from diffattack.common.flags import number_or_none
from diffattack.data.records import Run
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.curves import VISIBILITIES, compare_curves, curve_of, pair_rows, success_rates
from diffattack.evaluation.results import Evaluation, plain
from diffattack.evaluation.statistics import Estimate, mean_over_images
from diffattack.evaluation.tables import COUNTED, legend

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
    """From "structure_share=0,0.1,0.3", a flag of the dataclass `kind` that takes a number."""
    name, _, numbers = text.partition("=")
    if name == "budget":
        return parse_budgets(numbers)
    declared = {
        declared.name: declared
        for declared in fields(kind)
        if declared.metadata["parse"] in (int, float, number_or_none)
    }
    if name not in declared:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no flag of the attack that takes a number; expected FLAG=A,B,... with FLAG one of "
            f"{', '.join(declared)}"
        )
    try:
        values = tuple(declared[name].metadata["parse"](number) for number in numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{numbers!r} are no values of {name}; expected numbers separated by commas"
        ) from None
    if None in values:
        raise argparse.ArgumentTypeError(f"{numbers!r} are no numbers; a sweep of {name} takes numbers alone")
    allowed = declared[name].metadata["range"]
    for value in values:
        if allowed and not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{name} is {value:g}; expected {allowed.name}")
    check_count(values)
    return Sweep(name, values)


def parse_budgets(text: str) -> Sweep:
    """From "psnr=40,36.5,33": budgets of one measure."""
    measure, _, numbers = text.partition("=")
    try:
        values = tuple(parse_budget(f"{measure}={number}").value for number in numbers.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; a sweep takes several of one measure, such as budget=psnr=40,36.5,33"
        ) from None
    check_count(values)
    return Sweep("budget", values, measure)


def check_count(values: tuple[float, ...]) -> None:
    if len(values) < 2 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError("expected at least two values, none of them twice")


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Point:
    """A mode at one value of the flag, on the same images as all the others."""

    mode: str
    value: float
    run: Run
    evaluation: Evaluation


@dataclass(frozen=True)
class SweepReport:
    """Modes compared at several values of a flag."""

    sections: list[tuple[str, list[list[str]]]]
    remarks: list[str]
    results: dict  # for JSON
    rates: dict[str, list[dict[str, Estimate]]]  # by mode, figures at each value


def report_sweep(sweep: Sweep, points: dict[str, list[Point]], failures: Sequence[str]) -> SweepReport:
    """Compares modes over a sweep.

    Args:
        points: by mode, one at each value.
        failures: which images are left out, and why.
    """
    images = len(next(iter(points.values()))[0].run.records)
    rates = {mode: [rates_of(point) for point in at_values] for mode, at_values in points.items()}
    has_transfer = all(point.evaluation.transfers for at_values in points.values() for point in at_values)
    evaluations = {mode: [point.evaluation for point in at_values] for mode, at_values in points.items()}
    pairs = compare_curves({m: curve_of(each) for m, each in evaluations.items()}) if has_transfer else []
    sections = [(f"Every mode at every {sweep.flag}", rate_rows(sweep, rates))]
    if pairs:
        sections.append(("At equal visibility", pair_rows(pairs)))
    remarks = [
        f"{images} images; white-box and transfer are attack success {COUNTED}; in brackets 95 % intervals, "
        f"Wilson's for success and bootstrap over images for the rest; iterations and L2 when first fooled "
        f"are of images that are fooled at all",
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
        "images": [row["file"] for row in next(iter(points.values()))[0].run.rows],
        "figures": {
            mode: [{name: plain(figure) for name, figure in at_value.items()} for at_value in at_values]
            for mode, at_values in rates.items()
        },
        "at_equal_visibility": [pair.as_dict() for pair in pairs],
    }
    return SweepReport(sections, remarks, results, rates)


def rates_of(point: Point) -> dict[str, Estimate]:
    evaluation = point.evaluation
    iterations, distances = (values[np.isfinite(values)] for values in point.run.first_fooled)
    return {
        **success_rates(evaluation),
        **{name: evaluation.quality[name].adversarial for name in VISIBILITIES},
        "first fooled in iteration": mean_over_images(iterations),
        "L2 then": mean_over_images(distances),
    }


def rate_rows(sweep: Sweep, rates: dict[str, list[dict[str, Estimate]]]) -> list[list[str]]:
    names = list(next(iter(rates.values()))[0])
    return [["mode", sweep.flag, *names]] + [
        [mode, f"{value:g}", *(str(figures[name]) for name in names)]
        for mode, at_values in rates.items()
        for value, figures in zip(sweep.values, at_values)
    ]
