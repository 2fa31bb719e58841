"""Judges an attack by the files that were written: who is fooled, how much of the picture changed, and how
sure that is.

    from diffattack.evaluation.evaluate import evaluate
    pictures = Pictures(clean, adversarial, labels, reconstructed)       # uint8 (B, H, W, 3), read from PNGs
    evaluation = evaluate(pictures, {"efficientnet_lite0": classifier}, ["efficientnet_lite1"], device)
    evaluation.classifiers[1].success, evaluation.quality["PSNR dB"].adversarial

Three figures must not be confused: `accuracy_after` counts all images, as the original DiffAttack prints it
and the tables of papers have it; `success` counts those that this classifier had right before; and
`success_of_all` is what TransferAttack calls success, misclassified images among all. Shares have 95 % Wilson
intervals, means over images 95 % bootstrap intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.registry import load_classifier
from diffattack.data.images import Pictures, to_tensor
from diffattack.evaluation.by_image import Asked, Judges, Said, judge
from diffattack.evaluation.checks import warnings_about_transfer
from diffattack.evaluation.draws import LEGEND, RULES, OverDraws
from diffattack.evaluation.gathered import Gathered
from diffattack.evaluation.legend import COUNTED, legend, legend_of_head
from diffattack.evaluation.precision import described
from diffattack.evaluation.predictions import ClassifierResult, certified, certified_line
from diffattack.evaluation.quality import FeatureNetwork, Quality, feature_network, quality_of
from diffattack.evaluation.stats import Estimate, resampled, share
from diffattack.evaluation.tables import table

if TYPE_CHECKING:
    from diffattack.diffusion.inversion import LatentDiffusion

# ---------------------------------------------------------------- success


def joint(results: Sequence[ClassifierResult]) -> tuple[np.ndarray, np.ndarray]:
    """Which images all classifiers had right before, and which of these fool all of them at once; `(B,)`
    each.
    """
    return np.all([r.correct_before for r in results], axis=0), np.all([r.fooled for r in results], axis=0)


def joint_success(results: Sequence[ClassifierResult]) -> Estimate:
    """Images that fool all classifiers at once, among those that all of them had right before."""
    counted, fooled = joint(results)
    return share(fooled.sum(), counted.sum())


def transfer_mean(results: Sequence[ClassifierResult], figure: str = "success") -> Estimate:
    """Mean over classifiers of the attack success rate, or of another figure of `ClassifierResult.counts`;
    images are resampled for all classifiers at once.
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


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Evaluation:
    """Everything that is said of a run: the results of the surrogates first, then those of transfer
    classifiers and of all behind defences.
    """

    classifiers: list[ClassifierResult]
    quality: dict[str, Quality]
    warnings: list[str]
    surrogates: int = 1
    # of random defences that were judged by each of several draws, by classifier
    draws: Mapping[str, OverDraws] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    @property
    def transfers(self) -> list[ClassifierResult]:
        """Those that are no surrogate and undefended."""
        return [result for result in self.classifiers[self.surrogates :] if not result.is_defended]

    @property
    def grouped(self) -> list[tuple[int, str]]:
        """The classifiers' places and how a table calls them, in its order: each defended one below its
        network.
        """
        names = [result.name for result in self.classifiers]
        rows = []
        for k, result in enumerate(self.classifiers):
            if self.role(k) == "defended" and result.network in names:
                continue  # below its network
            rows.append((k, result.name))
            rows += [
                (j, "  " + other.name.removeprefix(result.name))
                for j, other in enumerate(self.classifiers)
                if self.role(j) == "defended" and other.network == result.name
            ]
        return rows

    @property
    def joint_success(self) -> Estimate | None:
        """Of several surrogates: images that fool all of them at once, among those that all of them had right
        before.
        """
        return joint_success(self.classifiers[: self.surrogates]) if self.surrogates > 1 else None

    @property
    def with_reconstructions(self) -> bool:
        return self.classifiers[0].reconstructed is not None

    @property
    def transfer_success(self) -> Estimate | None:
        """Mean attack success rate over the transfer classifiers, no surrogate ever among them."""
        return transfer_mean(self.transfers) if self.transfers else None

    @property
    def transfer_success_of_all(self) -> Estimate | None:
        return transfer_mean(self.transfers, "success_of_all") if self.transfers else None

    @property
    def transfer_accuracy_after(self) -> Estimate | None:
        return transfer_mean(self.transfers, "accuracy_after") if self.transfers else None

    @property
    def transfer_success_of_attack_alone(self) -> Estimate | None:
        return (
            transfer_mean(self.transfers, "success_of_attack_alone")
            if self.transfers and self.with_reconstructions
            else None
        )

    @property
    def transfer_mean_precisions(self) -> dict[str, Estimate]:
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
        classifiers = [
            {
                "model": result.name,
                "role": self.role(k),
                **{name: plain(figure) for name, figure in result.figures().items()},
                **({"certified": certified(result)} if result.certificates else {}),
                **({"draws": self.draws_as_dict(result.name)} if result.name in self.draws else {}),
                **(
                    {"average_precision": described(result.precisions, self.class_names)}
                    if result.precisions
                    else {}
                ),
            }
            for k, result in enumerate(self.classifiers)
        ]
        quality = {
            name: {
                "adversarial": plain(figure.adversarial),
                "reconstructed": plain(figure.reconstructed),
                "note": figure.note,
                "by_image": None
                if figure.by_image is None
                else [float(v) if math.isfinite(v) else None for v in figure.by_image],
            }
            for name, figure in self.quality.items()
        }
        return {
            "classifiers": classifiers,
            "joint_success": plain(self.joint_success),
            "transfer_success": plain(self.transfer_success),
            "transfer_success_of_all": plain(self.transfer_success_of_all),
            "transfer_accuracy_after": plain(self.transfer_accuracy_after),
            **{f"transfer_{name}": plain(figure) for name, figure in self.transfer_mean_precisions.items()},
            "quality": quality,
            "transfer_success_of_attack_alone": plain(self.transfer_success_of_attack_alone),
            "legend": self.legend,
            "warnings": self.warnings,
        }

    def draws_as_dict(self, name: str) -> dict:
        """What a classifier's draws say, for JSON."""
        over = self.draws[name]
        rules = {rule: {f: plain(v) for f, v in over.figures(rule).items()} for rule in RULES}
        return {"count": len(over.each), **rules}

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

    def tables(self) -> list[list[list[str]]]:
        """The same as rows of cells: one table of the classifiers, one of the images' quality. Columns are
        left out where no reconstructions were written.
        """
        columns = [
            ("accuracy before", "accuracy_before"),
            ("reconstructed only", "accuracy_reconstructed"),
            ("accuracy after (of all)", "accuracy_after"),
            ("attack success (of right before)", "success"),
            ("of right when reconstructed", "success_of_attack_alone"),
        ]
        if not self.with_reconstructions:
            columns = [
                column
                for column in columns
                if column[1] not in ("accuracy_reconstructed", "success_of_attack_alone")
            ]
        if self.classifiers[0].precisions:
            columns += [("mAP before", "mAP_before"), ("mAP after", "mAP_after")]
        rows = [["classifier", "role", *(title for title, _ in columns)]]
        for k, shown in self.grouped:
            rows += self.rows_of(k, shown, [name for _, name in columns])
        means = {
            "accuracy_after": self.transfer_accuracy_after,
            "success": self.transfer_success,
            "success_of_attack_alone": self.transfer_success_of_attack_alone,
            **self.transfer_mean_precisions,
        }
        if self.surrogates > 1:
            rows.insert(
                # below the last surrogate, and what defends it
                next((k for k, row in enumerate(rows) if row[1] == "transfer"), len(rows)),
                [
                    "all at once",
                    "surrogate",
                    *(str(self.joint_success) if name == "success" else "" for _, name in columns),
                ],
            )
        if self.transfers:
            rows.append(
                ["mean", "transfer", *(str(means[name]) if name in means else "" for _, name in columns)]
            )
        return [
            rows,
            [
                [
                    "to the clean images",
                    "adversarial",
                    *(["reconstructed only"] if self.with_reconstructions else []),
                    "",
                ]
            ]
            + [
                [
                    name,
                    str(figure.adversarial),
                    *([str(figure.reconstructed)] if self.with_reconstructions else []),
                    figure.note or "",
                ]
                for name, figure in self.quality.items()
            ],
        ]

    def lines(self) -> list[str]:
        """The same as text."""
        classifiers, quality = self.tables()
        return [
            *table(classifiers),
            "",
            *table(quality),
            "",
            "in brackets: 95 % intervals, Wilson's for shares, bootstrap over images for means, jackknife "
            "for the kernel distance",
            *self.legend,
            *self.remarks,
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    @property
    def legend(self) -> list[str]:
        """What is counted, and which way the measures go."""
        return [
            f"attack success is {COUNTED}; the JSON has it of all images, too (success_of_all)",
            *([LEGEND] if self.draws else []),
            *legend_of_head(self.classifiers[0]),
            *legend(self.quality),
        ]

    @property
    def remarks(self) -> list[str]:
        """What a reader of rows behind defences must know."""
        lines = [certified_line(result) for result in self.classifiers if result.certificates]
        if any(self.role(k) == "defended" for k in range(len(self.classifiers))):
            lines.append(
                "classifiers behind defences that the images were not made through (--attack_through "
                "DEFENCE, --model_name NAME@DEFENCE) look stronger than they are"
            )
        return lines


def add_up(
    gathered: Gathered,
    labels: np.ndarray,
    targets: np.ndarray | None,
    network: FeatureNetwork,
    fid_reference: Path | None = None,
) -> Evaluation:
    """Everything that follows from what has been said of each image.

    Args:
        labels, targets: of the images, `(B,)` or `(B, L)`, and `(B,)`.
        network: that the features are of.
        fid_reference: a file of statistics for a Frechet distance to them.
    """
    asked, results = gathered.asked, gathered.results(labels, targets)
    quality = quality_of(gathered.columns, gathered.sides_features, network, fid_reference)
    warnings = warnings_about_transfer(asked.surrogates, asked.others) + gathered.warnings(results)
    over_draws = gathered.over_draws(labels, targets)
    return Evaluation(results, quality, warnings, len(asked.surrogates), over_draws, asked.class_names)


def evaluate(
    pictures: Pictures,
    surrogates: Mapping[str, torch.nn.Module],
    transfer: Sequence[str],
    device: torch.device,
    class_names: Sequence[str] | None = None,
    diffusion: LatentDiffusion | None = None,
    fid_reference: Path | None = None,
    head: Head = SOFTMAX,
) -> Evaluation:
    """Judges pictures in memory by surrogates, which are loaded already, and by transfer classifiers and
    others behind defences; runs keep what is said of each image instead (`diffattack.evaluation.by_image`).

    Args:
        class_names: to compare with those of a transfer classifier that has names for its outputs.
        diffusion: the model of defences that need one.
        fid_reference: a file of statistics for a Frechet distance to them.
        head: of all classifiers.

    Raises:
        ClassifierError: a transfer classifier is unavailable, or has other classes than the surrogates.
    """
    first = next(iter(surrogates.values()))
    with torch.no_grad():
        classes = first(to_tensor(pictures.clean[:1]).to(device)).shape[-1]
    names = class_names or [str(k) for k in range(classes)]
    asked = Asked(tuple(surrogates), tuple(transfer), names, 0, head=head)

    def load(name: str) -> torch.nn.Module:
        side = pictures.clean.shape[1]
        known = class_names or classes
        return load_classifier(name, known, side, diffusion=diffusion, head=head).to(device)

    judges, network = Judges(surrogates, load, device), feature_network(asked.surrogates)
    gathered = Gathered(asked, len(pictures.clean))
    for k in range(len(pictures.clean)):
        (said,) = judge([Said({})], pictures.of([k]), asked, judges, network)
        gathered.add(said)
    return add_up(gathered, pictures.labels, pictures.targets, network, fid_reference)


def plain(figure: Estimate | None) -> dict | None:
    """For JSON, which knows no NaN."""
    return (
        None
        if figure is None
        else {
            key: value if value is None or math.isfinite(value) else None
            for key, value in asdict(figure).items()
        }
    )
