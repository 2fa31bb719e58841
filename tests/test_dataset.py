import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from diffattack.common.errors import InputError
from diffattack.data.classes import IMAGENET_CLASSES, permutation_of, read_class_names
from diffattack.data.dataset import list_images, read_dataset

CAPTIONS = ("black footed albatross", "laysan albatross", "sooty albatross")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("img10.png", "img2.png", "img1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def written(folder, name, text, encoding="utf-8"):
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


# ---------------------------------------------------------------- captions, each in the form it comes in


def test_captions_a_line(tmp_path):
    assert read_class_names(written(tmp_path, "c.txt", "red cat\nblue dog\n")) == ("red cat", "blue dog")


def test_captions_of_cub(tmp_path):
    text = "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n12 012.Yellow_headed_Blackbird\n"
    with pytest.raises(InputError, match="class 1 .* is called '1 001"):
        read_class_names(written(tmp_path, "classes.txt", text))
    assert read_class_names(written(tmp_path, "classes.txt", text.replace("12 012", "3 003"))) == (
        "Black footed Albatross",
        "Laysan Albatross",
        "Yellow headed Blackbird",
    )


def test_captions_of_stanford_cars(tmp_path):
    names = np.empty((1, 3), object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    savemat(tmp_path / "cars_meta.mat", {"class_names": names})
    assert read_class_names(tmp_path / "cars_meta.mat") == tuple(names[0])


@pytest.mark.parametrize(
    "content",
    [
        {"0": "a", "2": "c", "1": "b"},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "model_type": "vit"},
    ],
)
def test_captions_of_hugging_face(tmp_path, content):
    assert read_class_names(written(tmp_path, "config.json", json.dumps(content))) == ("a", "b", "c")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.json", "{", "cannot be read"),
        ("c.json", '{"0": "a", "2": "c"}', "does not number its classes from 0 or 1 on"),
        ("c.mat", "no mat", "cannot be read"),
        ("c.txt", "a\n\nb\n", "class 2 .* has no name"),
    ],
)
def test_captions_that_cannot_be_used_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=f"--captions.*{message}"):
        read_class_names(written(tmp_path, name, content))
    with pytest.raises(InputError, match="--captions: there is no file"):
        read_class_names(tmp_path / "none.txt")


# ---------------------------------------------------------------- labels


def labels_of(items):
    return {item.path.name: item.labels for item in items}


@pytest.mark.parametrize("base", [0, 1])
def test_labels_a_line_in_natural_order(photos, tmp_path, base):
    items = read_dataset(
        photos,
        written(tmp_path, "labels.txt", f"{base}\n{base + 1}\n{base + 2} {base}\n", "utf-8-sig"),
        CAPTIONS,
        base,
    )
    assert [item.index for item in items] == [0, 1, 2]
    assert labels_of(items) == {"img1.png": (0,), "img2.png": (1,), "img10.png": (2, 0)}


def test_the_table_of_nips_2017(photos, tmp_path):
    table = written(
        tmp_path,
        "dev.csv",
        "ImageId,URL,x1,y1,x2,y2,TrueLabel,TargetClass,OriginalLandingURL\n"
        'img10,"http://a,b",0,0,1,1,3,1,u\nimg2,h,0,0,1,1,2,3,u\n'
        "other,h,0,0,1,1,2,3,u\nimg1,h,0,0,1,1,1,2,u\n",
    )
    labels = {"img1.png": (0,), "img2.png": (1,), "img10.png": (2,)}
    items, targeted = (
        read_dataset(photos, table, CAPTIONS),
        read_dataset(photos, table, CAPTIONS, target="TargetClass"),
    )
    assert labels_of(items) == labels_of(targeted) == labels
    assert [item.target for item in items] == [None] * 3 and [item.target for item in targeted] == [1, 2, 0]


def test_a_table_by_file_name(photos, tmp_path):
    items = read_dataset(
        photos,
        written(tmp_path, "l.csv", "filename,label\nimg2.png,1 2\nimg1.png,2\nimg10.png,0\n"),
        CAPTIONS,
        label_base=0,
    )
    assert (
        labels_of(items) == {"img1.png": (2,), "img2.png": (1, 2), "img10.png": (0,)}
        and items[0].target is None
    )


@pytest.mark.parametrize(
    "names, numbers",
    [
        (("sooty_albatross", "Laysan Albatross"), (2, 1)),  # by their names
        (("n3", "n1", "n2"), (2, 0, 1)),
    ],
)  # one for each class, in torchvision's order
def test_a_folder_a_class(tmp_path, names, numbers):
    for name in names:
        (tmp_path / "root" / name).mkdir(parents=True)
        for k in (10, 9):
            Image.new("RGB", (8, 8)).save(tmp_path / "root" / name / f"{name}{k}.png")
    items = read_dataset(tmp_path / "root", None, CAPTIONS)
    assert {item.path.parent.name: item.labels for item in items} == {
        name: (number,) for name, number in zip(names, numbers)
    }
    assert [item.path.name for item in items] == [f"{name}{k}.png" for name in sorted(names) for k in (9, 10)]


def test_folders_that_fit_no_class_are_named(tmp_path):
    (tmp_path / "root/ostrich").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "root/ostrich/a.png")
    with pytest.raises(
        InputError, match="1 folders but there are 3 classes, and no class is called 'ostrich'"
    ):
        read_dataset(tmp_path / "root", None, CAPTIONS)
    assert read_dataset(tmp_path / "root", None, IMAGENET_CLASSES)[0].labels == (
        IMAGENET_CLASSES.index("ostrich"),
    )


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("l.txt", "1\n2\n", {}, "has 2 labels but --images_root has 3 images"),
        ("l.txt", "1\n4\n1\n", {}, "line 2 .* is 4; labels count from 1, so expected 1 to 3"),
        ("l.txt", "0\n3\n1\n", {"label_base": 0}, "line 2 .* is 3; labels count from 0, so expected 0 to 2"),
        ("l.txt", "1\nx\n1\n", {}, "line 2 .* is 'x'; expected an integer"),
        ("l.txt", "1\n\n1\n", {}, "has 2 labels but --images_root has 3 images"),
        ("l.csv", "filename,label\nimg1.png,1\nimg2.png,\nimg10.png,2\n", {}, "line 3 .* has no label"),
        ("l.csv", "filename,label\nimg1.png,1\n", {}, "has no row for img2.png and 1 more"),
        (
            "l.csv",
            "photo,label\nimg1.png,1\n",
            {},
            "has the columns photo, label; expected one of the image",
        ),
        ("l.csv", "filename,label\nimg1.png,1\nimg2.png,9\nimg10.png,1\n", {}, "line 3 .* is 9"),
        ("l.csv", "filename,label\nimg1.png,1\nimg2.png,2,3\nimg10.png,1\n", {}, "no cell without a title"),
        ("l.txt", "1\n2\n3\n", {"target": 4}, "--target_label is 4; labels count from 1, so expected 1 to 3"),
        (
            "l.csv",
            "filename,label,TargetClass\nimg1.png,1,2\nimg2.png,1,\nimg10.png,1,2\n",
            {"target": "TargetClass"},
            "img2.png has no TargetClass",
        ),
        ("l.txt", "1\n2\n3\n", {"target": 2}, "target of img2.png, 2, is its own label"),
    ],
)
def test_labels_that_cannot_be_used_are_named(photos, tmp_path, name, content, options, message):
    with pytest.raises(InputError, match=message):
        read_dataset(photos, written(tmp_path, name, content), CAPTIONS, **options)


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(InputError, match="no image in"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        list_images(tmp_path / "none")


# ---------------------------------------------------------------- as they are found in the field

NAMES = ("tench", "great white shark", "hen")


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.txt", "n01440764 tench\nn01484850 great white shark\nn01514859 hen\n"),
        ("c.txt", "0 n01440764 tench\n1 n01484850 great white shark\n2 n01514859 hen\n"),
        ("c.txt", "1\ttench\n2\tgreat white shark\n3\then\n"),
        ("c.txt", "0: tench\n1: great white shark\n2: hen\n"),
        ("c.txt", "0 tench\n1 great white shark\n2 hen\n"),
        ("c.csv", "tench,0\ngreat white shark,1\nhen,2\n"),
        ("c.txt", "tench\ngreat white shark\nhen\n"),
    ],
)
def test_class_names_in_every_form_that_is_found(tmp_path, name, content):
    assert read_class_names(written(tmp_path, name, content)) == NAMES


def test_numbers_that_are_part_of_a_name_stay(tmp_path):
    text = "3 wheeler\n7 up\n"
    assert read_class_names(written(tmp_path, "c.txt", text)) == ("3 wheeler", "7 up")


def test_synonyms_stay_with_their_class(tmp_path):
    text = "n01440764 tench, Tinca tinca\nn01484850 great white shark, white shark\n"
    assert read_class_names(written(tmp_path, "synsets.txt", text)) == (
        "tench, Tinca tinca",
        "great white shark, white shark",
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.txt", "967: 'espresso',\ncup\n"),
        ("c.txt", "{0: 'tench',\n 1: 'hen'}"),
        ("c.json", '["tench", "hen"]'),
        ("c.json", '{"0": ["n01440764", "tench"], "1": ["n01514859", "hen"]}'),
        ("c.json", '{"categories": [{"id": 1, "name": "hen"}]}'),
        ("c.csv", "id;name\n0;tench\n1;hen\n"),
        ("c.csv", "name,id\ntench,0\nhen,1\n"),
        ("c.yaml", "names:\n- tench\n- hen\n"),
        ("c.txt", "[{'name': 'cat'}, {'name': 'dog'}]"),
        ("c.txt", "{0: open('x')}"),
        ("c.txt", "tench\nn01484850 great white shark\n"),
        ("c.txt", "<class>cat</class>\n<class>dog</class>\n"),
        ("c.txt", "0;cat\n2;dog\n"),
        ("c.json", '{"cat": 0, "dog": 2}'),
        ("c.json", '{"cat": 0, "dog": 0}'),
        ("c.txt", ""),
        ("c.json", "[" * 100_000),
    ],
)
def test_what_is_no_list_of_names_is_refused(tmp_path, name, content):
    with pytest.raises(InputError, match="--captions: .*give a text file"):
        read_class_names(written(tmp_path, name, content))


def folders_of(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
    return root


@pytest.mark.parametrize(
    "names, base, labels",
    [
        (("0", "5", "105", "20"), 1, (0, 5, 105, 20)),  # one is called 0
        (("5", "105"), 1, (4, 104)),
        (("005", "105"), 0, (5, 105)),
    ],
)
def test_folders_called_by_numbers_are_their_labels(tmp_path, capsys, names, base, labels):
    items = read_dataset(folders_of(tmp_path / "root", *names), None, IMAGENET_CLASSES, base)
    assert {item.path.parent.name: item.labels[0] for item in items} == dict(zip(names, labels))
    assert "are labels that count from" in capsys.readouterr().err


def test_folders_called_by_numbers_that_are_no_labels(tmp_path):
    with pytest.raises(InputError, match="is 4; labels count from 1, so expected 1 to 3"):
        read_dataset(folders_of(tmp_path / "root", "1", "4"), None, CAPTIONS)
    with pytest.raises(InputError, match="two folders of one class"):
        read_dataset(folders_of(tmp_path / "other", "1", "01"), None, CAPTIONS)


def test_other_folders_are_in_natural_order_and_said(tmp_path, capsys):
    items = read_dataset(folders_of(tmp_path / "root", "c10", "c9", "c1"), None, CAPTIONS)
    assert {item.path.parent.name: item.labels[0] for item in items} == {"c1": 0, "c9": 1, "c10": 2}
    assert "c1 is 'black footed albatross', c9 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("l.txt", "2 img1.png\n1 img2.png\n3 img10.png\n"),
        ("l.txt", "img10.png 3\nimg1.png 2\nimg2.png 1\n"),
        ("l.txt", "img1 2\nimg2 1\nimg10 3\n"),
        ("l.csv", "filename;label\nimg1.png;2\nimg2.png;1\nimg10.png;3\n"),
        ("l.tsv", "ImageId\tTrueLabel\nimg1\t2\nimg2\t1\nimg10\t3\n"),
        ("l.txt", "filename,label\nimg1.png,2\nimg2.png,1\nimg10.png,3\n"),
        ("l.csv", "filename,label\nval/img1.png,2\n/data/img2.png,1\nC:\\img10.png,3\n"),
        ("l.csv", ' filename , label\n"img1.png", 2\nimg2.png,1\nimg10.png,3\nimg1.png,2\n'),
    ],
)
def test_labels_in_every_form_that_is_found(photos, tmp_path, name, content):
    items = read_dataset(photos, written(tmp_path, name, content), CAPTIONS)
    assert labels_of(items) == {"img1.png": (1,), "img2.png": (0,), "img10.png": (2,)}


def test_an_image_that_a_table_names_twice(photos, tmp_path):
    table = written(
        tmp_path, "l.csv", "filename,label\na/img1.png,2\nb/img1.png,3\nimg2.png,1\nimg10.png,3\n"
    )
    with pytest.raises(InputError, match="line 3 .* gives 'img1.png' another label than a line above"):
        read_dataset(photos, table, CAPTIONS)


def test_two_labels_a_line_are_two_labels(photos, tmp_path):
    items = read_dataset(photos, written(tmp_path, "l.txt", "1 2\n3 1\n2 3\n"), CAPTIONS)
    assert [item.labels for item in items] == [(0, 1), (2, 0), (1, 2)]


def test_what_is_skipped_is_said(tmp_path, capsys):
    root = folders_of(tmp_path / "root", "cat", "dog")
    (root / "empty").mkdir()
    for name in ("cat/._a.png", "dog/notes.txt", "dog/b.heic", ".DS_Store"):
        (root / name).write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(root / "cat/b.jfif", format="JPEG")
    assert [path.name for path in list_images(root)] == ["a.png", "b.jfif", "a.png"]
    assert "3 files of" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("skipped: ._a.png, b.heic, notes.txt")


def test_a_class_whose_pictures_cannot_be_read_is_an_error(tmp_path):
    root = folders_of(tmp_path / "root", "cat")
    (root / "dog").mkdir()
    (root / "dog/a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="no picture of class 'dog' can be read, such as 'a.heic'"):
        list_images(root)


@pytest.mark.parametrize(
    "outputs, class_names, found",
    [
        (("dog", "cat"), ("cat", "dog"), [1, 0]),
        (("Polar_Bear", "cat"), ("polar bear", "cat"), [0, 1]),
        (("tench, Tinca tinca", "crane", "hen", "crane"), ("tench", "crane", "hen", "crane"), [0, 1, 2, 3]),
        (("dog", "cat"), ("cat", "bird"), None),
        (("cat", "cat"), ("dog", "cat"), None),
    ],
)
def test_outputs_of_a_classifier_by_their_names(outputs, class_names, found):
    assert permutation_of(outputs, class_names) == found
