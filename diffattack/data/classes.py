"""The classes of a data set, and which of them a label means.

IMAGENET_CLASSES[474]                                   # "cardigan", the knitwear
finder = ClassFinder(IMAGENET_CLASSES, base=1)
finder.label("475"), finder.label("cardigan")           # 474, 474
finder.label("Cardigan"), finder.label("n02113186")     # 264, 264: the dog
finder.places("CARDIGAN")                               # [264, 474]: it could be either
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WORDNET_ID = r"n\d{8}"
NUMBER = r"[+-]?\d+(\.0+)?"  # pandas writes integers beside gaps as 3.0


class ClassNames(tuple[str, ...]):
    """The names of the classes in the order of their labels, and what else is known of them.

    Args:
        wordnet_ids: in the same order; empty where they are not known.
        other_names: by place, of classes that are also called otherwise.
        numbering: the class of each number in a file of labels, counted from 1, where such files count
            otherwise than the classes are ordered; else empty.
    """

    def __new__(
        cls, names: Iterable[str], wordnet_ids: Iterable[str] = (), other_names: Any = (), numbering: Any = ()
    ) -> ClassNames:
        classes = super().__new__(cls, names)
        classes.wordnet_ids, classes.numbering = tuple(wordnet_ids), tuple(numbering)
        classes.other_names = dict(other_names)
        return classes

    @classmethod
    def of(cls, names: Sequence[str]) -> ClassNames:
        """Names of which nothing else is known, unless they are of this kind already."""
        return names if isinstance(names, ClassNames) else cls(names)


def _imagenet() -> tuple[ClassNames, tuple[int, ...]]:
    """ImageNet-1k's short names, sorted by WordNet id as all its classifiers count them; and, of the
    development kit of ILSVRC 2012, whose ground truth counts in an order of its own, the class of each
    number.
    """
    folder = Path(__file__).resolve().parent
    names = (folder / "imagenet_classes.txt").read_text().splitlines()
    rows = [line.split(" ", 2) for line in (folder / "imagenet_ids.txt").read_text().splitlines()]
    place = {int(row[1]): k for k, row in enumerate(rows)}
    others = {k: row[2] for k, row in enumerate(rows) if len(row) > 2}  # as ImageNet itself calls them
    return ClassNames(names, [row[0] for row in rows], others), tuple(place[n] for n in sorted(place))


IMAGENET_CLASSES, DEVELOPMENT_KIT = _imagenet()


def composed(text: str) -> str:
    """A text whose letters with accents are one sign each, as most systems write them, but not file names on
    a Mac.
    """
    return unicodedata.normalize("NFC", text)


def spoken(name: str) -> str:
    """A name without case and punctuation, "hotdog" of "Hot-dog"; with digits as words, which would else make
    other numbers.
    """
    words = re.sub(r"[\W_]+", " ", composed(name)).strip().casefold()
    return words if re.search(r"\d", words) else words.replace(" ", "")


def wordnet_id_of(text: str) -> str | None:
    """The WordNet id that a name begins with, as folders of ImageNet and Stanford Dogs do."""
    match = re.match(rf"({WORDNET_ID})([-_]|$)", text.strip(), re.IGNORECASE)
    return match[1].lower() if match else None


class ClassFinder:
    """Finds the class that a label means.

    Args:
        base: what numbers count from; those of ImageNet's development kit from 1.
    """

    def __init__(self, class_names: Sequence[str], base: int = 1):
        self.classes = ClassNames.of(class_names)
        self.first = 1 if self.classes.numbering else base
        self.last = self.first + len(self.classes) - 1
        self._by_id = {wordnet_id: k for k, wordnet_id in enumerate(self.classes.wordnet_ids)}
        # exactly; but for case and punctuation; and as one of several names
        self._exact, self._alike, self._part = (defaultdict(set) for _ in range(3))
        for k, name in (*enumerate(self.classes), *self.classes.other_names.items()):
            self._exact[composed(name)].add(k)
            self._alike[spoken(name)].add(k)
            for part in name.split(","):
                self._part[spoken(part)].add(k)

    def places(self, name: str) -> list[int]:
        """Those of its WordNet id, else of exactly its name, else of those that differ in case and
        punctuation, else of those that have it among several names, as "tench, Tinca tinca"; or none.
        """
        wordnet_id = wordnet_id_of(name)
        if wordnet_id and self._by_id:
            return [self._by_id[wordnet_id]] if wordnet_id in self._by_id else []
        exact, alike, part = self._exact, self._alike, self._part
        return sorted(exact.get(composed(name)) or alike.get(spoken(name)) or part.get(spoken(name), ()))

    def numbered(self, number: int) -> int:
        """The class of a label that is a number from `first` to `last`."""
        return self.classes.numbering[number - 1] if self.classes.numbering else number - self.first

    def label(self, text: str) -> int:
        """The class of a number, a WordNet id or a name.

        Raises:
            ValueError: there is no such class, or there are several.
        """
        places, span, is_number = (
            self.places(text),
            f"{self.first} to {self.last}",
            re.fullmatch(NUMBER, text),
        )
        number = int(text.split(".")[0]) if is_number else self.first
        if is_number:
            is_there = self.first <= number <= self.last
            places = sorted({self.numbered(number), *self._exact.get(text, ())}) if is_there else []
        if len(places) == 1:
            return places[0]
        ids = [f", {wordnet_id}" for wordnet_id in self.classes.wordnet_ids] or [""] * len(self.classes)
        each = " or ".join(f"{self.classes[k]!r} (label {k + self.first}{ids[k]})" for k in places)
        problem = f"is {text[:40]!r}; expected an integer from {span}, a WordNet id or the name of a class"
        if places:
            problem = f"is {text[:40]!r}, which may be {each}; give its label or WordNet id"
        elif is_number:
            problem = f"is {number}; labels count from {self.first}, so expected {span}"
        raise ValueError(problem)


def permutation_of(outputs: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """For each class, which output of a classifier has its name or WordNet id; None where the outputs' names
    are no permutation of the classes'. Outputs whose names fit the classes as they stand stay so.
    """
    finder, own = ClassFinder(class_names), {name: [k] for k, name in enumerate(class_names)}
    theirs = (finder.classes.wordnet_ids and ClassNames.of(outputs).wordnet_ids) or outputs
    exact = [own.get(name, []) for name in theirs]
    for found in exact, [finder.places(name) or finder.places(name.split(",")[0]) for name in theirs]:
        if len(found) == len(class_names) and all(k in places for k, places in enumerate(found)):
            return list(range(len(found)))
        place = {places[0]: k for k, places in enumerate(found) if len(places) == 1}
        if len(place) == len(outputs) == len(class_names):
            return [place[k] for k in range(len(class_names))]
    return None
