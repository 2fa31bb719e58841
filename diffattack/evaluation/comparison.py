"""What a comparison of weight modes or of attacks says: paired differences, sentences, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffattack.data.records import Run
from diffattack.evaluation.predictions import DRAWS_LEGEND, RULES
from diffattack.evaluation.results import Evaluation, joint, plain
from diffattack.evaluation.statistics import (
    ALPHA,
    Difference,
    Estimate,
    holm,
    mcnemar,
    mean_difference,
    mean_over_images,
    share,
    smallest_success_difference,
)
from diffattack.evaluation.tables import COUNTED, cost_dict, cost_rows, legend, legend_of_head

ROLES = {"surrogate": "white-box", "transfer": "transfer", "defended": "behind a defence"}


@dataclass
class Metric:
    """One line of the table: a figure of every mode, and its difference to the first mode where pairs of
    images give one.
    """

    name: str
    values: list[Estimate]
    differences: list[Difference | None]
    note: str | None = None
    # the same of what the diffusion model makes of the images without any attack
    reconstructed: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """Several modes compared on the same images."""

    names: list[str]
    sections: list[tuple[str, list[list[str]]]]  # tables with their titles
    remarks: list[str]
    results: dict  # for JSON

    @property
    def caption(self) -> str:
        """What a reader of the first table must know."""
        return ". ".join(self.remarks[: 1 + len(self.results["legend"])])


def compare_runs(
    names: list[str],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    failures: list[str],
) -> Comparison:
    """Compares modes or attacks, the first with each other one, on the images that were attacked in all of
    them; runs and evaluations are by mode, and failures say which images are left out, and why.
    """
    metrics, images = metrics_of(evaluations, runs), len(runs[0].records)
    rows = {name: list(run.rows) for name, run in zip(names, runs)}
    described = [
        *legend_of_head(evaluations[0].classifiers[0]),
        *legend(metric.name for metric in metrics),
    ]
    if any(evaluation.draws for evaluation in evaluations):
        described.insert(0, DRAWS_LEGEND)
    sentences = [sentence(k, names, metrics, images) for k in range(1, len(names))]
    sections = [
        (f"Figures; attack success {COUNTED}", metric_rows(names, metrics)),
        ("Costs", cost_rows(rows)),
    ]
    warnings = dict.fromkeys(warning for evaluation in evaluations for warning in evaluation.warnings)
    remarks = [
        f"{images} images; white-box and transfer are attack success {COUNTED}; in brackets 95 % intervals; "
        f"below each figure its difference to {names[0]} on the same images, and p, corrected by Holm over "
        f"the table",
        *described,
        *sentences,
        *(f"warning: {warning}" for warning in warnings),
        *(f"left out: {failure}" for failure in failures),
    ]
    results = {
        "modes": names,
        "images": [row["file"] for row in rows[names[0]]],
        "figures": [as_dict(metric, names) for metric in metrics],
        "legend": described,
        "sentences": sentences,
        "costs": {name: cost_dict(rows[name]) for name in names},
        "evaluations": {name: evaluation.as_dict() for name, evaluation in zip(names, evaluations)},
        "not_attacked": failures,
    }
    return Comparison(names, sections, remarks, results)


def metrics_of(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> list[Metric]:
    """The lines of the table: success, visibility, realism, time; evaluations and runs by mode, on the same
    images.
    """
    lines = []
    for k, result in enumerate(evaluations[0].classifiers):
        counted = result.correct_before
        lines.append(
            Metric(
                f"{ROLES[evaluations[0].role(k)]}, {result.name}",
                [e.classifiers[k].success for e in evaluations],
                success_differences(counted, [e.classifiers[k].fooled for e in evaluations]),
                reconstructed=share(result.fooled_by_reconstruction.sum(), counted.sum())
                if evaluations[0].with_reconstructions
                else None,
            )
        )
        lines += metrics_of_draws(f"{ROLES[evaluations[0].role(k)]}, {result.name}", result.name, evaluations)
    lines += precision_metrics(evaluations)
    if evaluations[0].surrogates > 1:
        together = [joint(e.classifiers[: e.surrogates]) for e in evaluations]
        lines.append(
            Metric(
                "white-box, all at once",
                [e.joint_success for e in evaluations],
                success_differences(together[0][0], [fooled for _, fooled in together]),
            )
        )
    if evaluations[0].transfers:
        scores = [transfer_scores(e) for e in evaluations]
        lines.append(
            Metric(
                "transfer, mean",
                [e.transfer_success for e in evaluations],
                [None] + [mean_difference(s - scores[0]) for s in scores[1:]],
            )
        )
    for name, quality in evaluations[0].quality.items():
        by_image = [e.quality[name].by_image for e in evaluations]
        differences = [None] * (len(evaluations) - 1)
        if quality.by_image is not None:
            with np.errstate(invalid="ignore"):  # of pictures that neither changed, whose PSNR is infinite
                differences = [mean_of_known(values - by_image[0]) for values in by_image[1:]]
        lines.append(
            Metric(
                name,
                [e.quality[name].adversarial for e in evaluations],
                [None, *differences],
                quality.note,
                quality.reconstructed,
            )
        )
    if all(run.timesteps for run in runs):
        iterations, distances = zip(*(run.first_fooled for run in runs))
        lines += [
            means("first fooled in iteration", iterations, "of images that are fooled at all"),
            means("L2 when first fooled", distances, "the same, before rounding"),
        ]
    seconds = [np.array([row["seconds"] for row in run.rows]) for run in runs]
    lines.append(means("seconds an image", seconds, "with the inversion"))
    tested = [difference for line in lines for difference in line.differences if difference is not None]
    for difference, corrected in zip(tested, holm([difference.p for difference in tested])):
        difference.corrected = corrected
    return lines


def metrics_of_draws(title: str, name: str, evaluations: Sequence[Evaluation]) -> list[Metric]:
    """The lines of a classifier's draws below its own, where it was judged by several."""
    each = [evaluation.draws.get(name) for evaluation in evaluations]
    if None in each:
        return []
    lines = []
    for rule in RULES:
        counted, *_ = each[0].by_image(rule, "success")  # by the clean pictures alone, the same of all
        fooled = [over.by_image(rule, "success")[1] for over in each]
        if rule == "mean" and counted.any():
            differences = [None] + [mean_difference((of - fooled[0])[counted]) for of in fooled[1:]]
        else:
            differences = success_differences(counted, [of.astype(bool) for of in fooled])
        rates = [over.rate(rule, "success") for over in each]
        lines.append(Metric(f"{title}, {each[0].title(rule)}", rates, differences))
    return lines


def precision_metrics(evaluations: Sequence[Evaluation]) -> list[Metric]:
    """Of sigmoid heads, mAP after each mode's attack; it is of no single image, so there are no pairs."""
    return [
        Metric(
            f"mAP after, {result.name}",
            [e.classifiers[k].mean_precisions["mAP_after"] for e in evaluations],
            [None] * len(evaluations),
            f"{result.mean_precisions['mAP_before']} before",
        )
        for k, result in enumerate(evaluations[0].classifiers)
        if result.precisions
    ]


def means(name: str, by_image: Sequence[np.ndarray], note: str) -> Metric:
    """A line of means over images, `(B,)` by mode, and of paired differences; NaN where an image has none."""
    differences = [values - by_image[0] for values in by_image[1:]]
    return Metric(
        name,
        [mean_over_images(values[np.isfinite(values)]) for values in by_image],
        [None] + [mean_of_known(difference) for difference in differences],
        note,
    )


def mean_of_known(differences: np.ndarray) -> Difference:
    """Of paired differences `(B,)`, NaN left out."""
    return mean_difference(differences[np.isfinite(differences)])


def success_differences(counted: np.ndarray, fooled: Sequence[np.ndarray]) -> list[Difference | None]:
    """Of every mode's success to the first one's, on the images that count; `(B,)` each."""
    first, *others = (mode_fooled[counted] for mode_fooled in fooled)
    return [None] + [
        mean_difference(other.astype(float) - first, mcnemar(first, other)) if counted.any() else None
        for other in others
    ]


def transfer_scores(evaluation: Evaluation) -> np.ndarray:
    """What each image adds to the mean of the transfer classifiers' success rates, times the number of
    images: its mean is that mean.
    """
    scores = np.zeros(len(evaluation.classifiers[0].labels))
    for result in evaluation.transfers:
        scores += result.fooled / max(1, result.correct_before.sum())
    return scores * len(scores) / len(evaluation.transfers)


def sentence(mode: int, names: Sequence[str], metrics: Sequence[Metric], images: int) -> str:
    """One mode's differences to the first one, in a sentence."""
    tests = sum(difference is not None for metric in metrics for difference in metric.differences)
    found = [
        f"{metric.name} ({metric.differences[mode].estimate.value:+.3g}, p = "
        f"{metric.differences[mode].corrected:.2g})"
        for metric in metrics
        if metric.differences[mode] is not None and metric.differences[mode].corrected <= ALPHA
    ]
    smallest = smallest_success_difference(images, tests)
    power = (
        f"the smallest difference in success that they could show is {100 * smallest:.0f} points"
        if smallest is not None
        else f"so few images cannot show any difference in success after correction for the {tests} tests "
        f"of this table"
    )
    if found:
        return f"{names[mode]}: differs from {names[0]} in {', '.join(found)}; {power}."
    return f"{names[mode]}: no difference to {names[0]} that these {images} images could show; {power}."


def metric_rows(names: Sequence[str], metrics: Sequence[Metric]) -> list[list[str]]:
    alone = any(metric.reconstructed is not None for metric in metrics)
    rows = [["", *(["reconstruction alone"] if alone else []), *names, ""]]
    for metric in metrics:
        of_reconstruction = "" if metric.reconstructed is None else str(metric.reconstructed)
        columns = [of_reconstruction] if alone else []
        rows.append([metric.name, *columns, *map(str, metric.values), metric.note or ""])
        if any(difference is not None for difference in metric.differences):
            told = ["" if d is None else difference_text(d) for d in metric.differences]
            rows.append([f"  - {names[0]}", *([""] if alone else []), *told, ""])
    return rows


def difference_text(difference: Difference) -> str:
    estimate = difference.estimate
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:+.3g}, {estimate.high:+.3g}]"
    return f"{estimate.value:+.3g}{interval}, p {difference.corrected:.2g}"


def as_dict(metric: Metric, names: Sequence[str]) -> dict:
    differences = {
        name: None if d is None else {"difference": plain(d.estimate), "p": d.p, "p_holm": d.corrected}
        for name, d in zip(names, metric.differences)
    }
    return {
        "name": metric.name,
        "values": {name: plain(value) for name, value in zip(names, metric.values)},
        "differences": differences,
        "reconstructed": plain(metric.reconstructed),
        "note": metric.note,
    }


def success_points(
    names: Sequence[str], evaluations: Sequence[Evaluation], measure: str
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of each mode the measure of visibility, white-box success and mean transfer, as value and ends of the
    interval.
    """

    def ends(estimate: Estimate) -> tuple[float, float, float]:
        return (estimate.value, estimate.low, estimate.high)

    return {
        name: {
            measure: ends(e.quality[measure].adversarial),
            e.classifiers[0].name: ends(e.classifiers[0].success),
            **({"transfer, mean": ends(e.transfer_success)} if e.transfer_success else {}),
        }
        for name, e in zip(names, evaluations)
    }
