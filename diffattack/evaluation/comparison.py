"""What a comparison of weight modes or of attacks says: paired differences, sentences, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffattack.data.records import Run
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
from diffattack.evaluation.tables import COUNTED, cost_dict, cost_rows, legend

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


@dataclass(frozen=True)
class Metric:
    """One line of the table, and of the JSON: a figure of every mode, and its difference to the first mode
    where pairs of images give one.
    """

    name: str
    values: dict[str, Estimate]  # by mode
    differences: dict[str, Difference | None]
    note: str | None = None
    # the same of what the diffusion model makes of the images without any attack
    reconstructed: Estimate | None = None


def compare_runs(
    runs: Mapping[str, Run], evaluations: Mapping[str, Evaluation], failures: Sequence[str]
) -> Report:
    """Compares modes or attacks by name, the first with each other one, on the images that were attacked in
    all of them; failures say which images are left out, and why.
    """
    rows = {name: list(run.rows) for name, run in runs.items()}
    metrics = metrics_of(evaluations, runs, rows)
    first, *others = runs
    images = len(rows[first])
    described = [
        *evaluations[first].legend_of_classifiers,
        *legend(metric.name for metric in metrics),
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


def metrics_of(
    evaluations: Mapping[str, Evaluation], runs: Mapping[str, Run], rows: Mapping[str, Sequence[dict]]
) -> list[Metric]:
    """The lines of the table: success, visibility, realism, time; all by mode, on the same images."""
    each = list(evaluations.values())
    metrics = success_metrics(evaluations) + [
        metric(
            name,
            {mode: one.quality[name].adversarial for mode, one in evaluations.items()},
            None if quality.by_image is None else [one.quality[name].by_image for one in each],
            note=quality.note,
            reconstructed=quality.reconstructed,
        )
        for name, quality in each[0].quality.items()
    ]
    by_image = {}
    if all(run.timesteps for run in runs.values()):
        iterations, distances = zip(*(run.first_fooled for run in runs.values()))
        by_image["first fooled in iteration"] = iterations, "of images that are fooled at all"
        by_image["L2 when first fooled"] = distances, "the same, before rounding"
    seconds = [np.array([row["seconds"] for row in of_run]) for of_run in rows.values()]
    by_image["seconds an image"] = seconds, "with the inversion"
    for name, (values, note) in by_image.items():
        means = (mean_over_images(of_mode[np.isfinite(of_mode)]) for of_mode in values)
        metrics.append(metric(name, dict(zip(runs, means)), values, note=note))
    correct([difference for one in metrics for difference in one.differences.values() if difference])
    return metrics


def success_metrics(evaluations: Mapping[str, Evaluation]) -> list[Metric]:
    """Of each classifier and its draws, of all surrogates at once, and the mean of transfer classifiers; of
    sigmoid heads mAP, which is of no single image, so that there are no pairs.
    """
    each, lines = list(evaluations.values()), []

    def add(name: str, values: Sequence[Estimate], *pairs: object, **about: object) -> None:
        lines.append(metric(name, dict(zip(evaluations, values)), *pairs, **about))

    for k, result in enumerate(each[0].classifiers):
        of_modes = [one.classifiers[k] for one in each]
        for rule in (None, *RULES) if result.draws else (None,):
            name = f"{ROLES[each[0].role(k)]}, {result.name}" + f", {rule} of {result.draws} draws" * bool(
                rule
            )
            found = [one.by_image("success", rule) for one in of_modes]
            alone = None if rule else result.rate("success_of_reconstruction")
            rates = [one.rate("success", rule) for one in of_modes]
            # what counts is by the clean pictures alone, the same of all modes
            add(name, rates, [values for _, values in found], found[0][0], reconstructed=alone)
    for k, result in enumerate(each[0].classifiers):
        if before := result.mean_precisions.get("mAP_before"):
            means = [one.classifiers[k].mean_precisions["mAP_after"] for one in each]
            add(f"mAP after, {result.name}", means, note=f"{before} before")
    if each[0].surrogates > 1:
        fooled = [one.joint()[1] for one in each]
        add("white-box, all at once", [one.joint_success for one in each], fooled, each[0].joint()[0])
    if each[0].transfers:
        shares = [transfer_shares(one) for one in each]
        add("transfer, mean", [one.transfer_success for one in each], shares)
    return lines


def metric(
    name: str,
    values: Mapping[str, Estimate],
    by_image: Sequence[np.ndarray] | None = None,
    counted: np.ndarray | None = None,
    note: str | None = None,
    reconstructed: Estimate | None = None,
) -> Metric:
    """A line of the table.

    Args:
        by_image: of each mode, `(B,)`, to be compared in pairs.
        counted: which of these count, `(B,)`.
    """
    differences = dict.fromkeys(values)
    if by_image is not None and (counted is None or counted.any()):
        first, *others = by_image if counted is None else [one[counted] for one in by_image]
        differences = dict(zip(values, [None, *(paired(first, other) for other in others)]))
    return Metric(name, dict(values), differences, note, reconstructed)


def transfer_shares(evaluation: Evaluation) -> np.ndarray:
    """What each image adds to the mean of the transfer classifiers' success rates, times the number of
    images: its mean is that mean.
    """
    found = (result.counts("success") for result in evaluation.transfers)
    shares = sum(fooled / max(1, counted.sum()) for counted, fooled in found)
    return shares * len(shares) / len(evaluation.transfers)


# ---------------------------------------------------------------- in words


def sentence(first: str, mode: str, metrics: Sequence[Metric], images: int) -> str:
    """One mode's differences to the first one, in a sentence."""
    tests = sum(difference is not None for metric in metrics for difference in metric.differences.values())
    found = [
        f"{metric.name} ({of_mode.difference.value:+.3g}, p = {of_mode.p_holm:.2g})"
        for metric in metrics
        if (of_mode := metric.differences[mode]) and of_mode.p_holm <= ALPHA
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


def metric_rows(metrics: Sequence[Metric]) -> list[list[str]]:
    names = list(metrics[0].values)
    alone = any(metric.reconstructed for metric in metrics)
    rows = [["", *(["reconstruction alone"] if alone else []), *names, ""]]
    for metric in metrics:
        columns = [str(metric.reconstructed or "")] if alone else []
        rows.append([metric.name, *columns, *map(str, metric.values.values()), metric.note or ""])
        if any(metric.differences.values()):
            told = ["" if d is None else difference_text(d) for d in metric.differences.values()]
            rows.append([f"  - {names[0]}", *([""] if alone else []), *told, ""])
    return rows


def difference_text(of_mode: Difference) -> str:
    found = of_mode.difference
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{found.value:+.3g}{interval}, p {of_mode.p_holm:.2g}"
