"""What a comparison of weight modes or of attacks says: paired differences, sentences, tables; and how far
the timesteps' weights moved, in a run, too.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from diffattack.data.records import Run
from diffattack.data.summaries import mean_and_deviation
from diffattack.evaluation.metrics import Quality, means_of
from diffattack.evaluation.predictions import ClassifierResult
from diffattack.evaluation.results import Evaluation, counts_of, transfer_mean
from diffattack.evaluation.statistics import (
    ALPHA,
    correct,
    paired,
    shares_of_images,
    smallest_success_difference,
)
from diffattack.evaluation.tables import COUNTED, Report, cost_dict, cost_rows, figure_rows, legend

ROLES = {"surrogate": "white-box", "transfer": "transfer", "defended": "behind a defence"}


def compare_runs(
    runs: Mapping[str, Run], evaluations: Mapping[str, Evaluation], failures: Sequence[str]
) -> Report:
    """Compares modes or attacks by name, the first with each other one, on the images that were attacked in
    all of them; failures say which images are left out, and why.
    """
    rows = {name: list(run.rows) for name, run in runs.items()}
    lines = compare_metrics({n: metrics_of(evaluations[n], run, rows[n]) for n, run in runs.items()})
    first, *others = runs
    images = [row["file"] for row in rows[first]]
    told = [*evaluations[first].legend_of_classifiers, *legend(line["name"] for line in lines)]
    sentences = [sentence(first, name, lines, len(images)) for name in others]
    warnings = dict.fromkeys(warning for each in evaluations.values() for warning in each.warnings)
    remarks = [
        f"{len(images)} images; white-box and transfer are attack success {COUNTED}; in brackets 95 % "
        f"intervals; below each figure its difference to {first} on the same images, and p, corrected by "
        f"Holm over the table",
        *told,
        *sentences,
        *(f"warning: {warning}" for warning in warnings),
        *(f"left out: {failure}" for failure in failures),
    ]
    results = {
        "modes": list(runs),
        "images": images,
        "figures": lines,
        "legend": told,
        "sentences": sentences,
        "costs": {name: cost_dict(of_run) for name, of_run in rows.items()},
        "evaluations": {name: evaluation.as_dict() for name, evaluation in evaluations.items()},
        "not_attacked": list(failures),
    }
    title = f"Figures; attack success {COUNTED}"
    return Report([(title, metric_rows(lines)), ("Costs", cost_rows(rows))], remarks, results)


def metrics_of(evaluation: Evaluation, run: Run, rows: Sequence[dict]) -> dict[str, Quality]:
    """The lines of the table for a mode: success, visibility, realism, time; NaN for an image that does not
    count.
    """
    iterations, distances = run.summary.first_fooled, run.summary.distance_then
    figures = [
        ("first fooled in iteration", iterations, "of images that are fooled at all"),
        ("L2 when first fooled", distances, "the same, before rounding"),
        ("seconds an image", np.array([row["seconds"] for row in rows]), "with the inversion"),
    ]
    found = success_metrics(evaluation) | evaluation.quality
    for name, values, note in figures if run.timesteps else figures[-1:]:
        found |= means_of([{name: values}], note=note)
    return found


def success_metrics(evaluation: Evaluation) -> dict[str, Quality]:
    """Of each classifier and its draws, of all surrogates at once, and the mean of transfer classifiers; of
    sigmoid heads mAP, which is of no single image, so that there are no pairs.
    """
    found = {}
    for k, result in enumerate(evaluation.classifiers):
        name = f"{ROLES[evaluation.role(k)]}, {result.title}"
        for rule, figures in result.figures.items():
            found[f"{name}, {rule} of {result.draws} draws" if rule else name] = Quality(
                figures["success"],
                None if rule else result.rate("success_of_reconstruction"),
                np.where(*result.counts[rule]["success"], np.nan),
            )
    if evaluation.surrogates > 1:
        fooled = np.where(*evaluation.joint(), np.nan)
        found["white-box, all at once"] = Quality(evaluation.joint_success, None, fooled)
    for group, results in evaluation.transfer_groups.items():
        found[f"transfer, {group}"] = Quality(transfer_mean(results), None, transfer_shares(results))
    return found


def compare_metrics(modes: Mapping[str, Mapping[str, Quality]]) -> list[dict]:
    """The lines that all modes have, as JSON has them, and the differences to the first mode where pairs of
    images give one, corrected by Holm over all.
    """
    (first, *others), lines = modes, []
    for name in [name for name in modes[first] if all(name in metrics for metrics in modes.values())]:
        figures = {mode: metrics[name] for mode, metrics in modes.items()}
        figure, rate, differences = figures[first], figures[first].adversarial, dict.fromkeys(modes)
        if figure.by_image is not None and not (rate.is_share and math.isnan(rate.value)):
            for mode in others:
                by_image = figure.by_image, figures[mode].by_image
                differences[mode] = paired(*by_image, yes_or_no=rate.count is not None)
        lines.append(
            {
                "name": name,
                "values": {mode: one.adversarial for mode, one in figures.items()},
                "differences": differences,
                "note": figure.note,
                "reconstructed": figure.reconstructed,
            }
        )
    correct([difference for line in lines for difference in line["differences"].values() if difference])
    return lines


def transfer_shares(results: Sequence[ClassifierResult]) -> np.ndarray:
    """What each image adds to the mean of these classifiers' success rates."""
    return shares_of_images(*counts_of(results))


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
    none = f"no difference to {first} that these {images} images could show"
    return f"{mode}: {f'differs from {first} in ' + ', '.join(found) if found else none}; {power}."


def metric_rows(metrics: Sequence[dict]) -> list[list[str]]:
    first, *_ = names = list(metrics[0]["values"])
    alone = ["reconstruction alone"] * any(line["reconstructed"] for line in metrics)
    rows = [["", *alone, *names, ""]]
    for line in metrics:
        columns = [str(line["reconstructed"] or "") for _ in alone]
        rows.append([line["name"], *columns, *map(str, line["values"].values()), line["note"] or ""])
        if any(line["differences"].values()):
            told = [str(each or "") for each in line["differences"].values()]
            rows.append([f"  - {first}", *("" for _ in alone), *told, ""])
    return rows


# ---------------------------------------------------------------- timestep weights

# reported for Stable Diffusion 2, at the first self-attention layer
STUDY_REMARK = (
    "the study that this tool extends reports 2-6, 5-8, 10-15, 20-28, 47-57 % by timestep at the first layer "
    "alone, which holds 0.1 % of the loss in its model"
)
COLLAPSED_BELOW = 1.5  # effective number of timesteps
HARDLY = 0.01  # change of a weight that nobody sees
# by mode, what would move weights further
REMEDIES = {
    "learnable": "a higher --weight_lr or more images",
    "minimax": "a larger --weight_step or a smaller --weight_pull",
    "uncertainty": "a larger --weight_step",
    "balanced": "no flag, since the gradients are of about the same length",
}


def weight_movement(run: Run, end: np.ndarray) -> dict:
    """How far the weights of a run moved, by its record, as JSON has it: `largest_change` of a weight and
    `steps` that moved them over the run or, where each image has its own, over an image, of which the others
    are means; `effective` timesteps at the end.

    Args:
        end: `(N,)`, the weights after the last step, means over the images where each has its own.
    """
    mode, weights = run.configuration["weight_mode"], run.summary.weights  # (images, K, N)
    if mode in ("learnable", "learnable_detached"):  # one network's, over all images
        weights = np.concatenate([weights.reshape(-1, len(end)), end[None].astype(weights.dtype)])[None]
    start, last = (weights[:, k].astype(np.float64) for k in (0, -1))
    effective = float(np.exp(scipy.stats.entropy(end)))  # N where weights are equal, 1 where one has all
    return {
        "mode": mode,
        "start": start.mean(0).tolist(),
        "end": end.tolist(),
        "largest_change": float(np.abs(last - start).max(1).mean()),
        # images of one batch have the same weights of one network
        "steps": max(len(np.unique(path, axis=0)) for path in weights) - 1,
        "effective": effective,
        "collapsed": effective < COLLAPSED_BELOW,
    }


def towards(movement: dict) -> int | None:
    """The timestep whose weight rose most; None where none moved."""
    rise = np.subtract(movement["end"], movement["start"])
    return int(rise.argmax()) if movement["largest_change"] > 0 else None


def lines_about_weights(movement: dict, run: Run) -> list[str]:
    """How far the weights moved and what that means; nothing of modes whose weights are given."""
    mode, steps, timestep = movement["mode"], movement["steps"], towards(movement)
    if mode == "learnable_detached":
        return [
            "mode learnable_detached: the weight is detached in the loss, so no gradient reaches the weight "
            "network and unchanged weights are expected; it equals --weight_schedule increasing"
        ]
    if mode not in REMEDIES:
        return []
    each, (start, end) = " of an image" * (mode != "learnable"), numbers(movement, ", ")
    line = (
        f"mode {mode}: in {steps} step{'s' * (steps != 1)} the weights{each} moved from {start} to {end}, by "
        f"{movement['largest_change']:.2g} at most"
    )
    if timestep is not None:
        line += f", most towards timestep {timestep} (t = {run.timesteps[timestep]})"
    if movement["collapsed"]:
        return [
            f"{line}; they have collapsed: the loss is linear in them, and least with all weight on the "
            f"smallest L_i; use --weight_mode fixed"
        ]
    if movement["largest_change"] < HARDLY:
        line += f"; what would move them further: {REMEDIES[mode]}"
    return [line, *lines_about_equal_losses(run)]


def lines_about_equal_losses(run: Run) -> list[str]:
    """Whether the timesteps' shares of the loss differ by no more than chance, by Friedman's test over
    images, in one line if so: then weights have nothing to follow.
    """
    shares = run.summary.structure.timestep_shares  # (images, N), NaN where nothing changed
    shares = shares[np.isfinite(shares).all(1)]
    p = scipy.stats.friedmanchisquare(*shares.T).pvalue if len(shares) >= 2 and shares.shape[1] >= 3 else 0.0
    means = ", ".join(f"{100 * share:.1f}" for share in shares.mean(0)) if p >= 0.05 else ""
    stronger = "" if run.configuration["structure_share"] else "; --structure_share 1 makes structure count"
    line = (
        f"the timesteps' losses are equal but for noise, as far as {len(shares)} images tell (shares {means} "
        f"%, Friedman's p {p:.2g}), so that weights may have nothing to follow but rounding{stronger}"
    )
    return [line] if p >= 0.05 else []


def numbers(movement: dict, between: str) -> tuple[str, str]:
    """The weights at the start and at the end."""
    return tuple(between.join(f"{w:.3f}" for w in movement[which]) for which in ("start", "end"))


def add_weights(report: Report, runs: Mapping[str, Run], movements: Sequence[dict]) -> None:
    """Adds what there is to say of timesteps and their weights, with the shares of the first mode's run."""
    first = next(iter(runs.values()))
    structure = first.summary.structure
    # of the self-attention loss before weights, by image: (images, N) or (images, layers), rows of sum 1
    shares = {
        "timesteps, all layers": structure.timestep_shares,
        "timesteps, first layer": structure.first_layer_shares,
        "layers": structure.layer_shares,
    }
    means = {name: mean_and_deviation(values) for name, values in shares.items()}
    *by_timestep, by_layer = means
    heads = ["", *(f"i = {i}" for i in range(len(first.timesteps)))]
    timestep_rows = [[name, *percentages(*means[name], ".0f")] for name in by_timestep]
    layer_rows = map(list, zip(first.layers, percentages(*means[by_layer], ".2g")))
    report.sections[1:1] = [
        ("Weights", weight_rows(list(runs), movements)),
        ("Shares of the self-attention loss by timestep, %", [heads, *timestep_rows]),
        ("Shares of the self-attention loss by layer, %", [["layer", "share"], *layer_rows]),
    ]
    report.remarks.extend(x for run, w in zip(runs.values(), movements) for x in lines_about_weights(w, run))
    report.remarks.append(STUDY_REMARK)
    of_shares = {
        name: {"mean": mean, "standard_deviation": deviation, "by_image": shares[name]}
        for name, (mean, deviation) in means.items()
    }
    report.results.update(weights=dict(zip(runs, movements)), layers=first.layers, shares=of_shares)


def weight_rows(names: Sequence[str], movements: Sequence[dict]) -> list[list[str]]:
    lines = []
    for name, moved in zip(names, movements):
        start, end = numbers(moved, " ")
        timestep = None if towards(moved) is None else f"i = {towards(moved)}"
        line = {"mode": name, "start": start, "end": end, "largest change": f"{moved['largest_change']:.3f}"}
        line |= {"towards": timestep, "effective timesteps": f"{moved['effective']:.2f}"}
        lines.append(line | {"": "collapsed" * moved["collapsed"]})
    return figure_rows(lines)


def percentages(means: np.ndarray, deviations: np.ndarray, form: str) -> list[str]:
    return [f"{100 * mean:{form}} +- {100 * deviation:{form}}" for mean, deviation in zip(means, deviations)]
