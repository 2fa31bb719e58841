"""Everything that is found of a run: who is fooled, how visible the change is, and how sure that is.

evaluation = evaluation_of(judge(judges, pictures), judges, pictures.labels, pictures.targets)
evaluation.classifiers[1].success, evaluation.quality["PSNR dB"].adversarial
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from diffattack.evaluation.judges import Judged, Judges
from diffattack.evaluation.metrics import Quality, quality_of
from diffattack.evaluation.predictions import DRAWS_LEGEND, RULES, ClassifierResult
from diffattack.evaluation.statistics import Estimate, mean_rate, share
from diffattack.evaluation.tables import COUNTED, figure_rows, legend, legend_of_head, table
from diffattack.evaluation.warnings import (
    warnings_about_gradients,
    warnings_about_transfer,
)

COLUMNS = {  # of a table with a row a classifier, where there are such figures
    "accuracy_before": "accuracy before",
    "accuracy_reconstructed": "reconstructed only",
    "accuracy_after": "accuracy after (of all)",
    "success": "attack success (of right before)",
    "success_of_attack_alone": "of right when reconstructed",
}
OF_MEANS = ("success", "success_of_all", "accuracy_after", "success_of_attack_alone")


def counts_of(results: Sequence[ClassifierResult], figure: str = "success") -> tuple[np.ndarray, np.ndarray]:
    """Which images each classifier counts, and of which it is so, `(classifiers, B)` each."""
    return tuple(map(np.stack, zip(*(result.counts[None][figure] for result in results))))


def transfer_mean(results: Sequence[ClassifierResult], figure: str = "success") -> Estimate | None:
    """Mean over classifiers of the success rate, or of another of FIGURES; None where there is none."""
    if not results or figure not in results[0].counts[None]:
        return None
    return mean_rate(*counts_of(results, figure))


def group_means(results: Sequence[ClassifierResult]) -> dict[str, Estimate | None]:
    """The means over classifiers that tables have."""
    return {name: transfer_mean(results, name) for name in OF_MEANS}


@dataclass(frozen=True)
class Evaluation:
    """The results of the surrogates first, then those of transfer classifiers and of all behind defences."""

    classifiers: list[ClassifierResult]
    quality: dict[str, Quality]
    warnings: list[str]
    surrogates: int = 1
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of transfer classifiers, by name

    def role(self, k: int) -> str:
        """Of the k-th classifier; a transfer classifier is no surrogate and undefended."""
        if k < self.surrogates:
            return "surrogate"
        return "transfer" if self.classifiers[k].name == self.classifiers[k].network else "defended"

    @property
    def transfers(self) -> list[ClassifierResult]:
        return [result for k, result in enumerate(self.classifiers) if self.role(k) == "transfer"]

    @cached_property
    def transfer_groups(self) -> dict[str, list[ClassifierResult]]:
        """All transfer classifiers as the group "mean", if there are any, and each group of them."""
        found = {"mean": self.transfers}
        for group, names in self.groups.items():
            found[group] = [one for one in self.transfers if one.name in names]
        return {group: results for group, results in found.items() if results}

    def joint(self) -> tuple[np.ndarray, np.ndarray]:
        """Which images all surrogates had right before, and which of these fool all of them at once; `(B,)`
        each.
        """
        counted, fooled = counts_of(self.classifiers[: self.surrogates])
        return counted.all(0), fooled.all(0)

    @property
    def joint_success(self) -> Estimate | None:
        """The share of the second among the first, of several surrogates."""
        counted, fooled = self.joint()
        return share(fooled.sum(), counted.sum()) if self.surrogates > 1 else None

    @cached_property
    def transfer_figures(self) -> dict[str, Estimate | None]:
        """Means over the transfer classifiers, None where there is none."""
        return group_means(self.transfers)

    def as_dict(self) -> dict:
        """For `json_text`: figures with their intervals and counts; None for what is not known."""
        return {
            "classifiers": [self.classifier_as_dict(k) for k in range(len(self.classifiers))],
            "joint_success": self.joint_success,
            **{f"transfer_{name}": figure for name, figure in self.transfer_figures.items()},
            "transfer_groups": {
                g: group_means(each) for g, each in self.transfer_groups.items() if g != "mean"
            },
            "quality": self.quality,
            "legend": self.legend,
            "warnings": self.warnings,
        }

    def classifier_as_dict(self, k: int) -> dict:
        result = self.classifiers[k]
        found = {"model": result.name, "role": self.role(k), **result.figures[None]}
        if result.draws:
            found["draws"] = {"count": result.draws} | {rule: result.figures[rule] for rule in RULES}
        return found

    # ------------------------------------------------------------ tables

    def classifier_rows(self) -> list[list[str]]:
        """A table with a row a classifier, each defended one below its network, of its draws, and of the
        means.
        """
        first, names = self.classifiers[0].figures[None], [result.name for result in self.classifiers]
        columns, lines = {name: title for name, title in COLUMNS.items() if first.get(name)}, []

        def add(shown: str, role: str, figures: Mapping[str, Estimate | None]) -> None:
            cells = {title: figures.get(name) for name, title in columns.items()}
            lines.append({"classifier": shown, "role": role} | cells)

        def place(k: int) -> int:
            network = self.classifiers[k].network
            return names.index(network) if self.role(k) == "defended" and network in names else k

        for k in sorted(range(len(names)), key=place):
            result, indent = self.classifiers[k], "  " * (place(k) != k)
            shown = result.name.removeprefix(result.network) if indent else result.title
            for rule, figures in result.figures.items():
                name = f"  {rule} of {result.draws} draws" if rule else shown
                add(indent + name, self.role(k), figures)
        if self.surrogates > 1:
            add("all at once", "surrogate", {"success": self.joint_success})
        for group, results in self.transfer_groups.items():
            add("mean" if group == "mean" else f"mean of {group}", "transfer", group_means(results))
        return figure_rows(lines)

    def quality_rows(self) -> list[list[str]]:
        """A table with a row a measure."""
        has_both = any(figure.reconstructed for figure in self.quality.values())
        return figure_rows(
            [
                {"to the clean images": name, "adversarial": figure.adversarial}
                | ({"reconstructed only": figure.reconstructed} if has_both else {})
                | {"": figure.note}
                for name, figure in self.quality.items()
            ]
        )

    def tables(self) -> list[list[list[str]]]:
        """One table of the classifiers, one of how visible the change is."""
        return [self.classifier_rows(), self.quality_rows()]

    def lines(self) -> list[str]:
        """The same as text, with what a reader of it must know."""
        classifiers, quality = map(table, self.tables())
        looks = (
            "classifiers behind defences that the images were not made through (--attack_through DEFENCE, "
            "--model_name NAME@DEFENCE) look stronger than they are"
        )
        return [
            *classifiers,
            "",
            *quality,
            "",
            "in brackets: 95 % intervals, Wilson's for shares, bootstrap over images for means",
            *self.legend,
            *[looks] * any(self.role(k) == "defended" for k in range(len(self.classifiers))),
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    @property
    def legend(self) -> list[str]:
        """What is counted, and which way the measures go."""
        of_all = f"attack success is {COUNTED}; the JSON has it of all images, too (success_of_all)"
        return [of_all, *self.legend_of_classifiers, *legend(self.quality)]

    @property
    def legend_of_classifiers(self) -> list[str]:
        has_draws = any(result.draws for result in self.classifiers)
        return [DRAWS_LEGEND] * has_draws + legend_of_head(self.classifiers[0].head.threshold)


# ---------------------------------------------------------------- from what was found of each image


def results_of(
    judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray
) -> list[ClassifierResult]:
    """By classifier, the surrogates first; of images with these labels `(B,)` or `(B, L)`, targets `(B,)`."""
    return [
        ClassifierResult(
            name,
            labels,
            judged.predictions[:, k, : 1 + judges.draws_of(name)],
            targets,
            judges.head,
        )
        for k, name in enumerate(judges.names)
    ]


def evaluation_of(judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray) -> Evaluation:
    """Everything that follows from what was found of each image; labels and targets as of `results_of`."""
    results = results_of(judged, judges, labels, targets)
    warnings = warnings_about_transfer(judges.surrogates, judges.others) + judged.oddities.tolist()
    for name, has_gradients in zip(judges.surrogates, judged.gradients.T):
        warnings += warnings_about_gradients(name, has_gradients)
    quality = quality_of(judged.measures.tolist(), judged.visibility, judged.features, judges.network)
    return Evaluation(results, quality, warnings, len(judges.surrogates), judges.groups)
