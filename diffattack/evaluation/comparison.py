"""What a comparison of weight modes or of attacks says: paired differences, sentences, tables; and what a
sweep says, of every mode at several values of one flag, compared where it is equally visible.

A weighting that changes the picture less also fools less, so that two modes at one setting say little of
which is better. In a sweep each mode gives a curve for each image, of transfer over visibility, and the
curves of two modes are compared where both reach.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from diffattack.common.flags import number_or_none
from diffattack.data.records import Run
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.curves import VISIBILITIES, compare_curves, curve_of, figures_of, pair_rows
from diffattack.evaluation.metrics import Quality
from diffattack.evaluation.predictions import RULES
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.statistics import (
    ALPHA,
    Difference,
    Estimate,
    correct,
    mean_over_images,
    paired,
    smallest_success_difference,
)
from diffattack.evaluation.tables import COUNTED, cost_dict, cost_rows, figure_rows, legend

# flags at which, when they are 0, all modes are the same attack
WITHOUT_STRUCTURE = ("self_attn_loss_weight", "structure_share")
ROLES = {"surrogate": "white-box", "transfer": "transfer", "defended": "behind a defence"}


@dataclass(frozen=True)
class Report:
    """What a comparison or a sweep says."""

    sections: list[tuple[str, list[list[str]]]]  # tables with their titles
    remarks: list[str]  # below them; the first ones are what a reader of the first table must know
    results: dict  # for `json_text`

    @property
    def caption(self) -> str:
        return ". ".join(self.remarks[: 1 + len(self.results.get("legend", ()))])


def compare_runs(
    runs: Mapping[str, Run], evaluations: Mapping[str, Evaluation], failures: Sequence[str]
) -> Report:
    """Compares modes or attacks by name, the first with each other one, on the images that were attacked in
    all of them; failures say which images are left out, and why.
    """
    rows = {name: list(run.rows) for name, run in runs.items()}
    metrics = compare_metrics(
        {name: metrics_of(evaluations[name], run, rows[name]) for name, run in runs.items()}
    )
    first, *others = runs
    images = len(rows[first])
    described = [
        *evaluations[first].legend_of_classifiers,
        *legend(line["name"] for line in metrics),
    ]
    sentences = [sentence(first, name, metrics, images) for name in others]
    sections = [
        (f"Figures; attack success {COUNTED}", metric_rows(metrics)),
        ("Costs", cost_rows(rows)),
    ]
    warnings = dict.fromkeys(warning for each in evaluations.values() for warning in each.warnings)
    remarks = [
        f"{images} images; white-box and transfer are attack success {COUNTED}; in brackets 95 % intervals; "
        f"below each figure its difference to {first} on the same images, and p, corrected by Holm over "
        f"the table",
        *described,
        *sentences,
        *(f"warning: {warning}" for warning in warnings),
        *(f"left out: {failure}" for failure in failures),
    ]
    results = {
        "modes": list(runs),
        "images": [row["file"] for row in rows[first]],
        "figures": metrics,
        "legend": described,
        "sentences": sentences,
        "costs": {name: cost_dict(of_run) for name, of_run in rows.items()},
        "evaluations": {name: evaluation.as_dict() for name, evaluation in evaluations.items()},
        "not_attacked": list(failures),
    }
    return Report(sections, remarks, results)


def metrics_of(evaluation: Evaluation, run: Run, rows: Sequence[dict]) -> dict[str, Quality]:
    """The lines of the table for a mode: success, visibility, realism, time; NaN for an image that does not
    count.
    """
    found = success_metrics(evaluation) | evaluation.quality
    if run.timesteps:
        iterations, distances = run.summary.first_fooled, run.summary.distance_then
        found["first fooled in iteration"] = mean_of(iterations, "of images that are fooled at all")
        found["L2 when first fooled"] = mean_of(distances, "the same, before rounding")
    seconds = np.array([row["seconds"] for row in rows])
    return found | {"seconds an image": mean_of(seconds, "with the inversion")}


def mean_of(values: np.ndarray, note: str) -> Quality:
    return Quality(mean_over_images(values[np.isfinite(values)]), None, values, note)


def success_metrics(evaluation: Evaluation) -> dict[str, Quality]:
    """Of each classifier and its draws, of all surrogates at once, and the mean of transfer classifiers; of
    sigmoid heads mAP, which is of no single image, so that there are no pairs.
    """
    found, of_precision = {}, {}
    for k, result in enumerate(evaluation.classifiers):
        name = f"{ROLES[evaluation.role(k)]}, {result.name}"
        for rule in (None, *RULES) if result.draws else (None,):
            counted, values = result.by_image("success", rule)
            found[f"{name}, {rule} of {result.draws} draws" if rule else name] = Quality(
                result.rate("success", rule),
                None if rule else result.rate("success_of_reconstruction"),
                np.where(counted, values, np.nan),
            )
        if means := result.mean_precisions:
            note = f"{means['mAP_before']} before"
            of_precision[f"mAP after, {result.name}"] = Quality(means["mAP_after"], note=note)
    found |= of_precision
    if evaluation.surrogates > 1:
        fooled = np.where(*evaluation.joint(), np.nan)
        found["white-box, all at once"] = Quality(evaluation.joint_success, None, fooled)
    if evaluation.transfers:
        shares = transfer_shares(evaluation)
        found["transfer, mean"] = Quality(evaluation.transfer_success, None, shares)
    return found


def compare_metrics(modes: Mapping[str, Mapping[str, Quality]]) -> list[dict]:
    """The lines that all modes have, as JSON has them, and the differences to the first mode where pairs of
    images give one, corrected by Holm over all.
    """
    first, lines = next(iter(modes)), []
    for name, figure in modes[first].items():
        if all(name in metrics for metrics in modes.values()):
            figures = {mode: metrics[name] for mode, metrics in modes.items()}
            lines.append(
                {
                    "name": name,
                    "values": {mode: one.adversarial for mode, one in figures.items()},
                    "differences": {mode: difference_of(figure, one) for mode, one in figures.items()},
                    "note": figure.note,
                    "reconstructed": figure.reconstructed,
                }
            )
    correct([difference for line in lines for difference in line["differences"].values() if difference])
    return lines


def difference_of(first: Quality, other: Quality) -> Difference | None:
    """None of the first itself, and where no image counts."""
    share = first.adversarial
    if other is first or first.by_image is None or (share.is_share and math.isnan(share.value)):
        return None
    return paired(first.by_image, other.by_image, yes_or_no=share.count is not None)


def transfer_shares(evaluation: Evaluation) -> np.ndarray:
    """What each image adds to the mean of the transfer classifiers' success rates, times the number of
    images: its mean is that mean.
    """
    found = (result.counts("success") for result in evaluation.transfers)
    shares = sum(fooled / max(1, counted.sum()) for counted, fooled in found)
    return shares * len(shares) / len(evaluation.transfers)


# ---------------------------------------------------------------- in words


def sentence(first: str, mode: str, metrics: Sequence[dict], images: int) -> str:
    """One mode's differences to the first one, in a sentence."""
    tests = sum(difference is not None for line in metrics for difference in line["differences"].values())
    found = [
        f"{line['name']} ({of_mode.difference.value:+.3g}, p = {of_mode.p_holm:.2g})"
        for line in metrics
        if (of_mode := line["differences"][mode]) and of_mode.p_holm <= ALPHA
    ]
    smallest = smallest_success_difference(images, tests)
    power = (
        f"the smallest difference in success that they could show is {100 * smallest:.0f} points"
        if smallest is not None
        else f"so few images cannot show any difference in success after correction for the {tests} tests "
        f"of this table"
    )
    if found:
        return f"{mode}: differs from {first} in {', '.join(found)}; {power}."
    return f"{mode}: no difference to {first} that these {images} images could show; {power}."


def metric_rows(metrics: Sequence[dict]) -> list[list[str]]:
    names = list(metrics[0]["values"])
    alone = ["reconstruction alone"] if any(line["reconstructed"] for line in metrics) else []
    rows = [["", *alone, *names, ""]]
    for line in metrics:
        columns = [str(line["reconstructed"] or "") for _ in alone]
        rows.append([line["name"], *columns, *map(str, line["values"].values()), line["note"] or ""])
        differences = line["differences"].values()
        if any(differences):
            told = ["" if d is None else difference_text(d) for d in differences]
            rows.append([f"  - {names[0]}", *("" for _ in alone), *told, ""])
    return rows


def difference_text(of_mode: Difference) -> str:
    found = of_mode.difference
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{found.value:+.3g}{interval}, p {of_mode.p_holm:.2g}"


# ---------------------------------------------------------------- every mode at several values of a flag


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
    iterations, distances = (
        values[np.isfinite(values)] for values in (run.summary.first_fooled, run.summary.distance_then)
    )
    return figures_of(evaluation, VISIBILITIES) | {
        "first fooled in iteration": mean_over_images(iterations),
        "L2 then": mean_over_images(distances),
    }
