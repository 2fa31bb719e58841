"""Everything that is found of a run: who is fooled, how visible the change is, and how sure that is.

evaluation = evaluate(pictures, {"efficientnet_lite0": classifier}, ["efficientnet_lite1"], device)
evaluation.classifiers[1].success, evaluation.quality["PSNR dB"].adversarial
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.registry import load_classifier
from diffattack.data.images import Pictures, to_tensor
from diffattack.evaluation.distances import feature_network, quality_of
from diffattack.evaluation.judges import Judged, Judges, judge
from diffattack.evaluation.metrics import Quality
from diffattack.evaluation.predictions import (
    DRAWS_LEGEND,
    OF_RECONSTRUCTION,
    RULES,
    ClassifierResult,
    OverDraws,
    positives,
)
from diffattack.evaluation.statistics import Estimate, resampled, share
from diffattack.evaluation.tables import COUNTED, legend, legend_of_head, table
from diffattack.evaluation.warnings import (
    warnings_about_gradients,
    warnings_about_labels,
    warnings_about_transfer,
)


def joint(results: Sequence[ClassifierResult]) -> tuple[np.ndarray, np.ndarray]:
    """Which images all classifiers had right before, and which of these fool all of them at once; `(B,)`
    each.
    """
    return np.all([r.correct_before for r in results], axis=0), np.all([r.fooled for r in results], axis=0)


def transfer_mean(results: Sequence[ClassifierResult], figure: str = "success") -> Estimate:
    """Mean over classifiers of the attack success rate, or of another of FIGURES; images are resampled for
    all classifiers at once.
    """
    counted, found = map(np.stack, zip(*(r.counts(figure) for r in results)))  # (classifiers, B)

    def statistic(times: np.ndarray) -> np.ndarray:
        # 0 where a resample leaves out all images that a classifier had right; it is then left out
        totals = times @ counted.T.astype(np.float64)  # (R, classifiers)
        rates = times @ found.T.astype(np.float64) / np.maximum(totals, 1)
        return (rates.sum(-1) / np.maximum((totals > 0).sum(-1), 1))[:, None]

    if not counted.any():
        return Estimate(math.nan, math.nan, math.nan, is_share=True)
    return replace(resampled(counted.shape[1], statistic)[0], is_share=True)


@dataclass(frozen=True)
class Evaluation:
    """The results of the surrogates first, then those of transfer classifiers and of all behind defences."""

    classifiers: list[ClassifierResult]
    quality: dict[str, Quality]
    warnings: list[str]
    surrogates: int = 1
    # of random defences that judge by each of several draws, by classifier
    draws: Mapping[str, OverDraws] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    @property
    def transfers(self) -> list[ClassifierResult]:
        """Those that are no surrogate and undefended."""
        return [result for result in self.classifiers[self.surrogates :] if not result.is_defended]

    @property
    def with_reconstructions(self) -> bool:
        return self.classifiers[0].reconstructed is not None

    @property
    def joint_success(self) -> Estimate | None:
        """Of several surrogates: images that fool all of them at once, among those that all of them had right
        before.
        """
        if self.surrogates == 1:
            return None
        counted, fooled = joint(self.classifiers[: self.surrogates])
        return share(fooled.sum(), counted.sum())

    def transfer_rate(self, figure: str) -> Estimate | None:
        """Mean over the transfer classifiers of one of FIGURES; None where there is none."""
        if not self.transfers or (figure in OF_RECONSTRUCTION and not self.with_reconstructions):
            return None
        return transfer_mean(self.transfers, figure)

    @property
    def transfer_success(self) -> Estimate | None:
        """Mean attack success rate over the transfer classifiers, no surrogate ever among them."""
        return self.transfer_rate("success")

    @property
    def transfer_precisions(self) -> dict[str, Estimate]:
        """mAP by kind of picture, the mean over the transfer classifiers; of sigmoid heads alone."""
        of_each = [result.mean_precisions for result in self.transfers]
        return {
            name: Estimate(sum(one[name].value for one in of_each) / len(of_each), math.nan, math.nan)
            for name in (of_each[0] if of_each else ())
        }

    def role(self, k: int) -> str:
        """Of the k-th classifier."""
        if k < self.surrogates:
            return "surrogate"
        return "defended" if self.classifiers[k].is_defended else "transfer"

    def as_dict(self) -> dict:
        """For JSON: figures with their intervals and counts; None for what is not known."""
        return {
            "classifiers": [self.classifier_as_dict(k) for k in range(len(self.classifiers))],
            "joint_success": plain(self.joint_success),
            **{
                f"transfer_{name}": plain(self.transfer_rate(name))
                for name in ("success", "success_of_all", "accuracy_after", "success_of_attack_alone")
            },
            **{f"transfer_{name}": plain(figure) for name, figure in self.transfer_precisions.items()},
            "quality": {name: quality_as_dict(figure) for name, figure in self.quality.items()},
            "legend": self.legend,
            "warnings": self.warnings,
        }

    def classifier_as_dict(self, k: int) -> dict:
        result = self.classifiers[k]
        found = {"model": result.name, "role": self.role(k)}
        found |= {name: plain(figure) for name, figure in result.figures().items()}
        if result.certificates is not None:
            found["certified"] = result.certified()
        if over := self.draws.get(result.name):
            rules = {rule: {f: plain(v) for f, v in over.figures(rule).items()} for rule in RULES}
            found["draws"] = {"count": len(over.each), **rules}
        if result.precisions:
            images = positives(result.labels, len(self.class_names))
            found["average_precision"] = [
                {
                    "class": self.class_names[label],
                    "images": int(images[label]),
                    **{side: float(precisions[label]) for side, precisions in result.precisions.items()},
                }
                for label in np.flatnonzero(images)
            ]
        return found

    # ------------------------------------------------------------ tables

    @property
    def grouped(self) -> list[tuple[int, str]]:
        """The classifiers' places and how a table calls them, in its order: each defended one below its
        network.
        """
        places = range(len(self.classifiers))
        below: dict[str, list[int]] = {}
        for k in places:
            if self.role(k) == "defended":
                below.setdefault(self.classifiers[k].network, []).append(k)
        names, rows = {result.name for result in self.classifiers}, []
        for k in places:
            result = self.classifiers[k]
            if self.role(k) == "defended" and result.network in names:
                continue
            rows.append((k, result.name))
            others = below.get(result.name, ())
            rows += [(j, "  " + self.classifiers[j].name.removeprefix(result.name)) for j in others]
        return rows

    def rows_of(self, k: int, shown: str, figures: Sequence[str]) -> list[list[str]]:
        """The rows of the k-th classifier in a table that calls it so: its own, and those of its draws."""
        result, role = self.classifiers[k], self.role(k)
        own = result.figures()
        rows = [[shown, role, *(str(own[figure]) for figure in figures)]]
        if over := self.draws.get(result.name):
            indent = " " * (2 + len(shown) - len(shown.lstrip()))
            rows += [
                [indent + over.title(rule), role, *(str(over.rate(rule, figure)) for figure in figures)]
                for rule in RULES
            ]
        return rows

    def classifier_rows(self) -> list[list[str]]:
        """A table with a row a classifier, and of the means."""
        columns = {
            "accuracy_before": "accuracy before",
            "accuracy_reconstructed": "reconstructed only",
            "accuracy_after": "accuracy after (of all)",
            "success": "attack success (of right before)",
            "success_of_attack_alone": "of right when reconstructed",
        }
        if not self.with_reconstructions:
            columns = {name: title for name, title in columns.items() if name not in OF_RECONSTRUCTION}
        if self.classifiers[0].precisions:
            columns |= {"mAP_before": "mAP before", "mAP_after": "mAP after"}
        rows = [["classifier", "role", *columns.values()]]
        for k, shown in self.grouped:
            rows += self.rows_of(k, shown, list(columns))
        if self.surrogates > 1:  # below the last surrogate, and what defends it
            place = next((k for k, row in enumerate(rows) if row[1] == "transfer"), len(rows))
            joint_row = (str(self.joint_success) if name == "success" else "" for name in columns)
            rows.insert(place, ["all at once", "surrogate", *joint_row])
        if self.transfers:
            means = {name: self.transfer_rate(name) for name in columns if name.startswith(("acc", "succ"))}
            means |= {"accuracy_before": None, "accuracy_reconstructed": None} | self.transfer_precisions
            rows.append(["mean", "transfer", *("" if (m := means[n]) is None else str(m) for n in columns)])
        return rows

    def quality_rows(self) -> list[list[str]]:
        """A table with a row a measure."""
        alone = self.with_reconstructions
        rows = [["to the clean images", "adversarial", *(["reconstructed only"] if alone else []), ""]]
        for name, figure in self.quality.items():
            columns = [figure.adversarial, *([figure.reconstructed] if alone else [])]
            rows.append([name, *map(str, columns), figure.note or ""])
        return rows

    def tables(self) -> list[list[list[str]]]:
        """One table of the classifiers, one of how visible the change is."""
        return [self.classifier_rows(), self.quality_rows()]

    def lines(self) -> list[str]:
        """The same as text."""
        classifiers, quality = self.tables()
        return [
            *table(classifiers),
            "",
            *table(quality),
            "",
            "in brackets: 95 % intervals, Wilson's for shares, bootstrap over images for means",
            *self.legend,
            *self.remarks,
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    @property
    def legend(self) -> list[str]:
        """What is counted, and which way the measures go."""
        return [
            f"attack success is {COUNTED}; the JSON has it of all images, too (success_of_all)",
            *([DRAWS_LEGEND] if self.draws else []),
            *legend_of_head(self.classifiers[0]),
            *legend(self.quality),
        ]

    @property
    def remarks(self) -> list[str]:
        """What a reader of rows behind defences must know."""
        lines = [r.certified_line() for r in self.classifiers if r.certificates is not None]
        if any(self.role(k) == "defended" for k in range(len(self.classifiers))):
            lines.append(
                "classifiers behind defences that the images were not made through (--attack_through "
                "DEFENCE, --model_name NAME@DEFENCE) look stronger than they are"
            )
        return lines


def quality_as_dict(quality: Quality) -> dict:
    by_image = quality.by_image
    return {
        "adversarial": plain(quality.adversarial),
        "reconstructed": plain(quality.reconstructed),
        "note": quality.note,
        "by_image": None
        if by_image is None
        else [v if math.isfinite(v) else None for v in by_image.tolist()],
    }


def plain(figure: Estimate | None) -> dict | None:
    """For JSON, which knows no NaN."""
    if figure is None:
        return None
    return {
        key: value if value is None or math.isfinite(value) else None for key, value in asdict(figure).items()
    }


# ---------------------------------------------------------------- from what was found of each image


def results_of(
    judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray | None, draw: int = 0
) -> list[ClassifierResult]:
    """By classifier, the surrogates first; of a draw from 1 alone, those that have such draws."""
    found = []
    for k, name in enumerate(judges.names):
        if draw > judges.draws_of(name):
            continue
        sides = list(judged.predictions[:, k, draw].T)  # (B,) each
        is_certified = not draw and (judged.certificates[:, k, 0]["label"] >= 0).all()
        found.append(
            ClassifierResult(
                name,
                labels,
                sides[0],
                sides[1],
                sides[2] if len(sides) > 2 else None,
                targets,
                judges.head,
                judged.logits[:, k] if judges.head.threshold is not None else None,
                judged.certificates[:, k] if is_certified else None,
            )
        )
    return found


def evaluation_of(
    judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray | None
) -> Evaluation:
    """Everything that follows from what was found of each image.

    Args:
        labels, targets: of the images, `(B,)` or `(B, L)`, and `(B,)`.
    """
    results = results_of(judged, judges, labels, targets)
    of_draws = [results_of(judged, judges, labels, targets, draw) for draw in range(1, judges.draws + 1)]
    over = {each[0].name: OverDraws(each) for each in zip(*of_draws)}
    warnings = warnings_about_transfer(judges.surrogates, judges.others) + judged.oddities.tolist()
    for name, has_gradients in zip(judges.surrogates, judged.gradients.T):
        warnings += warnings_about_gradients(name, has_gradients)
    for result in results:
        if result.name in judges.surrogates or not result.is_defended:
            warnings += warnings_about_labels(result, len(judges.class_names))
    by_image = [dict(zip(judged.measures.tolist(), side.T)) for side in np.moveaxis(judged.visibility, 1, 0)]
    features = [torch.from_numpy(side) for side in np.moveaxis(np.asarray(judged.features), 1, 0)]
    quality = quality_of(by_image, features, judges.network)
    return Evaluation(results, quality, warnings, len(judges.surrogates), over, judges.class_names)


def evaluate(
    pictures: Pictures,
    surrogates: Mapping[str, torch.nn.Module],
    transfer: Sequence[str],
    device: torch.device,
    class_names: Sequence[str] | None = None,
    diffusion: object = None,
    head: Head = SOFTMAX,
) -> Evaluation:
    """Judges pictures in memory by surrogates, which are loaded already, and by transfer classifiers and
    others behind defences.

    Args:
        class_names: to compare with those of a transfer classifier that has names for its outputs.
        diffusion: the LatentDiffusion of defences that need one.
        head: of all classifiers.
    Raises:
        ClassifierError: a transfer classifier is unavailable, or has other classes than the surrogates.
    """
    first = next(iter(surrogates.values()))
    with torch.no_grad():
        classes = first(to_tensor(pictures.clean[:1]).to(device)).shape[-1]
    known, side = class_names or classes, pictures.clean.shape[1]

    def load(name: str) -> torch.nn.Module:
        return load_classifier(name, known, side, diffusion=diffusion, head=head).to(device)

    judges = Judges(
        tuple(surrogates),
        tuple(transfer),
        class_names or [str(k) for k in range(classes)],
        device,
        feature_network(tuple(surrogates)),
        load,
        head=head,
        loaded=dict(surrogates),
    )
    return evaluation_of(judge(judges, pictures), judges, pictures.labels, pictures.targets)
