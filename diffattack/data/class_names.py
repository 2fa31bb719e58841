"""The names of the classes, in the order of their labels, from the files in which they come.

    read_class_names(Path("CUB_200_2011/classes.txt"))      # ("Black footed Albatross", ...)

A name a line, by itself or after its number, its WordNet id or both; CUB-200-2011's classes.txt; Stanford
Cars' cars_meta.mat; the meta.mat or map_clsloc.txt of ImageNet's development kit, which numbers the classes
in an order of its own; a JSON or a Python dictionary from numbers to names, such as an `id2label` of
transformers or a class index of Keras; a table separated by tabs, semicolons or commas.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattack.common.errors import DatasetError, note, one_line
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, WORDNET_ID, ClassNames
from diffattack.data.texts import read_text

# of a list of names, and of YAML
HEADING = r"\s*(#.*|(class(es)?|labels?|names?|categor(y|ies))([ _]?names?)?\s*:?)\s*"


def read_class_names(path: Path) -> ClassNames:
    """The names of the classes in the order of their labels, from a file in any of the forms above; of
    ImageNet's development kit, in the order in which classifiers have them, with the kit's `numbering`.

    Raises:
        DatasetError: the file is in another form, or a class has no name.
    """
    if not path.is_file():
        raise DatasetError(
            f"--captions: there is no file {str(path)!r}; give a text file with the name of a class a line"
        )
    try:
        if path.suffix.lower() == ".mat":
            names = names_of_matlab(path)
        else:
            text = read_text(path).strip()
            names = (
                names_of_object(json.loads(text)) if path.suffix.lower() == ".json" else names_of_text(text)
            )
    except (
        # what json, ast and scipy raise on files that are none of theirs
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ) as error:
        raise DatasetError(
            f"--captions: {str(path)!r} cannot be read ({one_line(error, 120)}); give a text file "
            "with the name of a class a line, CUB's classes.txt, Stanford Cars' cars_meta.mat, or a JSON "
            "with id2label"
        ) from None
    if not names:
        raise DatasetError(f"--captions: {str(path)!r} is empty; expected the name of a class a line")
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DatasetError(
                f"--captions: class {number} of {str(path)!r} has no name; expected one a line"
            )
        if re.search(rf"[{{}}\[\]<>]|^\s*\d+\s*[:;\t]|^{WORDNET_ID}\b", name):
            raise DatasetError(
                f"--captions: class {number} of {str(path)!r} is called {name[:60]!r}, which is no name but "
                f"part of a file in a form that is not known here; give a text file with the name of a class "
                f"a line"
            )
    names = ClassNames.of(names)
    if is_of_development_kit(names):
        note(
            f"--captions: {str(path)!r} is of ImageNet's development kit, which numbers the classes in an "
            f"order of its own: labels are read as its numbers, and shown in the order that classifiers "
            f"have, which is that of the WordNet ids"
        )
        return ClassNames(
            IMAGENET_CLASSES, IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES.other_names, DEVELOPMENT_KIT
        )
    return names


def is_of_development_kit(names: ClassNames) -> bool:
    """Whether they are in the order of the ground truth of ILSVRC 2012."""
    kit = tuple(IMAGENET_CLASSES.wordnet_ids[place] for place in DEVELOPMENT_KIT)
    return names.wordnet_ids == kit


def names_of_text(text: str) -> Sequence[str]:
    """Lines, or a dictionary or list as Python or JSON writes it."""
    if text.startswith(("{", "[")):
        return names_of_object(ast.literal_eval(text))
    lines = text.split("\n") if text else []
    if len(lines) > 1 and re.fullmatch(HEADING, lines[0], re.IGNORECASE):
        note(f"--captions: the first line, {lines[0].strip()[:40]!r}, is taken for a heading")
        lines = lines[1:]
    if lines and all(re.fullmatch(r"""\s*\d+\s*:\s*['"].*['"]\s*,?\s*""", line) for line in lines):
        return names_of_object(ast.literal_eval("{" + text + "}"))
    return names_of_lines(lines)


def names_of_lines(lines: Sequence[str]) -> Sequence[str]:
    """A name a line, after its number or WordNet id or both where every line but perhaps a title has them."""
    if all(re.match(r"/\w/", line) for line in lines):  # of Places365, by the first letter
        lines = [line[3:].replace("_", " ") for line in lines]
    cub = [re.fullmatch(r"\s*(\d+)\s+0*(\d+)\.(\S+)\s*", line) for line in lines]
    if lines and all(match and match[1] == match[2] for match in cub):
        return in_order({int(match[1]): match[3].replace("_", " ") for match in cub}, first=(1,))
    for pattern in (
        rf"\s*(?P<number>\d+)\s*[\t;,:]\s*(?P<id>{WORDNET_ID})\s*[\t;,:]\s*(?P<name>.+)",
        rf"\s*(?P<id>{WORDNET_ID})[\s,;:]+(?P<number>\d+)[\s,;:]+(?P<name>.+)",  # map_clsloc.txt
        r"\s*(?P<number>\d+)\s*[\t;,:]\s*(?P<name>.+)",
        rf"\s*(?P<number>\d+)\s+(?P<id>{WORDNET_ID})\s+(?P<name>.+)",
        r"\s*(?P<name>.+?)\s*[\t;,]\s*(?P<number>\d+)\s*",
    ):
        matches = [re.fullmatch(pattern, line) for line in lines]
        rows = matches[1:] if lines and not matches[0] and re.match(r"\D", lines[0]) else matches
        if rows and all(rows):
            return of_rows([match.groupdict() for match in rows])
    for pattern in (r"\s*(?P<number>\d+)\s*[.):-]?\s+(?P<name>.+)", r"\s*(?P<name>.+?)\s+(?P<number>\d+)\s*"):
        spaced = [re.fullmatch(pattern, line) for line in lines]
        numbers = sorted(int(match["number"]) for match in spaced if match)
        names = {match["name"].strip() for match in spaced if match}
        if len(numbers) == len(names) == len(lines) > 1 and numbers in (
            list(range(len(lines))),
            list(range(1, len(lines) + 1)),  # else the number may be part of a name
        ):
            return of_rows([match.groupdict() for match in spaced])
    synsets = [re.fullmatch(rf"\s*({WORDNET_ID})[\s,;:]+(.+)", line) for line in lines]
    if lines and all(synsets):
        return ClassNames([unquoted(match[2]) for match in synsets], [match[1] for match in synsets])
    if lines and all(re.fullmatch(WORDNET_ID, line.strip()) for line in lines):
        known = dict(zip(IMAGENET_CLASSES.wordnet_ids, IMAGENET_CLASSES))
        ids = [line.strip() for line in lines]
        return ClassNames([known.get(wordnet_id, wordnet_id) for wordnet_id in ids], ids)
    listed = [re.fullmatch(r"\s*[-*]\s+(.+)", line) for line in lines]
    if lines and all(listed):  # of YAML
        return [unquoted(match[1]) for match in listed]
    return [line.strip() for line in lines]


def of_rows(rows: Sequence[Mapping[str, str]]) -> ClassNames:
    """The classes of rows with a `number` and a `name`, and perhaps a WordNet `id`."""
    by_number = {int(row["number"]): row for row in rows}
    if len(by_number) < len(rows):
        raise ValueError("two of its classes have one number")
    names = in_order({number: unquoted(row["name"]) for number, row in by_number.items()}, first=(0, 1))
    if "id" not in rows[0]:
        return ClassNames(names)
    return ClassNames(
        [name.replace("_", " ") for name in names],
        in_order({number: row["id"] for number, row in by_number.items()}, first=(0, 1)),
    )


def unquoted(text: str) -> str:
    return text.strip().removesuffix(",").strip("\"' ")


def names_of_matlab(path: Path) -> Sequence[str]:
    """`class_names` of Stanford Cars' cars_meta.mat, or the `synsets` of ImageNet's meta.mat, of which those
    without children are the classes.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, squeeze_me=True)
    except MatReadError as error:
        raise ValueError(error) from None
    if "synsets" not in content:
        return [str(name) for name in content["class_names"]]
    synsets = content["synsets"]
    columns = {str(name): synsets[name].tolist() for name in synsets.dtype.names}
    number = next(column for name, column in columns.items() if name.endswith("_ID"))  # ILSVRC2012_ID
    return of_rows(
        [
            {"number": number[k], "id": str(wordnet_id), "name": str(columns["words"][k])}
            for k, wordnet_id in enumerate(columns["WNID"])
            if columns["num_children"][k] == 0
        ]
    )


def names_of_object(content: object) -> Sequence[str]:
    """A list of names, a mapping from numbers to them or from them to numbers, perhaps as `id2label` of
    another; or the categories of COCO in the order of their ids, which leave numbers out.
    """
    for key in ("categories", "id2label", "label2id", "names"):
        if isinstance(content, Mapping) and isinstance(content.get(key), (list, Mapping)):
            content = content[key]
    if isinstance(content, list) and content and all(isinstance(one, Mapping) for one in content):
        return [str(one["name"]) for one in sorted(content, key=lambda one: one["id"])]
    if isinstance(content, list):
        return of_entries(content)
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}")
    if content and all(type(value) is int for value in content.values()):
        return of_entries(in_order({number: name for name, number in content.items()}, first=(0, 1)))
    return of_entries(in_order({int(key): entry for key, entry in content.items()}, first=(0, 1)))


def of_entries(entries: Sequence[object]) -> ClassNames:
    """Of names, or of pairs of a WordNet id and a name."""
    names = [name_of_entry(entry) for entry in entries]
    has_ids = all(isinstance(entry, (list, tuple)) for entry in entries)
    return ClassNames(names, [entry[0] for entry in entries] if has_ids else ())


def name_of_entry(entry: object) -> str:
    """A name, or the last of a WordNet id and a name, as in Keras' class index."""
    if isinstance(entry, (list, tuple)) and entry and re.fullmatch(WORDNET_ID, str(entry[0])):
        entry = str(entry[-1]).replace("_", " ")
    if not isinstance(entry, str):
        raise TypeError(f"{str(entry)[:40]!r} is not the name of a class")
    return entry


def in_order(names: Mapping[int, Any], first: tuple[int, ...]) -> list:
    """What numbers stand for, in their order, which must begin with one of `first` and leave none out."""
    start = min(names, default=first[0])
    if start not in first or sorted(names) != list(range(start, start + len(names))):
        raise ValueError(f"its classes are not numbered from {' or '.join(map(str, first))} on, each once")
    return [names[number] for number in sorted(names)]
