"""What has been said of a run's images, put into columns: all that an evaluation holds of each image."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffattack.classifiers.certificates import Certificate
from diffattack.evaluation.by_image import SIDES, Asked, Said
from diffattack.evaluation.checks import warnings_about_gradients, warnings_about_labels
from diffattack.evaluation.draws import OverDraws, draw_of
from diffattack.evaluation.predictions import ClassifierResult, Prediction, Predictions
from diffattack.evaluation.quality import INFINITE


class Gathered:
    """What has been said of images, one after the other, in columns: this is what grows with their number.

    Args:
        images: how many there will be.
        scratch: a folder for files of the features and logits, which would take most of the memory; None
            keeps them in memory.
    """

    def __init__(self, asked: Asked, images: int, scratch: Path | None = None):
        self.asked, self.images, self.scratch = asked, images, scratch
        self.count, self.sides, self.measures = 0, (), ({}, {})
        self.answers: dict[tuple[str, str], np.ndarray] = {}
        self.draws: dict[tuple[str, str], np.ndarray] = {}
        self.logits: dict[str, np.ndarray] = {}  # (sides, B, classes), of classifiers with a sigmoid head
        self.certificates: dict[str, tuple[list[Certificate], list[Certificate]]] = {}
        self.features = np.empty((0, 0, 0), np.float32)
        self.odd: dict[str, dict[str, None]] = {}
        self.gradients: dict[str, list[bool]] = {name: [] for name in asked.surrogates}

    def add(self, said: Said) -> None:
        """The next image, of which everything that is asked for has been said."""
        row, k = said.row, self.count
        if k == 0:
            self.begin(said)
        for name in self.asked.classifiers:
            for side in self.sides:
                found = row["predictions"][name][side]
                self.answers[name, side][k] = Prediction.of_description(found, self.asked.base).numbers
            for side in self.sides if name in self.asked.drawn else ():
                for number in range(self.asked.draws):
                    one = draw_of(row["draws"][name], side, number, self.asked.base)
                    self.draws[name, side][number, k] = one.numbers
            if name in self.logits:
                self.logits[name][:, k] = said.logits[name]
            for side, certificate in row["certificates"].get(name, {}).items():
                both = self.certificates.setdefault(name, ([], []))
                both[side == "after"].append(Certificate(**certificate))
            self.odd.setdefault(name, {}).update(dict.fromkeys(row["odd"].get(name, ())))
        for columns, key in zip(self.measures, ("quality", "quality_of_reconstruction")):
            for name, column in columns.items():
                value = row[key][name]
                # JSON has neither; a picture that did not change has an infinite PSNR
                column[k] = (math.inf if name in INFINITE else math.nan) if value is None else value
        for name, seen in self.gradients.items():
            seen.append(not row["no_gradient"][name])
        self.features[:, k] = said.features
        self.count += 1

    def begin(self, first: Said) -> None:
        row = first.row
        self.features = self.room_for(first.features)
        some = next(iter(row["predictions"].values()))
        self.sides = tuple(side for side in SIDES if side in some)
        for name in self.asked.classifiers:
            for side in self.sides:
                self.answers[name, side] = np.zeros((self.images, 4))
                if name in self.asked.drawn:
                    self.draws[name, side] = np.zeros((self.asked.draws, self.images, 4))
            if self.asked.head.threshold is not None:
                self.logits[name] = self.room_for(first.logits[name])
        for columns, key in zip(self.measures, ("quality", "quality_of_reconstruction")):
            columns |= {name: np.zeros(self.images) for name in row.get(key, ())}

    def room_for(self, of_first: np.ndarray) -> np.ndarray:
        """Room for what takes most of the memory, `(sides, n)` of each image: `(sides, B, n)`."""
        shape = (len(of_first), self.images, of_first.shape[1])
        if self.scratch is None:
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            return np.memmap(file, np.float32, "w+", shape=shape)

    def said_by(self, name: str, side: str) -> Predictions | None:
        """What a classifier says of a kind of picture, None where there are none."""
        if side not in self.sides:
            return None
        logits = self.logits[name][self.sides.index(side)] if name in self.logits else None
        return Predictions.of_columns(self.answers[name, side], logits)

    def results(self, labels: np.ndarray, targets: np.ndarray | None) -> list[ClassifierResult]:
        """By classifier, the surrogates first."""
        return [
            ClassifierResult(
                name,
                labels,
                *(self.said_by(name, side) for side in ("before", "after", "reconstructed")),
                targets,
                self.certificates.get(name),
                self.asked.head,
            )
            for name in self.asked.classifiers
        ]

    def over_draws(self, labels: np.ndarray, targets: np.ndarray | None) -> dict[str, OverDraws]:
        """Of the classifiers that are judged by each draw alone, by name."""
        found = {}
        for name in self.asked.drawn:
            found[name] = OverDraws(
                [
                    ClassifierResult(
                        name,
                        labels,
                        *(
                            Predictions.of_columns(self.draws[name, side][number])
                            if side in self.sides
                            else None
                            for side in ("before", "after", "reconstructed")
                        ),
                        targets,
                    )
                    for number in range(self.asked.draws)
                ]
            )
        return found

    def warnings(self, results: Sequence[ClassifierResult]) -> list[str]:
        """Of what is wrong with the classifiers or the labels."""
        found, classes = [], len(self.asked.class_names)
        for result in results:
            found += self.odd[result.name]
            if result.name in self.gradients:
                found += warnings_about_gradients(result.name, self.gradients[result.name])
            if result.name in self.asked.surrogates or not result.is_defended:
                found += warnings_about_labels(
                    result.name, result.before, result.labels, classes, result.head
                )
        return found

    @property
    def columns(self) -> list[dict[str, np.ndarray]]:
        """Measures of visibility by name, `(B,)`, of the adversarial pictures, and of the reconstructed."""
        return [columns for columns in self.measures if columns]

    @property
    def sides_features(self) -> list[torch.Tensor]:
        """Of the clean, adversarial and reconstructed pictures, `(B, d)` each."""
        return [torch.from_numpy(np.asarray(features)) for features in self.features]
