"""Curves of success and transfer over visibility, and what two attacks differ by at equal visibility.

A curve's points are evaluations of one attack: after several of its iterations (`--judge_at`), with parts of
their change, or at several values of a flag (`--sweep`). An attack that changes the picture less also fools
less, so that two of them at one setting say little of which is better: each gives a curve for each image, and
the curves of two are compared where both reach.
"""

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from diffattack.classifiers.heads import head_named
from diffattack.data.dataset import Item, labels_and_targets, labels_of
from diffattack.data.records import Run
from diffattack.evaluation.judges import ALWAYS, Judged, Judges, batch_on, names_of, visibilities
from diffattack.evaluation.metrics import means_of
from diffattack.evaluation.predictions import ClassifierResult, predict
from diffattack.evaluation.results import Evaluation, counts_of, transfer_mean
from diffattack.evaluation.seeing import MODELS_OF_SEEING
from diffattack.evaluation.statistics import (
    Estimate,
    correct,
    difference_at_equal_visibility,
    mean_over_images,
    paired,
)
from diffattack.evaluation.tables import COUNTED, Report, figure_rows, legend

MEASURES = (*ALWAYS, *(name for name, *_ in MODELS_OF_SEEING.values()))  # that a curve is told over
# at which attacks are compared, with the sign that makes more visible larger
VISIBILITIES = {"L2": 1.0, "SSIM": -1.0, "FLIP": 1.0, "SSIMULACRA2": -1.0, "Butteraugli": 1.0}
PARTS = (0.15, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the change; they number the points, in percent
# flags at which, when they are 0, all modes are the same attack
WITHOUT_STRUCTURE = ("self_attn_loss_weight", "structure_share")

Points = Mapping[int, Evaluation]  # of all images of a run, by iteration or by the part of their change


def figures_of(evaluation: Evaluation, measures: Iterable[str] = MEASURES) -> dict[str, Estimate]:
    """Success of the first surrogate, the mean over transfer classifiers, where there are any, and visibility
    by these measures.
    """
    first = evaluation.classifiers[0]
    return {
        f"white-box, {first.title}": first.success,
        **{f"transfer, {g}": transfer_mean(each) for g, each in evaluation.transfer_groups.items()},
        **{name: evaluation.quality[name].adversarial for name in measures if name in evaluation.quality},
    }


def curve_dicts(points: Points, counted: str = "iteration") -> list[dict]:
    """For JSON and `figure_rows`; `counted` is what numbers the points."""
    return [{counted: number} | figures_of(evaluation) for number, evaluation in points.items()]


# ---------------------------------------------------------------- over iterations


def curve_of_image(
    pictures_at: Mapping[int, np.ndarray],
    clean: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    judges: Judges,
) -> dict[str, np.ndarray]:
    """What is found of one image at P iterations, for its record: `curve_iterations` (P,),
    `curve_predictions` (P, C, 2) before and after the attack by C classifiers, and `curve_visibility` (P,
    M) by `curve_measures` (M,).

    Args:
        pictures_at: by iteration, uint8 `(H, W, 3)`, as `clean`.
        labels, targets: `(1, L)` and `(1,)`.
    """
    steps = sorted(pictures_at)
    pictures = np.stack([clean, *(pictures_at[step] for step in steps)])
    every, goals = np.repeat(labels, len(pictures), 0), np.repeat(targets, len(pictures))
    about = (pictures, every, judges.device, batch_on(judges.device), judges.head, goals)
    found = np.stack([predict(judges.classifier(name), *about) for name in judges.names], 1)  # (1 + P, C)
    return {
        "curve_iterations": np.array(steps),
        "curve_predictions": np.stack([np.broadcast_to(found[0], found[1:].shape), found[1:]], 2),
        "curve_measures": np.array(names_of(judges)),
        "curve_visibility": visibilities(clean, pictures[1:], judges),
    }


def curve_points(run: Run) -> dict[int, Evaluation]:
    """A run at each of its `--judge_at`, and at its end; none where it has none."""
    configuration, summary = run.configuration, run.summary
    if not configuration.get("judge_at"):
        return {}
    head = head_named(configuration.get("head"), configuration.get("threshold"))
    named = (labels_of(configuration, index) for index in summary.indices)
    labels, targets = labels_and_targets([Item(0, run.folder, *each) for each in named])
    results = [ClassifierResult(n, labels, None, targets, head) for n in configuration["curve_judges"]]
    surrogates, groups = len(configuration["model_name"]), configuration["curve_groups"]
    return {
        iteration: point(results, predictions, names, visible, surrogates, groups)
        for iteration, names, predictions, visible in zip(
            summary.curve_iterations[0].tolist(),
            itertools.repeat(summary.curve_measures[0].tolist()),
            np.moveaxis(summary.curve_predictions, 1, 0),  # of (images, C, 2)
            np.moveaxis(summary.curve_visibility, 1, 0),
        )
    }


def point(
    results: Sequence[ClassifierResult],
    predictions: np.ndarray,
    names: Sequence[str],
    visible: np.ndarray,
    surrogates: int,
    groups: Mapping[str, Sequence[str]],
) -> Evaluation:
    """One of a curve: of the images and classifiers of `results`, by other predictions `(images, C, 2)`, and
    visibilities `(images, M)` by the measures of these names.
    """
    each = zip(results, np.moveaxis(predictions, 1, 0))
    results = [replace(one, predictions=sides[:, None]) for one, sides in each]
    return Evaluation(results, means_of([dict(zip(names, visible.T))]), [], surrogates, groups)


# ---------------------------------------------------------------- over parts of the change


def scaled_points(judged: Judged, evaluation: Evaluation, judges: Judges) -> dict[int, Evaluation]:
    """Each of the PARTS as if a run had ended with it, judged by the classifiers of `evaluation` that stand
    behind no defence; `evaluation` itself is the last.

    Attacks that were run within one budget can so be compared at equal visibility below it. A part of a
    change is not what the attack would have found within a smaller budget, but it is the same for all.

    Args:
        judged: of the images of the evaluation, by judges of PARTS.
    """
    chosen = [k for k in range(len(judges.names)) if evaluation.role(k) != "defended"]
    results, before = [evaluation.classifiers[k] for k in chosen], judged.predictions[:, chosen, 0, 0]
    points = {}
    for p, part in enumerate(PARTS):
        sides = np.stack([before, judged.predictions_of_parts[:, chosen, p]], 2)  # (images, C, 2)
        shown = names_of(judges), judged.visibility_of_parts[:, p]
        points[round(100 * part)] = point(results, sides, *shown, evaluation.surrogates, evaluation.groups)
    return points | {100: replace(evaluation, classifiers=results, warnings=[])}


# ---------------------------------------------------------------- at equal visibility


def curve_of(evaluations: Iterable[Evaluation]) -> dict[str, np.ndarray]:
    """Of an attack's evaluations at its points, in their order, VISIBILITIES and scores by image: `(points,
    B)`.
    """
    each = [
        {
            name: sign * evaluation.quality[name].by_image
            for name, sign in VISIBILITIES.items()
            if name in evaluation.quality
        }
        | transfer_scores(evaluation)
        for evaluation in evaluations
    ]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def transfer_scores(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """How far each image fools the transfer classifiers that had it right before, `(B,)`: the share of them
    that is fooled, and the mean probability that they leave to its true class; NaN without any.
    """
    counted, _ = counts_of(evaluation.transfers)
    left = np.stack([one.predictions["true_confidence"][:, 0, 1] for one in evaluation.transfers])
    found = {}
    with np.errstate(invalid="ignore"):
        for group, results in evaluation.transfer_groups.items():
            of_group, fooled = counts_of(results)
            name = "transfer success" if group == "mean" else f"transfer success, {group}"
            found[name] = fooled.sum(0) / of_group.sum(0)
        found["confidence left in the true class"] = np.where(counted, left, 0).sum(0) / counted.sum(0)
    return found


def compare_curves(curves: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict]:
    """Every pair of modes by every score at every measure of visibility, as JSON has it; p is corrected by
    Holm over all. `images` says something of so many.
    """
    pairs, tested = [], []
    known = next(iter(curves.values()))
    scores = [name for name in known if name not in VISIBILITIES]
    measures = [name for name in VISIBILITIES if name in known]
    for modes, measure, score in itertools.product(itertools.combinations(curves, 2), measures, scores):
        both = ([curves[mode][name] for mode in modes] for name in (measure, score))
        differences = difference_at_equal_visibility(*both)
        tested.append(paired(np.zeros(len(differences)), differences))
        images = int(np.isfinite(differences).sum())
        pairs.append({"modes": list(modes), "visibility": measure, "score": score, "images": images})
    correct(tested)
    return [pair | vars(difference) for pair, difference in zip(pairs, tested)]


def pair_rows(pairs: Sequence[dict]) -> list[list[str]]:
    return figure_rows(
        [
            {
                "modes": " - ".join(pair["modes"][::-1]),
                "of": pair["score"],
                "at equal": pair["visibility"],
                "difference": pair["difference"].with_interval("+.3f") if pair["images"] else None,
                "p": f"{pair['p']:.2g}",
                "corrected": f"{pair['p_holm']:.2g}",
                "images": pair["images"],
            }
            for pair in pairs
        ]
    )


# ---------------------------------------------------------------- every mode at several values of a flag


@dataclass(frozen=True)
class Sweep:
    """A flag of the attack and the values it takes."""

    flag: str
    values: tuple[float, ...]
    measure: str = ""  # of a budget, such as "psnr="

    def __str__(self) -> str:
        return f"{self.flag}={self.measure}{','.join(f'{value:g}' for value in self.values)}"

    def folder(self, value: float) -> str:
        return f"{self.flag}_{self.measure}{value:g}".replace("=", "_")

    def option(self, value: float) -> float | str:
        """The flag's value."""
        return f"{self.measure}{value:g}" if self.measure else value

    def modes_are_one(self, value: float) -> bool:
        """Whether the structure term is left out, so that there is nothing to weight."""
        return self.flag in WITHOUT_STRUCTURE and value == 0


def parse_sweep(kind: type, text: str) -> Sweep:
    """From "structure_share=0,0.1,0.3", a flag of the dataclass `kind` that takes a number, or from
    "budget=psnr=40,36.5,33", budgets of one measure; the dataclass checks what values the flag takes.
    """
    name, _, numbers = text.partition("=")
    measure = numbers[: numbers.find("=") + 1] if name == "budget" else ""
    parse = {one.name: one.metadata["parse"] for one in fields(kind)}.get(name)
    if not measure and parse not in (int, float):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no flag of the attack that takes a number; expected FLAG=A,B,... such as "
            f"structure_share=0,0.1,0.3 or budget=psnr=40,36.5,33"
        )
    try:
        values = tuple(map(int if parse is int else float, numbers.removeprefix(measure).split(",")))
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
    figures = {mode: [] for mode in points}
    for mode, (run, evaluation) in ((mode, point) for mode, each in points.items() for point in each):
        fooled = {
            "first fooled in iteration": mean_over_images(run.summary.first_fooled),
            "L2 then": mean_over_images(run.summary.distance_then),
        }
        figures[mode].append(figures_of(evaluation, VISIBILITIES) | fooled)
    lines = [
        {"mode": mode, sweep.flag: f"{value:g}"} | at_value
        for mode, at_values in figures.items()
        for value, at_value in zip(sweep.values, at_values)
    ]
    sections, pairs = [(f"Every mode at every {sweep.flag}", figure_rows(lines))], []
    if first_evaluation.transfers:
        curves = {mode: curve_of(evaluation for _, evaluation in each) for mode, each in points.items()}
        pairs = compare_curves(curves)
        sections.append(("At equal visibility", pair_rows(pairs)))
    one_attack = f"at {sweep.flag} 0 there is nothing to weight: one attack stands for all modes"
    remarks = [
        f"{len(first_run.records)} images; white-box and transfer are attack success {COUNTED}; in brackets "
        f"95 % intervals, Wilson's for success and bootstrap over images for the rest; iterations and L2 "
        f"when first fooled are of images that are fooled at all",
        *legend(name for name in VISIBILITIES if name in first_evaluation.quality),
        "at equal visibility: each image's curves, points joined by straight lines, are compared over the "
        "visibilities that both modes reach, and their difference is averaged; p is of a permutation of "
        f"signs, corrected by Holm over the {len(pairs)} differences",
        *([one_attack] if any(map(sweep.modes_are_one, sweep.values)) else []),
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
