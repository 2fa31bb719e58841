"""Label files made at random, of images whose classes are known: each is read rightly, or refused. None is
read wrongly without a word.
"""

import json
import random
import unicodedata

import pytest

from diffattack.common.errors import InputError
from diffattack.data.classes import IMAGENET_CLASSES, ClassNames
from diffattack.data.dataset import read_dataset

OWN = ClassNames(("tench", "great white shark", "Cardigan", "cardigan", "7 up", "hen", "caf\u00e9", "drake"))
NAMES = ("img{}.png", "{:05d}.jpg", "{}.png", "my photo, {}.jpeg", "\u00e9t\u00e9 {}.png", "a.{}.b.webp")
NAMES += ("ILSVRC2012_val_{:08d}.JPEG", "x{}_7.png")


class Made:
    """Images in a folder, their classes, and a file that says them."""

    def __init__(self, folder, seed: int):
        self.chance = chance = random.Random(seed)
        self.folder, self.root = folder, folder / "photos"
        self.classes, self.base = chance.choice((OWN, IMAGENET_CLASSES)), chance.choice((0, 1))
        numbers = chance.sample(range(1, 200), chance.choice((1, 2, 3, 5, 12)))
        form, accents = chance.choice(NAMES), chance.choice(("NFC", "NFD"))
        names = [unicodedata.normalize(accents, form.format(number)) for number in numbers]
        folders = chance.choice(([""], [""], ["c1", "c2"]))
        self.files = [f"{place}/{name}".lstrip("/") for name in names for place in folders]
        for file in self.files:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).touch()
        self.labels = {file: (chance.randrange(len(self.classes)),) for file in self.files}
        self.shuffled = chance.sample(self.files, len(self.files))

    def text_of(self, label: int, kind: str) -> str:
        if kind == "id":
            return IMAGENET_CLASSES.wordnet_ids[label]
        if kind == "name":
            return self.chance.choice((str, lambda s: s.replace(" ", "_")))(self.classes[label])
        return str(label + self.base) + (".0" if kind == "float" else "")

    def write(self, name: str, lines: list[str]):
        newline, end = self.chance.choice(("\n", "\r\n", "\r")), self.chance.choice(("", "\n", "\n\n"))
        path = self.folder / name
        path.write_bytes((newline.join(lines) + end).encode(self.chance.choice(("utf-8-sig", "utf-16"))))
        return path

    def in_order(self) -> list[str]:
        items = read_dataset(self.root, self.write("order.json", [self.as_json()]), self.classes, self.base)
        return [str(item.path.relative_to(self.root)) for item in items]

    def as_json(self) -> str:
        return json.dumps({file: [label + self.base for label in self.labels[file]] for file in self.files})

    def kind_of_label(self, several: bool = False) -> str:
        """Of numbers and WordNet ids `several` may give images up to three."""
        kinds = ("number", "number", "float", "name") + ("id",) * (self.classes is IMAGENET_CLASSES)
        kind = self.chance.choice(kinds)
        if several and kind != "name" and self.chance.random() < 0.3:
            for file in self.files:
                count = self.chance.randint(1, 3)
                self.labels[file] = tuple(self.chance.sample(range(len(self.classes)), count))
        return kind


def lines_alone(made: Made):
    kind = made.kind_of_label(several=True)
    lines = [" ".join(made.text_of(k, kind) for k in made.labels[file]) for file in made.in_order()]
    return made.write("l.txt", [*made.chance.choice(([], ["# true classes", ""])), *lines])


def lines_counted(made: Made):
    kind, start, separator = made.kind_of_label(), made.chance.choice((0, 1)), made.chance.choice(" \t,;")
    labels = (made.text_of(*made.labels[file], kind) for file in made.in_order())
    return made.write("l.txt", [f"{k}{separator}{label}" for k, label in enumerate(labels, start)])


def lines_named(made: Made):
    kind, separator = made.kind_of_label(), made.chance.choice((" ", "\t", ",", ", "))
    shown = made.chance.choice((str, lambda file: file.rsplit(".", 1)[0], "val/{}".format))
    swapped = made.chance.random() < 0.2
    pairs = [(shown(file), made.text_of(*made.labels[file], kind)) for file in made.shuffled]
    return made.write("l.txt", [separator.join(pair[::-1] if swapped else pair) for pair in pairs])


def table(made: Made):
    kind, separator = made.kind_of_label(several=True), made.chance.choice(",;\t")
    image = made.chance.choice(("ImageId", "filename", "file_name", "path", " Filename "))
    label = made.chance.choice(("TrueLabel", "label", "true_label", "Label", "class"))
    shown = made.chance.choice((str, "/data/set/{}".format, lambda f: "C:\\data\\" + f.replace("/", "\\")))
    columns = made.chance.sample([image, label, "x", "URL", made.chance.choice(("id", ""))], 5)
    rows = [columns]
    for file in [*made.shuffled, *(["extra/none.png"] if made.chance.random() < 0.3 else [])]:
        classes = " ".join(made.text_of(k, kind) for k in made.labels.get(file, (0,)))
        cells = {image: shown(file), label: classes, "x": "0", "URL": "http://a/b?c"}
        rows.append([f'"{cells.get(column, len(rows))}"' for column in columns])
    return made.write("l.csv", [separator.join(row) for row in rows])


def json_rows(made: Made):
    if made.chance.random() < 0.5:
        return made.write("l.json", [made.as_json()])
    rows = [{"file_name": f, "label": made.labels[f][0] + made.base} for f in made.files]
    return made.write("l.jsonl", list(map(json.dumps, rows)))


@pytest.mark.parametrize("files", [12, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("form", (lines_alone, lines_counted, lines_named, table, json_rows))
def test_no_label_file_is_read_wrongly_without_a_word(tmp_path, form, files):
    read = 0
    for seed in range(files):
        made = Made(tmp_path / str(seed), seed)
        path = form(made)
        try:
            items = read_dataset(made.root, path, made.classes, made.base)
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith("--label_path")
            continue
        found = {str(item.path.relative_to(made.root)): item.labels for item in items}
        assert found == made.labels, f"{form.__name__} {seed}: {path.read_bytes()[:300]}"
        read += 1
    assert read >= (0 if form is lines_counted else 0.8 * files)
