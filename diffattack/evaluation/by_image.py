"""What is said of one image, from its written pictures: by every classifier, and how visible the change is.

It is kept in the image's record, so that it is said once, by the process that attacked the image; the end of
a run only adds up. A later judge, or a measure that has come to hand since, adds what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import torch

from diffattack.classifiers.certificates import Certificate
from diffattack.classifiers.defences import is_random, needs_diffusion, split_name
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.identity import difference
from diffattack.common.devices import memory_is_short
from diffattack.data.images import Pictures
from diffattack.evaluation.checks import has_gradient, warnings_about_outputs
from diffattack.evaluation.draws import OneDraw, add_draw, draw_of, drawn, first_draws
from diffattack.evaluation.predictions import ClassifierResult, Prediction, Predictions, evaluate_classifier
from diffattack.evaluation.quality import FeatureNetwork, features_of, measures, measures_at_hand

SIDES = ("before", "reconstructed", "after")
# of a row, what is not for results.json, and what an evaluation has in columns
KEPT = (
    "judged_by",
    "features_of",
    "quality_of_reconstruction",
    "certificates",
    "draws",
    "odd",
    "no_gradient",
    "judged",
    "files",
)
IN_COLUMNS = (*KEPT, "predictions", "quality", "digest", "mask_digest")


@dataclass(frozen=True)
class Asked:
    """What is to be known of each image."""

    surrogates: tuple[str, ...]
    others: tuple[str, ...]  # transfer classifiers, and those behind defences
    class_names: Sequence[str]
    base: int  # that labels count from in rows
    # of classifiers, by their names without defences
    identities: Mapping[str, dict] = field(default_factory=dict)
    diffusion: str = ""  # a digest of the diffusion model, which some defences run
    draws: int = 1  # by each of which a random defence is judged alone, too, where it is more than one
    head: Head = SOFTMAX  # of all of them

    @property
    def classifiers(self) -> tuple[str, ...]:
        """All that judge, the surrogates first."""
        return (*self.surrogates, *(name for name in self.others if name not in self.surrogates))

    def identity(self, name: str) -> dict | None:
        """Of a classifier, with what its defences depend on; None where it is not known."""
        known = self.identities.get(split_name(name)[0])
        return known and known | ({"diffusion": self.diffusion} if needs_diffusion([name]) else {})

    def is_of(self, row: Mapping, name: str) -> bool:
        """Whether a row says what a classifier of this name says, and not what another one did; of the
        surrogates of a run its folder answers for that.
        """
        if name not in row.get("predictions", {}):
            return False
        if name not in row.get("judged_by", {}):
            return name in self.surrogates
        known, found = row["judged_by"][name], self.identity(name)
        return known == found if found is None else difference(known, found) is None

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """Those of them that are judged by each draw alone."""
        return tuple(name for name in self.classifiers if self.draws > 1 and is_random(name))

    @cached_property
    def measures(self) -> frozenset[str]:
        """The measures of visibility that can be had here."""
        return measures_at_hand()


@dataclass(frozen=True)
class Said:
    """What has been said of an image: a row of results.json with more in it, the features of its pictures,
    `(2 or 3, d)`: clean, adversarial, reconstructed; and by classifier with a sigmoid head the logits of its
    pictures, `(2 or 3, classes)`, in the order of SIDES.
    """

    row: dict
    features: np.ndarray | None = None
    logits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of_pictures(
        self, digests: Sequence[str], labels: Sequence[int | None], head: str = SOFTMAX.name
    ) -> Said:
        """The same, or nothing where it was said of other files than these, for other labels, or with another
        head.
        """
        judged = {"files": list(digests), "labels": list(labels)}
        if head != SOFTMAX.name:
            judged["head"] = head
        return self if self.row.get("judged") == judged else Said({"judged": judged})


class Judges:
    """The classifiers that judge, loaded when they are first asked for, and kept while memory suffices.

    Args:
        given: classifiers that are loaded already, by name.
        load: loads another, on its device.
    """

    def __init__(
        self,
        given: Mapping[str, torch.nn.Module],
        load: Callable[[str], torch.nn.Module],
        device: torch.device,
    ):
        self.given, self.load, self.device = dict(given), load, device
        self.loaded: dict[str, torch.nn.Module] = {}
        self.looked_at: dict[str, list[str]] = {}

    def __getitem__(self, name: str) -> torch.nn.Module:
        if name in self.given:
            return self.given[name]
        if name not in self.loaded:
            while self.loaded and memory_is_short(self.device):
                del self.loaded[next(iter(self.loaded))]
            self.loaded[name] = self.load(name)
        return self.loaded[name]

    @property
    def batch(self) -> int:
        """Pictures at once: on a CPU one, as fast, so that what is said of an image does not depend on
        those beside it.
        """
        return 1 if self.device.type == "cpu" else 16

    def oddities(self, name: str, clean: np.ndarray, head: Head = SOFTMAX) -> list[str]:
        """What is wrong with a classifier's outputs, found on the first pictures that it sees."""
        if name not in self.looked_at:
            self.looked_at[name] = warnings_about_outputs(name, self[name], clean, self.device, head)
        return self.looked_at[name]


@dataclass(frozen=True)
class Lacking:
    """What has not been said of an image yet."""

    classifiers: frozenset[str]
    draws: Mapping[str, int]  # by classifier, the first draw that it has not been asked about
    gradients: frozenset[str]  # surrogates whose gradient has not been looked at
    measures: frozenset[str]
    features: bool

    def __bool__(self) -> bool:
        return bool(self.classifiers or self.draws or self.gradients or self.measures or self.features)


def lacking(said: Said, asked: Asked, network: str) -> Lacking:
    """What is asked for and has not been said of an image; `network` is the feature network's name."""
    row = said.row
    known = {name for name in asked.classifiers if asked.is_of(row, name)}
    if asked.head.threshold is not None:
        known &= said.logits.keys()
    # of a classifier that has become another one since, none of its draws is of use
    so_many = {name: drawn(row, name) if name in known else 0 for name in asked.drawn}
    unknown = frozenset(asked.classifiers) - known
    return Lacking(
        unknown,
        {name: count for name, count in so_many.items() if count < asked.draws},
        frozenset(asked.surrogates) - (row.get("no_gradient", {}).keys() - unknown),
        asked.measures - row.get("quality", {}).keys(),
        row.get("features_of") != network or said.features is None,
    )


def judge(
    said: Sequence[Said],
    pictures: Pictures,
    asked: Asked,
    judges: Judges,
    network: FeatureNetwork,
    of_clean: Sequence[Said | None] = (),
) -> list[Said]:
    """Adds what is lacking of images, whose pictures these are.

    Args:
        of_clean: what has been said elsewhere of the same clean pictures.
    """
    wanted = [lacking(one, asked, network.name) for one in said]
    rows, logits = [{**one.row} for one in said], [dict(one.logits) for one in said]
    for row in rows:
        for key in ("predictions", "judged_by", "certificates", "draws", "odd", "no_gradient"):
            row[key] = dict(row.get(key, {}))
    judge_draws(rows, wanted, pictures, asked, judges, of_clean)
    for name in asked.classifiers:
        chosen = [k for k, one in enumerate(wanted) if name in one.classifiers]
        if chosen:
            before = clean_results(name, [of_clean[k] if of_clean else None for k in chosen], asked)
            result = evaluate_classifier(
                name, judges[name], pictures.of(chosen), judges.device, before, judges.batch, asked.head
            )
            add_result([rows[k] for k in chosen], result, asked)
            for place, k in enumerate(chosen):
                logits[k] |= logits_of([result], place)
            if name in asked.surrogates or name == split_name(name)[0]:
                for k in chosen:
                    rows[k]["odd"][name] = judges.oddities(name, pictures.clean[chosen[:1]], asked.head)
    for k, one in enumerate(wanted):
        for name in one.gradients:
            labels = pictures.labels[k]
            alive = has_gradient(judges[name], pictures.clean[k], labels, judges.device, asked.head)
            rows[k]["no_gradient"][name] = not alive
    add_measures(rows, pictures, [k for k, one in enumerate(wanted) if one.measures], judges.device)
    features = [one.features for one in said]
    chosen = [k for k, one in enumerate(wanted) if one.features]
    if chosen:
        sides = [
            features_of(network.loaded(judges.device), side, judges.device, judges.batch).float().numpy()
            for side in pictures.of(chosen).sides
        ]
        for place, k in enumerate(chosen):
            features[k] = np.stack([side[place] for side in sides])
            rows[k]["features_of"] = network.name
    return [Said(*one) for one in zip(rows, features, logits)]


def logits_of(results: Sequence[ClassifierResult], k: int) -> dict[str, np.ndarray]:
    """Of the k-th image's pictures by classifier, where these have a sigmoid head."""
    return {
        result.name: np.stack([side.logits[k] for side in result.sides.values()])
        for result in results
        if result.after.logits is not None
    }


def judge_draws(
    rows: Sequence[dict],
    wanted: Sequence[Lacking],
    pictures: Pictures,
    asked: Asked,
    judges: Judges,
    of_clean: Sequence[Said | None],
) -> None:
    """Adds to the rows what each draw of random defences says, as far as it is lacking."""
    for name in asked.drawn:
        for number in range(asked.draws):
            chosen = [k for k, one in enumerate(wanted) if one.draws.get(name, asked.draws) <= number]
            if not chosen:
                continue
            for k in chosen:
                kept = rows[k]["draws"].get(name, {}) if number else {}
                rows[k]["draws"][name] = first_draws(kept, number)  # a copy, without what is to be said anew
            before = clean_draws(name, number, [of_clean[k] if of_clean else None for k in chosen], asked)
            result = evaluate_classifier(
                name,
                OneDraw(judges[name], number),
                pictures.of(chosen),
                judges.device,
                before,
                judges.batch,
            )
            for place, k in enumerate(chosen):
                add_draw(rows[k], result, place, asked.base)


def clean_draws(
    name: str, number: int, others: Sequence[Said | None], asked: Asked
) -> ClassifierResult | None:
    """What the draw of that number has said of clean pictures elsewhere, where it has of all of them."""
    if clean_results(name, others, asked) is None or any(drawn(one.row, name) <= number for one in others):
        return None
    before = Predictions(draw_of(one.row["draws"][name], "before", number, asked.base) for one in others)
    return ClassifierResult(name, np.zeros(len(before), int), before, before, None)


def clean_results(name: str, others: Sequence[Said | None], asked: Asked) -> ClassifierResult | None:
    """What a classifier has said of clean pictures elsewhere, where it has of all of them."""
    if any(one is None or name not in one.row.get("judged_by", {}) for one in others):
        return None
    if not all(asked.is_of(one.row, name) for one in others):
        return None
    logits = None
    if asked.head.threshold is not None:
        if not all(name in one.logits for one in others):
            return None
        logits = np.stack([one.logits[name][SIDES.index("before")] for one in others])
    certificates = [one.row["certificates"].get(name) for one in others]
    descriptions = [one.row["predictions"][name]["before"] for one in others]
    before = Predictions((Prediction.of_description(one, asked.base) for one in descriptions), logits)
    sides = None if None in certificates else ([Certificate(**one["before"]) for one in certificates], [])
    return ClassifierResult(name, np.zeros(len(before), int), before, before, None, None, sides)


def add_result(rows: Sequence[dict], result: ClassifierResult, asked: Asked) -> None:
    for k, row in enumerate(rows):
        row["predictions"][result.name] = result.described(k, asked.class_names, asked.base)
        row["judged_by"][result.name] = asked.identity(result.name)
        if result.certificates:
            row["certificates"][result.name] = {
                side: asdict(found[k]) for side, found in zip(("before", "after"), result.certificates)
            }


def add_measures(
    rows: Sequence[dict], pictures: Pictures, chosen: Sequence[int], device: torch.device
) -> None:
    """Visibility of both sides; None where it is not finite, as JSON knows no other."""
    some = pictures.of(chosen)
    for key, side in (("quality", some.adversarial), ("quality_of_reconstruction", some.reconstructed)):
        if side is None or not chosen:
            continue
        for k, clean, other in zip(chosen, some.clean, side):  # one by one, as each takes 16 MB
            values = {name: float(v) for name, (v,) in measures(clean[None], other[None], device).items()}
            rows[k][key] = {name: v if math.isfinite(v) else None for name, v in values.items()}


def row_of_results(row: dict, asked: Asked) -> dict:
    """What results.json says of an image: what the classifiers said, and how visible its change is."""
    shown = {key: value for key, value in row.items() if key not in KEPT}
    shown["predictions"] = {name: row["predictions"][name] for name in asked.classifiers}
    if asked.drawn:
        shown["draws"] = {name: first_draws(row["draws"][name], asked.draws) for name in asked.drawn}
    return shown
