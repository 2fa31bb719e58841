"""What a sweep says: every weight mode at several values of one flag, compared where it is equally visible.

A weighting that changes the picture less also fools less, so that two modes at one setting say little of
which is better. Here each mode gives a curve for each image, of transfer over visibility, and the curves of
two modes are compared where both reach.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import StringIO

import numpy as np

from diffattack.common.flags import number_or_none
from diffattack.data.records import Run
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.evaluate import Evaluation, plain
from diffattack.evaluation.legend import COUNTED, legend
from diffattack.evaluation.stats import Difference, Estimate, holm, mean_difference, mean_over_images

# of visibility, with the sign that makes more visible larger
VISIBILITIES = {"L2": 1.0, "SSIM": -1.0}
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


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Point:
    """A mode at one value of the flag, on the same images as all the others."""

    mode: str
    value: float
    run: Run
    evaluation: Evaluation


@dataclass(frozen=True)
class Curve:
    """A mode at all values, in their order, by image."""

    visibility: dict[str, np.ndarray]  # of VISIBILITIES, (values, B)
    scores: dict[str, np.ndarray]  # (values, B); NaN for an image on which it says nothing


def transfer_scores(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """How far each image fools the transfer classifiers that had it right before, `(B,)`: the share of them
    that is fooled, and the mean probability that they leave to its true class.
    """
    results = evaluation.transfers
    counted = np.stack([result.correct_before for result in results])
    fooled = np.stack([result.fooled for result in results])
    left = np.stack([result.after.true_confidences for result in results])
    with np.errstate(invalid="ignore"):
        return {
            "transfer success": (fooled & counted).sum(0) / counted.sum(0),
            "confidence left in the true class": np.where(counted, left, 0).sum(0) / counted.sum(0),
        }


def curve_of(evaluations: Sequence[Evaluation]) -> Curve:
    """Of a mode's evaluations at all values of a flag, or at several iterations."""
    scores = [transfer_scores(evaluation) for evaluation in evaluations]
    return Curve(
        {
            name: np.stack([sign * evaluation.quality[name].by_image for evaluation in evaluations])
            for name, sign in VISIBILITIES.items()
        },
        {name: np.stack([score[name] for score in scores]) for name in scores[0]},
    )


def difference_at_equal_visibility(
    visibility: tuple[np.ndarray, np.ndarray], scores: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The second curve minus the first, for each image, averaged over the visibilities that both reach:
    `(B,)`, NaN where they have none in common.

    Each image's points are joined by straight lines in the order of their visibility; nothing is
    extrapolated.

    Args:
        visibility, scores: of both curves, `(values, B)` each.
    """
    differences = np.full(visibility[0].shape[1], np.nan)
    for k in range(len(differences)):
        curves = []
        for v, s in zip(visibility, scores):
            order = np.argsort(v[:, k], kind="stable")
            curves.append((v[order, k], s[order, k]))
        (v1, s1), (v2, s2) = curves
        low, high = max(v1[0], v2[0]), min(v1[-1], v2[-1])
        if low <= high:
            grid = np.unique(np.clip(np.concatenate([v1, v2]), low, high))
            difference = np.interp(grid, v2, s2) - np.interp(grid, v1, s1)
            differences[k] = (
                np.trapezoid(difference, grid) / (high - low) if high > low else difference.mean()
            )
    return differences


@dataclass
class PairDifference:
    """Of two modes at equal visibility; `count` images say something."""

    modes: tuple[str, str]
    visibility: str
    score: str
    difference: Difference
    count: int

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "modes": list(self.modes),
            "visibility": self.visibility,
            "score": self.score,
            "difference": plain(self.difference.estimate),
            "p": self.difference.p,
            "p_holm": self.difference.corrected,
            "images": self.count,
        }


def compare_curves(curves: dict[str, Curve]) -> list[PairDifference]:
    """Every pair of modes by every score at every measure of visibility; p is corrected by Holm over all."""
    pairs = []
    for first, second in itertools.combinations(curves, 2):
        a, b = curves[first], curves[second]
        for visibility, score in itertools.product(VISIBILITIES, a.scores):
            differences = difference_at_equal_visibility(
                (a.visibility[visibility], b.visibility[visibility]), (a.scores[score], b.scores[score])
            )
            known = differences[np.isfinite(differences)]
            pairs.append(
                PairDifference((first, second), visibility, score, mean_difference(known), len(known))
            )
    for pair, corrected in zip(pairs, holm([pair.difference.p for pair in pairs])):
        pair.difference.corrected = corrected
    return pairs


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class SweepReport:
    """All that is said of a sweep."""

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
        f"white-box, {evaluation.classifiers[0].name}": evaluation.classifiers[0].success,
        **({"transfer, mean": evaluation.transfer_success} if evaluation.transfers else {}),
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


def pair_rows(pairs: Sequence[PairDifference]) -> list[list[str]]:
    return [["modes", "of", "at equal", "difference", "p", "corrected", "images"]] + [
        [
            f"{pair.modes[1]} - {pair.modes[0]}",
            pair.score,
            pair.visibility,
            ""
            if pair.count == 0
            else f"{pair.difference.estimate.value:+.3f} "
            f"[{pair.difference.estimate.low:+.3f}, {pair.difference.estimate.high:+.3f}]",
            f"{pair.difference.p:.2g}",
            f"{pair.difference.corrected:.2g}",
            str(pair.count),
        ]
        for pair in pairs
    ]


def sweep_csv(points: dict[str, list[Point]]) -> str:
    """A row per image, mode and value, for curves of one's own."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    evaluation = next(iter(points.values()))[0].evaluation
    names = [result.name for result in evaluation.classifiers]
    measures = [name for name, quality in evaluation.quality.items() if quality.by_image is not None]
    writer.writerow(
        [
            "image",
            "mode",
            "value",
            *(f"fooled {name}" for name in names),
            *(f"true confidence {name}" for name in names),
            *measures,
            "first fooled in iteration",
            "L2 then",
        ]
    )
    for mode, at_values in points.items():
        for point in at_values:
            iterations, distances = point.run.first_fooled
            for k, row in enumerate(point.run.rows):
                results = point.evaluation.classifiers
                writer.writerow(
                    [
                        row["file"],
                        mode,
                        point.value,
                        *(int(result.fooled[k]) if result.correct_before[k] else "" for result in results),
                        *(result.after[k].true_confidence for result in results),
                        *(point.evaluation.quality[name].by_image[k] for name in measures),
                        *("" if np.isnan(value) else value for value in (iterations[k], distances[k])),
                    ]
                )
    return out.getvalue()
