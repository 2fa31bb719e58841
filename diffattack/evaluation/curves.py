"""What one run says at several of its iterations: transfer over visibility, from `--judge_at`.

Each image's row has what the judges said of its picture at these iterations, and how visible it was; here
that becomes one evaluation an iteration, so that an iteration is judged like the end of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffattack.classifiers.heads import SOFTMAX, Head, head_named
from diffattack.data.images import Pictures
from diffattack.evaluation.evaluate import Evaluation, plain
from diffattack.evaluation.predictions import ClassifierResult, Prediction, Predictions, evaluate_classifier
from diffattack.evaluation.quality import Quality, visibility
from diffattack.evaluation.stats import Estimate, mean_over_images

SIDES = ("before", "after")
MEASURES = ("PSNR dB", "SSIM", "L2", "where smooth (levels)")  # that a curve is told over


def judged(
    pictures_at: Mapping[int, np.ndarray],
    clean: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    judges: Mapping[str, torch.nn.Module],
    device: torch.device,
    head: Head = SOFTMAX,
) -> list[dict]:
    """What is said of one image at several iterations, for its row.

    Args:
        pictures_at: by iteration, uint8 `(H, W, 3)`, as `clean`.
        labels, targets: `(1, L)` and `(1,)`.
    """
    rows = []
    for iteration, picture in sorted(pictures_at.items()):
        pictures = Pictures(clean[None], picture[None], labels, targets=targets)
        answers = [
            evaluate_classifier(name, judge, pictures, device, head=head) for name, judge in judges.items()
        ]
        rows.append(
            {
                "iteration": iteration,
                "predictions": {
                    answer.name: {side: vars(getattr(answer, side)[0]) for side in SIDES}
                    for answer in answers
                },
                "quality": {
                    name: float(values[0]) if np.isfinite(values[0]) else None
                    for name, values in visibility(clean[None], picture[None]).items()
                },
            }
        )
    return rows


@dataclass(frozen=True)
class CurvePoint:
    """All images of a run at one iteration."""

    iteration: int
    evaluation: Evaluation

    @property
    def figures(self) -> dict[str, Estimate]:
        """Success rates and visibility, by name."""
        evaluation = self.evaluation
        return {
            f"white-box, {evaluation.classifiers[0].name}": evaluation.classifiers[0].success,
            **({"transfer, mean": evaluation.transfer_success} if evaluation.transfers else {}),
            **{name: evaluation.quality[name].adversarial for name in MEASURES},
        }


def curve_points(rows: Sequence[dict], configuration: dict) -> list[CurvePoint]:
    """A run at each of its `--judge_at`, and at its end, from the rows of its records; none where it has
    none.
    """
    if not configuration["judge_at"]:
        return []
    points, base = [], configuration["label_base"]
    head = head_named(configuration.get("head"), configuration.get("threshold"))
    labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in rows]
    longest = max(map(len, labels))
    labels = np.array([[label - base for label in one] + [-1] * (longest - len(one)) for one in labels])
    targets = np.array([row["target"] - base if "target" in row else -1 for row in rows])
    for at_iteration in zip(*(row.get("curve", ()) for row in rows)):
        results = [
            ClassifierResult(
                name,
                labels,
                *(
                    Predictions(Prediction(**one["predictions"][name][side]) for one in at_iteration)
                    for side in SIDES
                ),
                None,
                targets,
                None,
                head,
            )
            # a run that went on with other judges has the curve of those that judged all of its images
            for name in at_iteration[0]["predictions"]
            if all(name in one["predictions"] for one in at_iteration)
        ]
        quality = {}
        for name in at_iteration[0]["quality"]:
            values = np.array([one["quality"][name] for one in at_iteration], np.float64)
            quality[name] = Quality(mean_over_images(values[np.isfinite(values)]), None, values)
        evaluation = Evaluation(results, quality, [], len(configuration["model_name"]))
        points.append(CurvePoint(at_iteration[0]["iteration"], evaluation))
    return points


def point_rows(points: Sequence[CurvePoint], counted: str = "iteration") -> list[list[str]]:
    """A table with a row a point; `counted` is what numbers them."""
    names = list(points[0].figures)
    return [[counted, *names]] + [
        [str(point.iteration), *(str(point.figures[name]) for name in names)] for point in points
    ]


def curve_dicts(points: Sequence[CurvePoint], counted: str = "iteration") -> list[dict]:
    """For JSON; `counted` is what numbers the points."""
    return [
        {counted: point.iteration} | {name: plain(figure) for name, figure in point.figures.items()}
        for point in points
    ]
