"""The names of the classes, in the order of their labels, from the files in which they come.

    read_class_names(Path("CUB_200_2011/classes.txt"))      # ("Black footed Albatross", ...)

A name a line, by itself or with its number or WordNet id, as CUB-200-2011's classes.txt; the meta.mat or
map_clsloc.txt of ImageNet's development kit, which numbers the classes in an order of its own; Stanford Cars'
cars_meta.mat; a JSON with an `id2label`, as the config.json of a model of transformers, or a `class_to_idx`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattack.common.errors import DatasetError, note, one_line
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, WORDNET_ID, ClassNames
from diffattack.data.texts import read_text

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
NO_NAME = rf".*[{{}}\[\]<>]|\d+\s*[:;,\t]|\d+\s+\d|{WORDNET_ID}\b|.*,\s*\d+$|.*:$|[-*]\s"


def read_class_names(path: Path) -> ClassNames:
    """The names of the classes in the order of their labels, from a file in any of the forms above; of
    ImageNet's development kit, in the order in which classifiers have them, with the kit's `numbering`.

    Raises:
        DatasetError: the file is in another form, or a class has no name.
    """
    read = names_of_matlab if path.suffix.lower() == ".mat" else names_of_text
    try:
        names = read(path)
        if names and all(re.fullmatch(WORDNET_ID, name) for name in names):
            known = dict(zip(IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES))
            names = ClassNames([known.get(name, name) for name in names], names)
        for number, name in enumerate(names, 1):
            if not name or re.match(NO_NAME, name):
                what = f"is called {name[:60]!r}" if name else "has no name"
                raise ValueError(f"class {number} of {str(path)!r} {what}; give {FORMS}")
    except ValueError as error:
        raise DatasetError(f"--captions: {error}") from None
    kit = [IMAGENET_CLASSES.wordnet_ids[place] for place in DEVELOPMENT_KIT]
    if list(names.wordnet_ids) != kit:
        return names
    note(f"{path.name} is of ImageNet's development kit: labels are its numbers, in an order of its own")
    return ClassNames(
        IMAGENET_CLASSES, IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES.other_names, DEVELOPMENT_KIT
    )


def names_of_text(path: Path) -> ClassNames:
    """Of JSON, a mapping from numbers to names or back, by itself or under the name that libraries give it;
    of lines, the names as `names_of_lines` has them.
    """
    text = read_text(path, FORMS).strip()
    if not text.startswith(("{", "[")):
        return names_of_lines([line.strip() for line in text.split("\n")])
    try:
        content = json.loads(text)
        for key in ("id2label", "class_to_idx", "label2id"):
            content = content[key] if isinstance(content.get(key), dict) else content
        pairs = content.items()
        if all(type(number) is int for number in content.values()):
            pairs = [(number, name) for name, number in pairs]
        names = in_order({int(number): name for number, name in pairs})
    except (ValueError, AttributeError, RecursionError):
        names, content = [], {}
    if len(names) < max(1, len(content)) or not all(isinstance(name, str) for name in names):
        problem = "cannot be read, or does not number its classes from 0 or 1 on"
        raise ValueError(f"{str(path)!r} {problem}; give {FORMS}")
    return ClassNames(names)


def names_of_lines(lines: Sequence[str]) -> ClassNames:
    """A name a line, in the order of the numbers beside them where all lines have some: from 0 or 1 on, each
    once. Else a number is part of a name, as it is where most are alike without it ("grade 1").
    """
    for pattern in LINES:
        rows = [match.groupdict() for match in (re.fullmatch(pattern, line) for line in lines) if match]
        by_number = {int(row.get("number", k)): row for k, row in enumerate(rows)}
        names = [row["name"].replace("_", " ").strip(" \"',") for row in in_order(by_number)]
        if len(names) == len(lines) < 2 * len(set(names)):
            return ClassNames(names, [row["id"] for row in in_order(by_number) if "id" in row])
    return ClassNames(lines)


def in_order(by_number: Mapping[int, Any]) -> list:
    """What numbers stand for, in their order, where they are all from 0 or all from 1 on; else nothing."""
    is_counted = sorted(by_number) in (list(range(k, k + len(by_number))) for k in (0, 1))
    return [by_number[number] for number in sorted(by_number)] if is_counted else []


def names_of_matlab(path: Path) -> ClassNames:
    """`class_names` of Stanford Cars' cars_meta.mat, or the `synsets` of ImageNet's meta.mat, of which those
    without children are the classes.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, squeeze_me=True)
        if "synsets" not in content:
            return ClassNames(map(str, content["class_names"]))
        synsets = content["synsets"]
        classes = synsets[synsets["num_children"] == 0]
        number = next(name for name in synsets.dtype.names if name.endswith("_ID"))  # ILSVRC2012_ID
        rows = in_order(dict(zip(classes[number].tolist(), classes)))
        return ClassNames([str(row["words"]) for row in rows], [str(row["WNID"]) for row in rows])
    # what scipy raises on files that are none of its own, and numpy on other contents
    except (MatReadError, OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({one_line(error)}); give {FORMS}") from None
