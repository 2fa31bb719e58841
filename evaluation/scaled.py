"""The curve of an attack over visibility from one picture of each image: parts of its change, judged.

Attacks that were run within one budget can so be compared at equal visibility below it. A part of a change is
not what the attack would have found within a smaller budget, but it is the same for every attack; where that
matters, run the attacks at several budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from classifiers.registry import load_classifier
from data.images import Pictures
from evaluation.curves import CurvePoint
from evaluation.evaluate import Evaluation
from evaluation.predictions import ClassifierResult, evaluate_classifier
from evaluation.quality import Quality, visibility
from evaluation.stats import mean_over_images

PARTS = (0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the change; in percent they number the points


def scaled(clean: np.ndarray, adversarial: np.ndarray, part: float) -> np.ndarray:
    """8-bit pictures `(B, H, W, 3)` with a part of their change."""
    change = adversarial.astype(np.float32) - clean
    return np.clip(np.round(clean + part * change), 0, 255).astype(np.uint8)


def scaled_points(
    pictures: Pictures,
    evaluation: Evaluation,
    surrogates: Mapping[str, torch.nn.Module],
    device: torch.device,
    class_names: Sequence[str],
) -> list[CurvePoint]:
    """Each of the PARTS as if a run had ended with it, judged by the classifiers of `evaluation` that stand
    behind no defence; `evaluation` itself is the last.
    """
    parts = PARTS[:-1]
    versions = [scaled(pictures.clean, pictures.adversarial, part) for part in parts]
    answers: list[list[ClassifierResult]] = [[] for _ in parts]
    undefended = [
        result for k, result in enumerate(evaluation.classifiers) if evaluation.role(k) != "defended"
    ]
    for result in undefended:
        classifier = surrogates.get(result.name)
        if classifier is None:
            classifier = load_classifier(result.name, class_names, pictures.clean.shape[1]).to(device)
        for found, version in zip(answers, versions):
            version_of = Pictures(pictures.clean, version, pictures.labels, None, pictures.targets)
            found.append(evaluate_classifier(result.name, classifier, version_of, device, result))
    points = []
    for part, results, version in zip(parts, answers, versions):
        quality = {}
        for name, values in visibility(pictures.clean, version).items():
            finite = values[np.isfinite(values)]
            quality[name] = Quality(mean_over_images(finite), None, values)
        points.append(CurvePoint(round(100 * part), Evaluation(results, quality, [], evaluation.surrogates)))
    whole = Evaluation(undefended, evaluation.quality, [], evaluation.surrogates)
    return [*points, CurvePoint(100, whole)]
