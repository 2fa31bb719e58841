"""The curve of an attack over visibility from one picture of each image: parts of its change, judged.

Attacks that were run within one budget can so be compared at equal visibility below it. A part of a change is
not what the attack would have found within a smaller budget, but it is the same for every attack; where that
matters, run the attacks at several budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from diffattack.classifiers.registry import load_classifier
from diffattack.data.images import Pictures
from diffattack.evaluation.curves import CurvePoint
from diffattack.evaluation.evaluate import Evaluation
from diffattack.evaluation.predictions import Predictions, predict
from diffattack.evaluation.quality import Quality, visibility
from diffattack.evaluation.stats import mean_over_images

PARTS = (0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the change; in percent they number the points


def scaled(clean: np.ndarray, adversarial: np.ndarray, part: float) -> np.ndarray:
    """8-bit pictures `(B, H, W, 3)` with a part of their change."""
    change = adversarial.astype(np.float32) - clean
    return np.clip(np.round(clean + part * change), 0, 255).astype(np.uint8)


def scaled_points(
    chunks: Iterable[Pictures],
    evaluation: Evaluation,
    surrogates: Mapping[str, torch.nn.Module],
    device: torch.device,
    class_names: Sequence[str],
) -> list[CurvePoint]:
    """Each of the PARTS as if a run had ended with it, judged by the classifiers of `evaluation` that stand
    behind no defence; `evaluation` itself is the last.

    Args:
        chunks: the pictures of the run, some at a time, in the order of the evaluation.
    """
    undefended = [
        result for k, result in enumerate(evaluation.classifiers) if evaluation.role(k) != "defended"
    ]
    answers = {(part, result.name): [] for part in PARTS[:-1] for result in undefended}
    visible: dict[float, list[dict[str, np.ndarray]]] = {part: [] for part in PARTS[:-1]}
    classifiers = dict(surrogates)
    for pictures in chunks:
        for part in PARTS[:-1]:
            version = scaled(pictures.clean, pictures.adversarial, part)
            visible[part].append(visibility(pictures.clean, version))
            for result in undefended:
                if result.name not in classifiers:
                    side = pictures.clean.shape[1]
                    loaded = load_classifier(result.name, class_names, side, head=result.head)
                    classifiers[result.name] = loaded.to(device)
                classifier, labels, targets = classifiers[result.name], pictures.labels, pictures.targets
                answers[part, result.name] += predict(
                    classifier, version, labels, device, head=result.head, targets=targets
                )
    points = []
    for part in PARTS[:-1]:
        quality = {}
        for name in visible[part][0]:
            values = np.concatenate([found[name] for found in visible[part]])
            quality[name] = Quality(mean_over_images(values[np.isfinite(values)]), None, values)
        results = [
            replace(result, after=Predictions(answers[part, result.name]), reconstructed=None)
            for result in undefended
        ]
        points.append(CurvePoint(round(100 * part), Evaluation(results, quality, [], evaluation.surrogates)))
    whole = Evaluation(undefended, evaluation.quality, [], evaluation.surrogates)
    return [*points, CurvePoint(100, whole)]
