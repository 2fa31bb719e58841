"""The classes of a data set, and which of them a name or a WordNet id means.

IMAGENET_CLASSES[474]                                   # "cardigan", the knitwear
finder = ClassFinder(IMAGENET_CLASSES)
finder.places("Cardigan")                               # [264], the dog
finder.places("CARDIGAN")                               # [264, 474]: it could be either
finder.places("n02113186")                              # [264]
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

WORDNET_ID = r"n\d{8}"


class ClassNames(tuple[str, ...]):
    """The names of the classes in the order of their labels, and what else is known of them."""

    wordnet_ids: tuple[str, ...]  # in the same order; empty where they are not known
    other_names: Mapping[int, str]  # by place, of classes that are also called otherwise
    # The class of each number in a file of labels, counted from 1, where such files count otherwise than the
    # classes are ordered; else empty.
    numbering: tuple[int, ...]

    def __new__(
        cls,
        names: Iterable[str],
        wordnet_ids: Iterable[str] = (),
        other_names: Mapping[int, str] | None = None,
        numbering: Iterable[int] = (),
    ) -> ClassNames:
        classes = super().__new__(cls, names)
        classes.wordnet_ids, classes.numbering = tuple(wordnet_ids), tuple(numbering)
        classes.other_names = dict(other_names or {})
        return classes

    def __getnewargs__(self) -> tuple:
        return tuple(self), self.wordnet_ids, self.other_names, self.numbering

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


# ---------------------------------------------------------------- names


def spoken(name: str) -> str:
    """A name as words, whatever its case, underscores and punctuation."""
    return re.sub(r"[\W_]+", " ", composed(name)).strip().casefold()


def composed(text: str) -> str:
    """A text whose letters with accents are one sign each, as most systems write them, but not file names on
    a Mac.
    """
    return unicodedata.normalize("NFC", text)


def spaced(name: str) -> str:
    """A name with spaces where file names have underscores."""
    return " ".join(composed(name).replace("_", " ").split())


def joined(name: str) -> str:
    """A name as one word, "hotdog" of "hot-dog"; not where its digits would become another number."""
    words = spoken(name)
    return words if re.search(r"\d", words) else words.replace(" ", "")


# how alike two names may be, from the strictest on
LIKENESS: tuple[Callable[[str], str], ...] = (composed, spaced, spoken, joined)


def wordnet_id_of(text: str) -> str | None:
    """The WordNet id that a name begins with, as folders of ImageNet and Stanford Dogs do."""
    match = re.match(rf"({WORDNET_ID})(?![0-9A-Za-z])", text.strip(), re.IGNORECASE)
    return match[1].lower() if match else None


class ClassFinder:
    """Finds the classes that a name can mean."""

    def __init__(self, class_names: Sequence[str]):
        self.classes = ClassNames.of(class_names)
        whole = [*enumerate(self.classes), *self.classes.other_names.items()]
        parts = [(k, part.strip()) for k, name in enumerate(self.classes) for part in name.split(",")]
        self._by_name = [
            (alike, listed((alike(name), k) for k, name in names))
            for names in (whole, parts)
            for alike in LIKENESS
        ]
        self._by_id = {wordnet_id: k for k, wordnet_id in enumerate(self.classes.wordnet_ids)}

    def places(self, name: str) -> list[int]:
        """Those of its WordNet id, else those of exactly its name, else those whose names differ in
        underscores, else in case and punctuation, else in spaces, else those of which it is one of several
        names, as in "tench, Tinca tinca"; none if it means none.
        """
        wordnet_id = wordnet_id_of(name)
        if wordnet_id and self._by_id:
            return [self._by_id[wordnet_id]] if wordnet_id in self._by_id else []
        found = (by_name[alike(name)] for alike, by_name in self._by_name if alike(name) in by_name)
        return next(found, [])

    def described(self, places: Sequence[int], base: int) -> str:
        """Classes, with what tells them apart, as labels that count from `base`."""
        ids = self.classes.wordnet_ids
        return " or ".join(
            f"{self.classes[k]!r} (label {k + base}{', ' + ids[k] if ids else ''})" for k in places
        )


def listed(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """The places of each name, each once, in order."""
    found: dict[str, set[int]] = {}
    for name, place in pairs:
        found.setdefault(name, set()).add(place)
    return {name: sorted(places) for name, places in found.items()}


# ---------------------------------------------------------------- outputs of a classifier


def permutation_of(outputs: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """For each class, which output of a classifier has its name; None where some have no such output.

    Names are matched where one output and one class are alike and no others are: exactly, then by less and
    less (`LIKENESS`), then by one of the names that an output lists, as ImageNet's do ("tench, Tinca tinca").
    Several of one name are taken in the order in which they come, see `indistinct`.
    """
    classes, theirs = ClassNames.of(class_names), ClassNames.of(outputs)
    ids = theirs.wordnet_ids or tuple(map(wordnet_id_of, theirs))
    if classes.wordnet_ids and all(ids):
        place = {wordnet_id: k for k, wordnet_id in enumerate(ids)}
        order = [place.get(wordnet_id) for wordnet_id in classes.wordnet_ids]
        return None if None in order or len(place) < len(ids) else order
    found: dict[int, int] = {}
    candidates: list[set[int]] = [set() for _ in classes]
    for ours, outs in stages(classes, theirs):
        for k, keys in enumerate(ours):
            candidates[k] |= {place for key in keys for place in outs.get(key, ())}
        while new := with_one_candidate(candidates, found):
            found |= new
    left = [k for k in range(len(classes)) if k not in found]
    for k in left:  # those of one name are a group, in which the first is the first
        places = sorted(candidates[k] - {found[other] for other in found if other not in left})
        group = [other for other in left if candidates[other] & candidates[k]]
        if not group or len(group) != len(places):
            return None
        found[k] = places[group.index(k)]
    order = [found[k] for k in range(len(classes))]
    return order if len(set(order)) == len(order) else None


def with_one_candidate(candidates: Sequence[set[int]], found: Mapping[int, int]) -> dict[int, int]:
    """Of the classes that have not been found, those that a single output is left for, which is no other's
    only one.
    """
    taken = set(found.values())
    left = {k: places - taken for k, places in enumerate(candidates) if k not in found}
    single = {k: min(places) for k, places in left.items() if len(places) == 1}
    wanted = Counter(single.values())
    return {k: place for k, place in single.items() if wanted[place] == 1}


def stages(
    classes: ClassNames, outputs: ClassNames
) -> Iterator[tuple[list[set[str]], Mapping[str, list[int]]]]:
    """From the strictest on, the names by which classes may be matched, and which outputs have each."""
    whole = [[name] for name in classes]
    parts = [[part.strip() for part in (name, *name.split(","))] for name in classes]
    others = [[classes.other_names[k]] if k in classes.other_names else [] for k in range(len(classes))]
    for names, synonyms in ((whole, False), (parts, True), (others, True)):
        for alike in LIKENESS:
            pairs = [
                (alike(part.strip()), place)
                for place, name in enumerate(outputs)
                for part in {name, *(name.split(",") if synonyms else ())}
            ]
            yield [{alike(name) for name in each} for each in names], listed(pairs)


def indistinct(outputs: Sequence[str], order: Sequence[int]) -> list[int]:
    """Of outputs in another order than the classes, those classes whose output has the name of another one,
    so that which of them is which is not known.
    """
    if list(order) == list(range(len(order))):
        return []
    count = Counter(map(composed, outputs))
    return [k for k, place in enumerate(order) if count[composed(outputs[place])] > 1]


def misplaced(outputs: Sequence[str], class_names: Sequence[str]) -> tuple[int, int] | None:
    """A class that one output alone has the name of, at another place than its own: that class and that
    output, or None.
    """
    theirs = listed((spoken(name), place) for place, name in enumerate(outputs))
    ours = listed((spoken(name), k) for k, name in enumerate(class_names))
    pairs = (
        (places[0], theirs[name][0])
        for name, places in ours.items()
        if len(places) == 1 == len(theirs.get(name, ()))
    )
    return next(((k, place) for k, place in pairs if k != place), None)
