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
IMAGENET = IMAGENET_CLASSES


def names_of_images(chance: random.Random, count: int) -> list[str]:
    """File names without folders, each once."""
    kind = chance.choice(("img", "padded", "numbers", "spaces", "accents", "val", "dots", "any"))
    numbers = chance.sample(range(1, 200), count)
    made = {
        "img": lambda n: f"img{n}.png",
        "padded": lambda n: f"{n:05d}.jpg",
        "numbers": lambda n: f"{n}.png",
        "spaces": lambda n: f"my photo, {n}.jpeg",
        "accents": lambda n: unicodedata.normalize(chance.choice(("NFC", "NFD")), f"\u00e9t\u00e9 {n}.png"),
        "val": lambda n: f"ILSVRC2012_val_{n:08d}.JPEG",
        "dots": lambda n: f"a.{n}.b.webp",
        "any": lambda n: f"{chance.choice('abcxyz')}{n}_{chance.randrange(9)}.png",
    }[kind]
    return [made(n) for n in numbers]


class Made:
    """Images in a folder, their classes, and a file that says them."""

    def __init__(self, folder, seed: int):
        self.chance = chance = random.Random(seed)
        self.folder, self.root = folder, folder / "photos"
        self.classes = chance.choice((OWN, IMAGENET))
        self.base = chance.choice((0, 1))
        count = chance.choice((1, 2, 3, 5, 12))
        names = names_of_images(chance, count)
        folders = chance.choice(([""], [""], ["c1", "c2"]))
        self.files = [f"{place}/{name}".lstrip("/") for name in names for place in folders]
        for file in self.files:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).touch()
        self.labels = {file: (chance.randrange(len(self.classes)),) for file in self.files}

    def text_of(self, label: int, kind: str) -> str:
        if kind == "id":
            return IMAGENET.wordnet_ids[label]
        if kind == "name":
            return self.chance.choice((str, lambda s: s.replace(" ", "_")))(self.classes[label])
        return str(label + self.base) + (".0" if kind == "float" else "")

    def write(self, name: str, text: str):
        chance = self.chance
        text = text.replace("\n", chance.choice(("\n", "\r\n", "\r"))) + chance.choice(("", "\n", "\n\n"))
        path = self.folder / name
        path.write_bytes(text.encode(chance.choice(("utf-8", "utf-8-sig", "utf-16"))))
        return path

    def in_order(self) -> list[str]:
        items = read_dataset(self.root, self.write("order.json", self.as_json()), self.classes, self.base)
        return [str(item.path.relative_to(self.root)) for item in items]

    def as_json(self) -> str:
        return json.dumps({file: [label + self.base for label in self.labels[file]] for file in self.files})

    def kind_of_label(self, several: bool = False) -> str:
        """Of numbers and WordNet ids `several` may give images up to three."""
        kinds = ("number", "number", "float", "name") + ("id",) * (self.classes is IMAGENET)
        kind = self.chance.choice(kinds)
        if several and kind != "name" and self.chance.random() < 0.3:
            for file in self.files:
                count = self.chance.randint(1, 3)
                self.labels[file] = tuple(self.chance.sample(range(len(self.classes)), count))
        return kind


def lines_alone(made: Made):
    kind = made.kind_of_label(several=True)
    separator = made.chance.choice((" ", "  "))
    lines = [separator.join(made.text_of(k, kind) for k in made.labels[file]) for file in made.in_order()]
    heading = made.chance.choice(([], [], ["# true classes", ""]))
    return made.write("l.txt", "\n".join([*heading, *lines]))


def lines_counted(made: Made):
    kind, start = made.kind_of_label(), made.chance.choice((0, 1))
    rows = [(k, made.text_of(*made.labels[file], kind)) for k, file in enumerate(made.in_order(), start)]
    separator = made.chance.choice((" ", "\t", ",", ";"))
    return made.write("l.txt", "\n".join(f"{k}{separator}{label}" for k, label in rows))


def lines_named(made: Made):
    kind, files = made.kind_of_label(), made.chance.sample(made.files, len(made.files))
    separator = made.chance.choice((" ", "\t", ",", ", "))
    shown = made.chance.choice((str, str, lambda file: file.rsplit(".", 1)[0], lambda file: f"val/{file}"))
    swapped = made.chance.random() < 0.2
    pairs = [(shown(file), made.text_of(*made.labels[file], kind)) for file in files]
    lines = [separator.join(reversed(pair) if swapped else pair) for pair in pairs]
    return made.write(made.chance.choice(("l.txt", "l.csv")), "\n".join(lines))


def table(made: Made):
    kind = made.kind_of_label(several=True)
    files = made.chance.sample(made.files, len(made.files))
    separator = made.chance.choice((",", ";", "\t"))
    image = made.chance.choice(("ImageId", "filename", "file_name", "path", " Filename "))
    label = made.chance.choice(("TrueLabel", "label", "true_label", "Label", "class"))
    windows = "C:\\data\\{}".format
    shown = made.chance.choice((str, str, "/data/set/{}".format, lambda f: windows(f.replace("/", "\\"))))
    columns = made.chance.sample([image, label, "x", "URL", *made.chance.choice(([], ["id"], [""]))], 4)
    columns += {image, label}.difference(columns)
    rows = [columns]
    for file in [*files, *(["extra/none.png"] if made.chance.random() < 0.3 else [])]:
        classes = made.labels.get(file, (0,))
        cells = {
            image: shown(file),
            label: " ".join(made.text_of(k, kind) for k in classes),
            "x": "0",
            "URL": "http://a/b?c",
            "id": str(len(rows)),
            "": str(len(rows) - 1),
        }
        rows.append([f'"{cells[c]}"' for c in columns])
    return made.write("l.csv", "\n".join(separator.join(row) for row in rows))


def json_rows(made: Made):
    if made.chance.random() < 0.5:
        return made.write("l.json", made.as_json())
    rows = [{"file_name": f, "label": made.labels[f][0] + made.base} for f in made.files]
    return made.write("l.jsonl", "\n".join(map(json.dumps, rows)))


FORMS = (lines_alone, lines_counted, lines_named, table, json_rows)


@pytest.mark.parametrize("files", [12, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("form", FORMS)
def test_no_label_file_is_read_wrongly_without_a_word(tmp_path, form, files):
    read = 0
    for seed in range(files):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = Made(folder, seed)
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
