"""The names of the classes, in the order of their labels, from the files in which they come.

    read_class_names(Path("CUB_200_2011/classes.txt"))      # ("Black footed Albatross", ...)

A name a line, by itself or after its number, its WordNet id or both; CUB-200-2011's classes.txt; Stanford
Cars' cars_meta.mat; a JSON or a Python dictionary from numbers to names, such as an `id2label` of
transformers or a class index of Keras; a table separated by tabs, semicolons or commas.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import DatasetError, one_line

WORDNET_ID = r"n\d{8}"
# of ImageNet-1k, short names in the order of the labels
IMAGENET_CLASSES = tuple((Path(__file__).resolve().parent / "imagenet_classes.txt").read_text().splitlines())


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names of the classes in the order of their labels, from a file in any of the forms above.

    Raises:
        DatasetError: the file is in another form, or a class has no name.
    """
    if not path.is_file():
        raise DatasetError(
            f"--captions: there is no file {str(path)!r}; give a text file with the name of a class a line"
        )
    try:
        if path.suffix.lower() == ".mat":
            names = names_of_cars(path)
        else:
            text = path.read_text(encoding="utf-8-sig").strip()
            names = (
                names_of_object(json.loads(text)) if path.suffix.lower() == ".json" else names_of_text(text)
            )
    except (
        # what json, ast and scipy raise on files that are none of theirs
        UnicodeDecodeError,
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
    return tuple(names)


def names_of_text(text: str) -> list[str]:
    """Lines, or a dictionary or list as Python or JSON writes it."""
    if text.startswith(("{", "[")):
        return names_of_object(ast.literal_eval(text))
    lines = text.splitlines()
    if lines and all(re.fullmatch(r"""\s*\d+\s*:\s*['"].*['"]\s*,?\s*""", line) for line in lines):
        return names_of_object(ast.literal_eval("{" + text + "}"))
    return names_of_lines(lines)


def names_of_lines(lines: Sequence[str]) -> list[str]:
    """A name a line, after its number or WordNet id or both where every line but perhaps a title has them."""
    cub = [re.fullmatch(r"\s*(\d+)\s+0*(\d+)\.(\S+)\s*", line) for line in lines]
    if lines and all(match and match[1] == match[2] for match in cub):
        return in_order({int(match[1]): match[3].replace("_", " ") for match in cub}, first=(1,))
    for pattern in (
        rf"\s*(?P<number>\d+)\s*[\t;,:]\s*{WORDNET_ID}\s*[\t;,:]\s*(?P<name>.+)",
        r"\s*(?P<number>\d+)\s*[\t;,:]\s*(?P<name>.+)",
        rf"\s*(?P<number>\d+)\s+{WORDNET_ID}\s+(?P<name>.+)",
        r"\s*(?P<name>.+?)\s*[\t;,]\s*(?P<number>\d+)\s*",
    ):
        matches = [re.fullmatch(pattern, line) for line in lines]
        rows = matches[1:] if lines and not matches[0] and re.match(r"\D", lines[0]) else matches
        if rows and all(rows):
            return in_order({int(match["number"]): unquoted(match["name"]) for match in rows}, first=(0, 1))
    spaced = [re.fullmatch(r"\s*(\d+)\s+(.+)", line) for line in lines]
    numbers = [int(match[1]) for match in spaced if match]
    if len(numbers) == len(lines) > 1 and numbers in (
        list(range(len(lines))),
        list(range(1, len(lines) + 1)),  # else the number may be part of a name
    ):
        return [match[2].strip() for match in spaced]
    synsets = [re.fullmatch(rf"\s*{WORDNET_ID}[\s,;:]+(.+)", line) for line in lines]
    if lines and all(synsets):
        return [unquoted(match[1]) for match in synsets]
    return [line.strip() for line in lines]


def unquoted(text: str) -> str:
    return text.strip().removesuffix(",").strip("\"' ")


def names_of_cars(path: Path) -> list[str]:
    """`class_names` of Stanford Cars' cars_meta.mat."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return [str(name) for name in loadmat(path, squeeze_me=True)["class_names"]]
    except MatReadError as error:
        raise ValueError(error) from None


def names_of_object(content: object) -> list[str]:
    """A list of names, or a mapping from numbers to them, perhaps as `id2label` of another."""
    if isinstance(content, Mapping) and "id2label" in content:
        content = content["id2label"]
    if isinstance(content, list):
        return [name_of_entry(entry) for entry in content]
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}")
    return in_order({int(key): name_of_entry(entry) for key, entry in content.items()}, first=(0,))


def name_of_entry(entry: object) -> str:
    """A name, or the last of a WordNet id and a name, as in Keras' class index."""
    if isinstance(entry, (list, tuple)) and entry and re.fullmatch(WORDNET_ID, str(entry[0])):
        entry = str(entry[-1]).replace("_", " ")
    if not isinstance(entry, str):
        raise TypeError(f"{str(entry)[:40]!r} is not the name of a class")
    return entry


def in_order(names: Mapping[int, str], first: tuple[int, ...]) -> list[str]:
    """Names by their numbers, which must begin with one of `first` and leave none out."""
    start = min(names, default=first[0])
    if start not in first or sorted(names) != list(range(start, start + len(names))):
        raise ValueError(f"its classes are not numbered from {' or '.join(map(str, first))} on, each once")
    return [names[number] for number in sorted(names)]


def spoken(name: str) -> str:
    """A name as words, whatever its case, underscores and punctuation."""
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def permutation_of(outputs: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """For each class, which output of a classifier has its name; None where some have no such output.

    A name may be one of several that an output lists, as ImageNet's do ("tench, Tinca tinca").
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(outputs):
        for part in {spoken(name), *map(spoken, name.split(","))}:
            places.setdefault(part, []).append(place)
    found = []
    for place, name in enumerate(class_names):
        candidates = {k for part in (name, *name.split(",")) for k in places.get(spoken(part), [])}
        if place in candidates:
            found.append(place)
        elif len(candidates) == 1:
            found.extend(candidates)
        else:
            return None
    return found if len(set(found)) == len(found) else None
