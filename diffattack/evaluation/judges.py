"""Classifiers and measures that judge written pictures, and what they find of each image: `0000_judged.npz`.

    judged = judge(judges, pictures)            # of B images
    write_judged(path, judged.of_image(k), judges, key)             # of each, with what it is of: image_key
    evaluation_of(judged, judges, labels, targets)                  # evaluation/results.py

What is found of an image stays as it is until it is judged by others, or as another picture: then it is
judged again, by all of them.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from diffattack.classifiers.checks import difference
from diffattack.classifiers.defences import (
    CERTIFICATE,
    NO_CERTIFICATE,
    Smoothed,
    is_random,
    needs_diffusion,
    split_name,
)
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.data.images import Pictures, replacing, to_tensor
from diffattack.data.records import read_arrays
from diffattack.evaluation.metrics import features_of, measures
from diffattack.evaluation.predictions import PREDICTION, one_draw, predict
from diffattack.evaluation.warnings import has_gradient, warnings_about_outputs


@dataclass(frozen=True)
class Judged:
    """What has been found of B images, by C classifiers, of 2 or 3 sides: clean, adversarial, and, where it
    was written, reconstructed.
    """

    predictions: np.ndarray  # (B, C, 1 + draws, sides) of PREDICTION; draws are of random defences alone
    # (B, C, 2) of CERTIFICATE, of clean and adversarial; label -1 where there is none
    certificates: np.ndarray
    logits: np.ndarray  # (B, C, sides, classes), of a softmax head (B, C, sides, 0)
    gradients: np.ndarray  # (B, surrogates), bool: whether the loss has one at the clean picture
    visibility: np.ndarray  # (B, sides - 1, M), to the clean picture
    features: np.ndarray  # (B, sides, d), float32
    measures: np.ndarray  # (M,), their names
    oddities: np.ndarray  # what is wrong with the classifiers' outputs, as found on the first pictures

    def of_image(self, k: int) -> Judged:
        """Of the k-th alone, as a batch of one."""
        cut = {name: getattr(self, name)[k : k + 1] for name in BY_IMAGE}
        return Judged(**cut, measures=self.measures, oddities=self.oddities)


BY_IMAGE = tuple(declared.name for declared in fields(Judged))[:-2]  # those whose first axis is images
IN_FILES = ("features", "logits")  # of many images these would take most of the memory


@dataclass(eq=False)
class Judges:
    """All that judges, in any process."""

    surrogates: tuple[str, ...]
    others: tuple[str, ...]  # transfer classifiers, and those behind defences
    class_names: Sequence[str]
    device: torch.device
    network: str  # that features are taken from
    classifier: Callable[[str], torch.nn.Module]  # by name, on its device
    identities: dict[str, dict] = field(default_factory=dict)  # of classifiers without defences, by name
    diffusion: str = ""  # a digest of the diffusion model, which some defences run
    draws: int = 1  # by each of which a random defence judges alone, too, where it is more than one
    head: Head = SOFTMAX
    measures: Sequence[str] = ()  # groups of measures that can be had here

    def __post_init__(self) -> None:
        self.oddities: dict[str, list[str]] = {}
        self.known: dict[str, bool] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all classifiers, the surrogates first."""
        return tuple(dict.fromkeys((*self.surrogates, *self.others)))

    def draws_of(self, name: str) -> int:
        """By how many draws alone a classifier judges."""
        return self.draws if self.draws > 1 and is_random(name) else 0

    def __getitem__(self, name: str) -> torch.nn.Module:
        return self.classifier(name)

    @functools.cached_property
    def description(self) -> dict:
        """All that what is found depends on, but for the pictures, for JSON; a classifier's identity is
        compared as `difference` does.
        """
        return {
            "classifiers": list(self.names),
            "surrogates": len(self.surrogates),
            "identities": {name: self.identity(name) for name in self.names},
            "draws": self.draws,
            "head": [self.head.name, self.head.threshold],
            "features": self.network,
            "measures": sorted(self.measures),
            "classes": len(self.class_names),
        }

    def identity(self, name: str) -> dict | None:
        """Of a classifier, with what its defences depend on; None where it is not known."""
        known = self.identities.get(split_name(name)[0])
        return known and known | ({"diffusion": self.diffusion} if needs_diffusion([name]) else {})

    def are(self, text: str) -> bool:
        """Whether these are the judges that a file names; the files of a run all have the same text."""
        if text not in self.known:
            before, now = json.loads(text), self.description
            pairs = [(before["identities"].get(name), now["identities"][name]) for name in self.names]
            self.known[text] = before | {"identities": 0} == now | {"identities": 0} and all(
                a == b or (b is not None and difference(a, b) is None) for a, b in pairs
            )
        return self.known[text]


# ---------------------------------------------------------------- judging


def judge(judges: Judges, pictures: Pictures) -> Judged:
    """What all judges find of B images. On a CPU pictures are looked at one by one, as fast, so that
    nothing depends on those beside it.
    """
    names, device, sides = judges.names, judges.device, pictures.sides
    of_classifiers = [judge_by(judges, name, pictures) for name in names]
    draws = judges.draws * (judges.draws > 1)
    predictions = np.zeros((len(pictures.clean), len(names), 1 + draws, len(sides)), PREDICTION)
    for k, (predicted, _, _) in enumerate(of_classifiers):
        predictions[:, k, : predicted.shape[1]] = predicted
    features = (features_of(judges.network, side, device, batch_on(device)) for side in sides)
    # one by one, as each picture takes 16 MB
    visible = [[measures(first, other, device) for other in others] for first, *others in zip(*sides)]
    return Judged(
        predictions,
        np.stack([certificates for _, _, certificates in of_classifiers], 1),
        np.stack([logits for _, logits, _ in of_classifiers], 1),
        gradients_of(judges, pictures),
        np.array([[list(of_side.values()) for of_side in of_image] for of_image in visible]),
        np.stack([of_side.float().numpy() for of_side in features], 1),
        np.array(list(visible[0][0])),
        np.array([line for name in names for line in judges.oddities.get(name, ())], str),
    )


def judge_by(judges: Judges, name: str, pictures: Pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a classifier finds: predictions `(B, 1 + draws, sides)`, logits `(B, sides, classes)`, and
    certificates `(B, 2)`.
    """
    classifier, head, device = judges[name], judges.head, judges.device
    batch, about = batch_on(device), (pictures.labels, device)
    if name in judges.surrogates or name == split_name(name)[0]:
        judges.oddities.setdefault(
            name, warnings_about_outputs(name, classifier, pictures.clean[:1], device, head)
        )
    draws = range(judges.draws_of(name))
    looks = [classifier, *(functools.partial(one_draw, classifier, number) for number in draws)]
    predicted = np.zeros((len(pictures.clean), len(looks), len(pictures.sides)), PREDICTION)
    certificates, logits = np.full((len(predicted), 2), NO_CERTIFICATE, CERTIFICATE), []
    for side, images in enumerate(pictures.sides):
        of_looks = [predict(look, images, *about, batch, head, pictures.targets) for look in looks]
        predicted[..., side] = np.stack([predictions for predictions, _ in of_looks], 1)
        logits.append(of_looks[0][1])
        if images is not pictures.reconstructed and isinstance(classifier, Smoothed):
            chunks = to_tensor(images).split(batch)
            certificates[:, side] = np.concatenate([classifier.certify(part.to(device)) for part in chunks])
    return predicted, np.stack(logits, 1), certificates


def gradients_of(judges: Judges, pictures: Pictures) -> np.ndarray:
    """Whether each surrogate's loss has a gradient at each clean picture, `(B, surrogates)`."""
    return np.array(
        [
            [has_gradient(judges[name], *one, judges.device, judges.head) for name in judges.surrogates]
            for one in zip(pictures.clean, pictures.labels)
        ]
    )


def batch_on(device: torch.device) -> int:
    """Pictures at once."""
    return 1 if device.type == "cpu" else 16


# ---------------------------------------------------------------- what is kept


def image_key(digests: Sequence[str], labels: Sequence[int], target: int | None) -> str:
    """The pictures that were judged, and for which labels and target."""
    return json.dumps([list(digests), list(labels), target])


def write_judged(path: Path, judged: Judged, judges: Judges, key: str) -> None:
    """Keeps what was found of one image.

    Args:
        key: of `image_key`.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        by = json.dumps(judges.description)
        np.savez_compressed(file, **vars(judged), judges=np.array(by), image=np.array(key))


def read_judged(path: Path, judges: Judges, key: str) -> Judged | None:
    """What these judges have found of these pictures; None where that is nothing, or of others."""
    try:
        arrays = read_arrays(path)
        if str(arrays.pop("image")) != key or not judges.are(str(arrays.pop("judges"))):
            return None
        return Judged(**arrays)
    # where there is none yet, and what numpy, zipfile, zlib and json raise on files that are none of theirs
    except Exception:
        return None


def joined(each: Iterable[Judged], images: int, folder: Path) -> Judged:
    """What has been found of so many images, one after the other, in one; what would take most of the memory
    lies in files without a name in the folder.
    """
    arrays: dict[str, np.ndarray] = {}
    oddities: dict[str, None] = {}
    for k, judged in enumerate(each):
        for name in BY_IMAGE:
            values = getattr(judged, name)
            if k == 0:
                arrays[name] = room_for(
                    (images, *values.shape[1:]), values.dtype, name in IN_FILES and folder
                )
            arrays[name][k] = values[0]
        oddities |= dict.fromkeys(judged.oddities.tolist())
    return Judged(**arrays, measures=judged.measures, oddities=np.array(list(oddities), str))


def room_for(shape: tuple[int, ...], dtype: np.dtype, folder: Path | bool) -> np.ndarray:
    if not folder or 0 in shape:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=shape)
