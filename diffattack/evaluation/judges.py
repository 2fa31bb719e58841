"""Classifiers and measures that judge written pictures, and what they find of each image: `0000_judged.npz`.

    judged = judge(judges, pictures)            # of B images
    write_judged(path, judged.of_image(k), judges, key)             # of each, with what it is of
    evaluation_of(judged, judges, labels, targets)                  # evaluation/results.py

What is found of an image stays as it is until it is judged by others, or as another picture: then it is
judged again, by all of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from diffattack.classifiers.checks import difference
from diffattack.classifiers.defences import (
    is_random,
    needs_diffusion,
    split_name,
)
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.data.images import Pictures, part_of_change, replacing
from diffattack.data.records import read_arrays
from diffattack.evaluation.metrics import features_of, measures, visibility
from diffattack.evaluation.predictions import PREDICTION, one_draw, predict
from diffattack.evaluation.seeing import named_measures
from diffattack.evaluation.warnings import has_gradient, warnings_about_outputs

ALWAYS = ("PSNR dB", "SSIM", "L2", "where smooth (levels)")  # beside the models of seeing that are asked for


@dataclass(frozen=True)
class Judged:
    """What has been found of B images, by C classifiers, of 2 or 3 sides: clean, adversarial, and, where it
    was written, reconstructed.
    """

    predictions: np.ndarray  # (B, C, 1 + draws, sides) of PREDICTION; draws are of random defences alone
    gradients: np.ndarray  # (B, surrogates), bool: whether the loss has one at the clean picture
    visibility: np.ndarray  # (B, sides - 1, M), to the clean picture
    features: np.ndarray  # (B, sides, d), float32
    predictions_of_parts: np.ndarray  # (B, C, parts) of PREDICTION; zeros behind defences
    visibility_of_parts: np.ndarray  # (B, parts, M'), by `names_of` the judges
    measures: np.ndarray  # (M,), their names
    oddities: np.ndarray  # what is wrong with the classifiers' outputs, as found on the first pictures

    def of_image(self, k: int) -> Judged:
        """Of the k-th alone, as a batch of one."""
        cut = {name: getattr(self, name)[k : k + 1] for name in BY_IMAGE}
        return Judged(**cut, measures=self.measures, oddities=self.oddities)


BY_IMAGE = tuple(declared.name for declared in fields(Judged))[:-2]  # those whose first axis is images


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
    measures: Sequence[str] = ()  # those that can be had here
    seeing: tuple[str, ...] = ()  # the models of seeing among them, as --measures names them
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of transfer classifiers, by name
    parts: Sequence[float] = ()  # of a change, that are judged beside the whole
    oddities: dict[str, list[str]] = field(default_factory=dict)  # by classifier, as Judged has them

    @property
    def names(self) -> tuple[str, ...]:
        """Of all classifiers, the surrogates first."""
        return tuple(dict.fromkeys((*self.surrogates, *self.others)))

    def draws_of(self, name: str) -> int:
        """By how many draws alone a classifier judges."""
        return self.draws if self.draws > 1 and is_random(name) else 0

    @functools.cached_property
    def description(self) -> dict:
        """All that what is found depends on, but for the pictures, for JSON; a classifier's identity is
        compared as `difference` does.
        """
        return {
            "classifiers": list(self.names),
            "surrogates": len(self.surrogates),
            "identities": {
                name: known and known | ({"diffusion": self.diffusion} if needs_diffusion([name]) else {})
                for name in self.names
                for known in [self.identities.get(split_name(name)[0])]  # None where it is not known
            },
            "draws": self.draws,
            "head": [self.head.name, self.head.threshold],
            "features": self.network,
            "measures": sorted(self.measures),
            "parts": list(self.parts),
            "classes": len(self.class_names),
        }

    def are(self, text: str) -> bool:
        """Whether these are the judges that a file names."""
        before, now = json.loads(text), self.description
        pairs = [(before["identities"].get(name), now["identities"][name]) for name in self.names]
        return before | {"identities": 0} == now | {"identities": 0} and all(
            a == b or (b is not None and difference(a, b) is None) for a, b in pairs
        )


# ---------------------------------------------------------------- judging


def judge(judges: Judges, pictures: Pictures) -> Judged:
    """What all judges find of B images. On a CPU pictures are looked at one by one, as fast, so that
    nothing depends on those beside it.
    """
    names, head, device, sides = judges.names, judges.head, judges.device, pictures.sides
    shape = len(pictures.clean), len(names), 1 + judges.draws * (judges.draws > 1), len(sides)
    predictions = np.zeros(shape, PREDICTION)
    batch, about = batch_on(device), (pictures.labels, device, batch_on(device), head, pictures.targets)
    in_part = [part_of_change(*sides[:2], part) for part in judges.parts]
    of_parts = np.zeros((*shape[:2], len(in_part)), PREDICTION)
    for k, name in enumerate(names):
        classifier, is_undefended = judges.classifier(name), name == split_name(name)[0]
        if name not in judges.oddities and (name in judges.surrogates or is_undefended):
            first = pictures.clean[:1]
            judges.oddities[name] = warnings_about_outputs(name, classifier, first, device, head)
        for side, images in enumerate(sides):
            predictions[:, k, 0, side] = predict(classifier, images, *about)
            for draw in range(judges.draws_of(name)):
                look = functools.partial(one_draw, classifier, draw)
                predictions[:, k, 1 + draw, side] = predict(look, images, *about)
        if is_undefended:
            for part, images in enumerate(in_part):
                of_parts[:, k, part] = predict(classifier, images, *about)
    features = [features_of(judges.network, side, device, batch).float().numpy() for side in sides]
    # one by one, as each picture takes 16 MB
    visible = [
        [measures(first, other, device, judges.seeing) for other in others] for first, *others in zip(*sides)
    ]
    attacked = [judges.classifier(name) for name in judges.surrogates]
    images = zip(pictures.clean, pictures.labels)
    return Judged(
        predictions,
        np.array([[has_gradient(each, *one, device, head) for each in attacked] for one in images]),
        np.array([[list(of_side.values()) for of_side in of_image] for of_image in visible]),
        np.stack(features, 1),
        of_parts,
        np.array([visibilities(first, others, judges) for first, *others in zip(pictures.clean, *in_part)]),
        np.array(list(visible[0][0])),
        np.array([line for name in names for line in judges.oddities.get(name, ())], str),
    )


def names_of(judges: Judges) -> list[str]:
    """The M' measures of pictures that are not the end of an attack."""
    return [*ALWAYS, *named_measures(judges.seeing)]


def visibilities(clean: np.ndarray, others: Iterable[np.ndarray], judges: Judges) -> np.ndarray:
    """Of pictures beside a clean one, `(pictures, M')`."""
    asked, rows = named_measures(judges.seeing).values(), []
    for other in others:
        always = visibility(clean, other)
        rows.append([*(always[name] for name in ALWAYS), *(measure(clean, other) for measure in asked)])
    return np.array(rows)


def batch_on(device: torch.device) -> int:
    """Pictures at once."""
    return 1 if device.type == "cpu" else 16


# ---------------------------------------------------------------- what is kept


def write_judged(path: Path, judged: Judged, judges: Judges, key: str) -> None:
    """Keeps what was found of one image; the key says which pictures were judged, and for which labels."""
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


def joined(each: Iterable[Judged], images: int) -> Judged:
    """What has been found of so many images, one after the other, in one."""
    arrays: dict[str, np.ndarray] = {}
    oddities: dict[str, None] = {}
    for k, judged in enumerate(each):
        for name in BY_IMAGE:
            values = getattr(judged, name)
            if k == 0:
                arrays[name] = np.zeros((images, *values.shape[1:]), values.dtype)
            arrays[name][k] = values[0]
        oddities |= dict.fromkeys(judged.oddities.tolist())
    return Judged(**arrays, measures=judged.measures, oddities=np.array(list(oddities), str))
