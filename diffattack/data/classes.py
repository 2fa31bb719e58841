"""The classes of a data set, which of them a label means, and the files in which their names come.

IMAGENET_CLASSES[474]                                   # "cardigan", the knitwear
finder = ClassFinder(IMAGENET_CLASSES, base=1)
finder.label("475"), finder.label("cardigan")           # 474, 474
finder.label("Cardigan"), finder.label("n02113186")     # 264, 264: the dog
finder.places("CARDIGAN")                               # [264, 474]: it could be either
read_class_names(Path("CUB_200_2011/classes.txt"))      # ("Black footed Albatross", ...)
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffattack.common.errors import InputError, note, one_line

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
    others = {k: row[2] for k, row in enumerate(rows) if len(row) > 2}  # as ImageNet itself calls them
    kit = sorted(range(len(rows)), key=lambda k: int(rows[k][1]))
    return ClassNames(names, [row[0] for row in rows], others), tuple(kit)


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


class ClassFinder:
    """Finds the class that a label means.

    Args:
        base: what numbers count from; those of ImageNet's development kit from 1.
    """

    def __init__(self, class_names: Sequence[str], base: int = 1):
        self.classes = ClassNames.of(class_names)
        self.first = 1 if self.classes.numbering else base
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
        wordnet_id = re.match(rf"({WORDNET_ID})([-_]|$)", name.strip(), re.IGNORECASE)
        if wordnet_id and self._by_id:  # folders of ImageNet and Stanford Dogs begin with it
            place = self._by_id.get(wordnet_id[1].lower())
            return [] if place is None else [place]
        exact, alike, part = self._exact, self._alike, self._part
        return sorted(exact.get(composed(name)) or alike.get(spoken(name)) or part.get(spoken(name), ()))

    def label(self, text: str, where: str) -> int:
        """The class of a number, a WordNet id or a name, which stands at `where`.

        Raises:
            InputError: there is no such class, or there are several.
        """
        first, ids, places = self.first, self.classes.wordnet_ids, self.places(text)
        numbers = range(first, first + len(self.classes))
        if re.fullmatch(NUMBER, text):
            numbered = dict(zip(numbers, self.classes.numbering or range(len(self.classes))))
            place = numbered.get(int(float(text)))
            places = sorted(self._exact.get(text, set()) | ({place} - {None}))
        if len(places) == 1:
            return places[0]
        each = (f"{self.classes[k]!r} (label {k + first}{f', {ids[k]}' if ids else ''})" for k in places)
        meant = f"which may be {' or '.join(each)}; give its label or WordNet id"
        kinds = f"expected an integer from {first} to {numbers[-1]}, a WordNet id or the name of a class"
        raise InputError(f"{where} is {text[:40]!r}{', ' + meant if places else '; ' + kinds}")


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


# ---------------------------------------------------------------- files

FORMS = (
    "a text file with the name of a class a line, CUB's classes.txt, Stanford Cars' cars_meta.mat, "
    "ImageNet's meta.mat or map_clsloc.txt, or a JSON with id2label or class_to_idx"
)
ID = rf"(?P<id>{WORDNET_ID})"
# of all lines of a file
LINES = (
    r"(?P<number>\d+)\s+0*(?P=number)\.(?P<name>\S+)",  # CUB's
    rf"{ID}\s+(?P<number>\d+)\s+(?P<name>.+)",  # map_clsloc.txt
    rf"(?P<number>\d+)[\s.,:)]+{ID}[\s,:]+(?P<name>.+)",
    r"(?P<number>\d+)[\s.,:)]+(?P<name>.+)",
    r"(?P<name>.+?)[\s,]+(?P<number>\d+)",
    rf"{ID}[\s,:]+(?P<name>.+)",
)
# of files in other forms: brackets, numbers beside names, headings and items of YAML
NO_NAME = rf".*[{{}}\[\]<>]|\d+\s*[:;,\t]|\d+\s+\d|{WORDNET_ID}\b|.*,\s*\d+$|.*:$|[-*]\s|$"


def read_text(path: Path) -> str:
    """A file's text, in UTF-8 or UTF-16, its lines separated by newlines; a comment, a line that begins with
    #, is left blank.

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    if not path.is_file():
        raise ValueError("there is no file")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = content.decode(encoding, errors="replace")
    if "\0" in text or "\ufffd" in text:
        raise ValueError("is no text in UTF-8")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join("" if line.lstrip().startswith("#") else line for line in lines)


def read_class_names(path: Path) -> ClassNames:
    """The names of the classes in the order of their labels, from a file in any of the FORMS; of ImageNet's
    development kit, in the order in which classifiers have them, with the kit's `numbering`.

    Raises:
        InputError: the file is in another form, or a class has no name.
    """
    try:
        names = names_of_matlab(path) if path.suffix.lower() == ".mat" else names_of_text(read_text(path))
        if all(re.fullmatch(WORDNET_ID, name) for name in names):
            known = dict(zip(IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES))
            names = ClassNames([known.get(name, name) for name in names], names)
        wrong = [
            f"class {k} is called {name[:60]!r}" for k, name in enumerate(names, 1) if re.match(NO_NAME, name)
        ]
        if wrong or not names:
            raise ValueError(wrong[0] if wrong else "classes are not numbered from 0 or 1 on")
    except Exception as error:  # also what json, scipy and numpy raise on files that are none of theirs
        raise InputError(f"--captions: {one_line(error)} ({str(path)!r}); what is read: {FORMS}") from None
    if list(names.wordnet_ids) != [IMAGENET_CLASSES.wordnet_ids[place] for place in DEVELOPMENT_KIT]:
        return names
    note(f"{path.name} is of ImageNet's development kit: labels are its numbers, in an order of its own")
    return ClassNames(
        IMAGENET_CLASSES, IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES.other_names, DEVELOPMENT_KIT
    )


def names_of_text(text: str) -> ClassNames:
    """Of JSON, a mapping from numbers to names or back, by itself or under the name that libraries give it;
    of lines, a name each, in the order of the numbers beside them where all lines have some. Else a number is
    part of a name, as it is where most are alike without it ("grade 1").
    """
    if text.lstrip().startswith(("{", "[")):
        content = json.loads(text)
        content = next(
            (content[key] for key in ("id2label", "class_to_idx", "label2id") if key in content), content
        )
        are_numbers = all(type(value) is int for value in content.values())
        pairs = ((value, key) if are_numbers else (key, value) for key, value in content.items())
        return ClassNames(in_order((int(number), str(name)) for number, name in pairs))
    lines = [line.strip() for line in text.strip().split("\n")]
    for pattern in LINES:
        rows = [match.groupdict() for match in (re.fullmatch(pattern, line) for line in lines) if match]
        rows = in_order((int(row.get("number", k)), row) for k, row in enumerate(rows))
        names = [row["name"].replace("_", " ").strip(" \"',") for row in rows]
        if len(names) == len(lines) < 2 * len(set(names)):
            return ClassNames(names, [row["id"] for row in rows if "id" in row])
    return ClassNames(lines)


def in_order(pairs: Iterable[tuple[int, Any]]) -> list:
    """What numbers stand for, in their order, where they are all from 0 or all from 1 on; else nothing."""
    pairs = sorted(pairs, key=lambda pair: pair[0])
    numbers = [number for number, _ in pairs]
    is_counted = numbers in (list(range(k, k + len(pairs))) for k in (0, 1))
    return [meaning for _, meaning in pairs] if is_counted else []


def names_of_matlab(path: Path) -> ClassNames:
    """`class_names` of Stanford Cars' cars_meta.mat, or the `synsets` of ImageNet's meta.mat, of which those
    without children are the classes.
    """
    from scipy.io import loadmat

    content = loadmat(path, squeeze_me=True)
    if "synsets" not in content:
        return ClassNames(map(str, content["class_names"]))
    classes = content["synsets"][content["synsets"]["num_children"] == 0]
    rows = in_order(zip(classes["ILSVRC2012_ID"].tolist(), classes))
    return ClassNames([str(row["words"]) for row in rows], [str(row["WNID"]) for row in rows])
