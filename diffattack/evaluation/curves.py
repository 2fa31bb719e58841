"""Curves of success and transfer over visibility, and what two attacks differ by at equal visibility.

A curve's points are pictures of one attack: after several of its iterations (`--judge_at`), with parts of
their change, or at several values of a flag (`--sweep`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffattack.classifiers.heads import head_named
from diffattack.data.dataset import Item, labels_and_targets, labels_of
from diffattack.data.images import Pictures
from diffattack.data.records import Run
from diffattack.evaluation.judges import Judges, batch_on
from diffattack.evaluation.metrics import Quality, visibility
from diffattack.evaluation.predictions import PREDICTION, ClassifierResult, predict
from diffattack.evaluation.results import Evaluation, plain
from diffattack.evaluation.statistics import Difference, Estimate, holm, mean_difference, mean_over_images

MEASURES = ("PSNR dB", "SSIM", "L2", "where smooth (levels)")  # that a curve is told over
# at which attacks are compared, with the sign that makes more visible larger
VISIBILITIES = {"L2": 1.0, "SSIM": -1.0}
PARTS = (0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the change; in percent they number the points


@dataclass(frozen=True)
class CurvePoint:
    """All images of a run at one iteration, or with one part of their change."""

    number: int
    evaluation: Evaluation

    @property
    def figures(self) -> dict[str, Estimate]:
        """Success rates and visibility, by name."""
        return success_rates(self.evaluation) | {
            name: self.evaluation.quality[name].adversarial for name in MEASURES
        }


def success_rates(evaluation: Evaluation) -> dict[str, Estimate]:
    """Of the first surrogate, and the mean over transfer classifiers, where there are any."""
    found = {f"white-box, {evaluation.classifiers[0].name}": evaluation.classifiers[0].success}
    return found | ({"transfer, mean": evaluation.transfer_success} if evaluation.transfers else {})


def point_rows(points: Sequence[CurvePoint], counted: str = "iteration") -> list[list[str]]:
    """A table with a row a point; `counted` is what numbers them."""
    names = list(points[0].figures)
    return [[counted, *names]] + [
        [str(point.number), *(str(point.figures[name]) for name in names)] for point in points
    ]


def curve_dicts(points: Sequence[CurvePoint], counted: str = "iteration") -> list[dict]:
    """For JSON; `counted` is what numbers the points."""
    return [
        {counted: point.number} | {name: plain(figure) for name, figure in point.figures.items()}
        for point in points
    ]


def quality_by_image(by_image: Mapping[str, np.ndarray]) -> dict[str, Quality]:
    """Means of measures `(B,)`."""
    return {
        name: Quality(mean_over_images(values[np.isfinite(values)]), None, values)
        for name, values in by_image.items()
    }


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
    MEASURES).

    Args:
        pictures_at: by iteration, uint8 `(H, W, 3)`, as `clean`.
        labels, targets: `(1, L)` and `(1,)`.
    """
    steps = sorted(pictures_at)
    found = np.zeros((len(steps), len(judges.names), 2), PREDICTION)
    pictures = np.stack([clean, *(pictures_at[step] for step in steps)])
    batch = batch_on(judges.device)
    for k, name in enumerate(judges.names):
        every, goals = np.repeat(labels, len(pictures), 0), np.repeat(targets, len(pictures))
        predicted, _ = predict(judges[name], pictures, every, judges.device, batch, judges.head, goals)
        found[:, k, 0], found[:, k, 1] = predicted[0], predicted[1:]
    visible = [visibility(clean[None], pictures_at[step][None]) for step in steps]
    return {
        "curve_iterations": np.array(steps),
        "curve_predictions": found,
        "curve_visibility": np.array([[float(one[name][0]) for name in MEASURES] for one in visible]),
    }


def curve_points(run: Run) -> list[CurvePoint]:
    """A run at each of its `--judge_at`, and at its end; none where it has none."""
    configuration, summary = run.configuration, run.summary
    if not configuration["judge_at"]:
        return []
    points, head = [], head_named(configuration.get("head"), configuration.get("threshold"))
    named = (labels_of(configuration, index) for index in summary.indices)
    labels, targets = labels_and_targets([Item(0, run.folder, *each) for each in named])
    for p, iteration in enumerate(summary.curve_iterations[0].tolist()):
        sides = summary.curve_predictions[:, p]  # (images, C, 2)
        results = [
            ClassifierResult(name, labels, sides[:, k, 0], sides[:, k, 1], None, targets, head)
            for k, name in enumerate(configuration["curve_judges"])
        ]
        quality = quality_by_image(dict(zip(MEASURES, summary.curve_visibility[:, p].T)))
        evaluation = Evaluation(results, quality, [], len(configuration["model_name"]))
        points.append(CurvePoint(iteration, evaluation))
    return points


# ---------------------------------------------------------------- over parts of the change


def scaled(clean: np.ndarray, adversarial: np.ndarray, part: float) -> np.ndarray:
    """8-bit pictures `(B, H, W, 3)` with a part of their change."""
    change = adversarial.astype(np.float32) - clean
    return np.clip(np.round(clean + part * change), 0, 255).astype(np.uint8)


def scaled_points(chunks: Iterable[Pictures], evaluation: Evaluation, judges: Judges) -> list[CurvePoint]:
    """Each of the PARTS as if a run had ended with it, judged by the classifiers of `evaluation` that stand
    behind no defence; `evaluation` itself is the last.

    Attacks that were run within one budget can so be compared at equal visibility below it. A part of a
    change is not what the attack would have found within a smaller budget, but it is the same for all.

    Args:
        chunks: the pictures of the run, some at a time, in the order of the evaluation.
    """
    chosen = [r for k, r in enumerate(evaluation.classifiers) if evaluation.role(k) != "defended"]
    predicted = {(part, result.name): [] for part in PARTS[:-1] for result in chosen}
    visible: dict[float, list[dict[str, np.ndarray]]] = {part: [] for part in PARTS[:-1]}
    for pictures in chunks:
        about = (pictures.labels, judges.device, 16, judges.head, pictures.targets)
        for part in PARTS[:-1]:
            version = scaled(pictures.clean, pictures.adversarial, part)
            visible[part].append(visibility(pictures.clean, version))
            for result in chosen:
                predicted[part, result.name].append(predict(judges[result.name], version, *about)[0])
    points = []
    for part, found in visible.items():
        quality = quality_by_image({n: np.concatenate([one[n] for one in found]) for n in found[0]})
        after = {result.name: np.concatenate(predicted[part, result.name]) for result in chosen}
        results = [replace(r, after=after[r.name], reconstructed=None, logits=None) for r in chosen]
        points.append(CurvePoint(round(100 * part), Evaluation(results, quality, [], evaluation.surrogates)))
    whole = Evaluation(chosen, evaluation.quality, [], evaluation.surrogates)
    return [*points, CurvePoint(100, whole)]


# ---------------------------------------------------------------- at equal visibility


@dataclass(frozen=True)
class Curve:
    """An attack at all its points, in their order, by image."""

    visibility: dict[str, np.ndarray]  # of VISIBILITIES, (values, B)
    scores: dict[str, np.ndarray]  # (values, B); NaN for an image on which it says nothing


def transfer_scores(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """How far each image fools the transfer classifiers that had it right before, `(B,)`: the share of them
    that is fooled, and the mean probability that they leave to its true class.
    """
    results = evaluation.transfers
    counted = np.stack([result.correct_before for result in results])
    fooled = np.stack([result.fooled for result in results])
    left = np.stack([result.after["true_confidence"] for result in results])
    with np.errstate(invalid="ignore"):
        return {
            "transfer success": (fooled & counted).sum(0) / counted.sum(0),
            "confidence left in the true class": np.where(counted, left, 0).sum(0) / counted.sum(0),
        }


def curve_of(evaluations: Sequence[Evaluation]) -> Curve:
    """Of an attack's evaluations at its points."""
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
        for measure, score in itertools.product(VISIBILITIES, a.scores):
            differences = difference_at_equal_visibility(
                (a.visibility[measure], b.visibility[measure]), (a.scores[score], b.scores[score])
            )
            known = differences[np.isfinite(differences)]
            pairs.append(PairDifference((first, second), measure, score, mean_difference(known), len(known)))
    for pair, corrected in zip(pairs, holm([pair.difference.p for pair in pairs])):
        pair.difference.corrected = corrected
    return pairs


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
