"""Labels and class names in the forms of data sets of the field, and names that could be those of several
classes.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError
from diffattack.data.classes import (
    DEVELOPMENT_KIT,
    IMAGENET_CLASSES,
    ClassFinder,
    ClassNames,
    permutation_of,
    read_class_names,
)
from diffattack.data.dataset import list_images, read_dataset, target_label
from diffattack.data.labels import read_labels

IDS = IMAGENET_CLASSES.wordnet_ids
BIRDS = ("black footed albatross", "laysan albatross", "sooty albatross")


def images(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / file)
    return root


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def labels_of(root, text=None, classes=IMAGENET_CLASSES, base=1):
    """By image, its labels, or the one label that it has; of a file with this text beside the folder."""
    path = text if text is None or isinstance(text, Path) else written(root.parent / "labels.txt", text)
    items = read_dataset(root, path, classes, base)
    assert [item.index for item in items] == list(range(len(items)))
    labels = ((str(item.path.relative_to(root)), item.labels) for item in items)
    return {file: of_image if of_image[1:] else of_image[0] for file, of_image in labels}


@pytest.fixture
def three(tmp_path):
    return images(tmp_path / "r", "img10.png", "img2.png", "img1.png")


@pytest.fixture
def two(tmp_path):
    return images(tmp_path / "r", "a.png", "b.png")


# ---------------------------------------------------------------- files of labels


@pytest.mark.parametrize("base", [0, 1])
def test_labels_a_line_in_natural_order(three, capsys, base):
    text = f"\ufeff# labels\n\n{base}\n# more\n{base + 1}\r\n{base + 2} {base}\n\n"
    assert labels_of(three, text, BIRDS, base) == {"img1.png": 0, "img2.png": 1, "img10.png": (2, 0)}
    assert "1 of 3 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "img10.png 3\n# img1.png 1\nimg1.png 2\nimg2.png 1\n",
        "x/img1.png laysan albatross\nimg2.png Black_footed-albatross\nC:\\img10.png 3\n",
        "# f l\nfilename,label\n\nval/img1.png,2\n#b,1\n/data/img2.png,1\nC:\\img10.png,3\n",
        ' filename , label\n"img1.png", 2\nimg2.png,1\nimg10.png,3.0\nimg1.png,2\nother.png,99\n',
        "image_id,file_name,label\n0,img1.png,2\n1,img10.png,3\n2,img2.png,1\n",
        '{"path": "img2.png", "label": 1}\n{"path": "img1", "label": [2]}\n{"path": "img10", "label": 3}',
        '{"x/img1.png": "2",\n "img2": [1],\n "img10.png": "sooty albatross"}',
        "img1.JPEG 2\nimg2.JPEG 1\nimg10.png 3\n",
    ],
)
def test_labels_by_name(three, capsys, text):
    assert labels_of(three, text, BIRDS) == {"img1.png": 1, "img2.png": 0, "img10.png": 2}
    assert ("other suffixes" in capsys.readouterr().err) == ("JPEG" in text)


@pytest.mark.parametrize(
    "files, text",
    [
        ("a.png b.jpg", "9,val/b.JPEG\n4,val/a.JPEG\n7,val/c.JPEG"),
        ("a.1.png b.png", '{"a.1.JPEG": 4, "b.png": 9}'),
        ("e\u0301te\u0301.png x.png", "\u00e9t\u00e9.png 4\nx 9\n"),  # as a Mac writes them
        ("a.png b.png", f"{IDS[3]}\n{IDS[8]}\n"),
        ("a.png b.png", f"val/a.png {IDS[3]}\nval/b.png {IDS[8]}\n"),
        ("c1/1.png c1/2.png", "filename,label\nc1/1.JPEG,4\nc1/2.JPEG,9\nc2/1.JPEG,5"),
        (f"{IDS[1]}/images/1.png {IDS[1]}/images/2.png", f"{IDS[1]}/1.png 4\n{IDS[1]}/images/2.png 9\n"),
    ],
)
def test_names_with_folders_suffixes_and_accents_and_wordnet_ids(tmp_path, files, text):
    assert list(labels_of(images(tmp_path / "r", *files.split()), text).values()) == [3, 8]


def test_folders_of_a_table_tell_images_of_one_name_apart(tmp_path):
    table = written(tmp_path / "l.csv", "filename,label\nc2/0001.png,5\nc1/0001.png,4\n")
    assert labels_of(images(tmp_path / "c2", "0001.png"), table) == {"0001.png": 4}  # a folder of its own
    with pytest.raises(InputError, match="no row for c3/0001.png"):
        labels_of(images(tmp_path / "r", "c3/0001.png"), table)
    clean = [Path(f"000{k}_originImage.png") for k in range(2)]  # which are called otherwise now
    assert read_labels(table, clean, ClassFinder(IMAGENET_CLASSES), None)[0] == [(3,), (4,)]


def test_the_table_of_nips_2017_and_targets(three, tmp_path):
    rows = 'img10,"http://a,b",3,1,u\nimg2,h,2,3,u\nother,h,2,3,u\nimg1,h,1,2,u\n'
    table = written(tmp_path / "dev.csv", f"ImageId,URL,TrueLabel,TargetClass,OriginalLandingURL\n{rows}")
    for target, targets in ((None, [None] * 3), ("TargetClass", [1, 2, 0])):
        items = read_dataset(three, table, BIRDS, target=target)
        assert [(item.labels, item.target) for item in items] == list(zip([(0,), (1,), (2,)], targets))
    table = written(tmp_path / "transferattack.csv", "filename,label,targeted_label\nimg1.png,305,883\n")
    one = images(tmp_path / "s", "img1.png")
    (item,) = read_dataset(one, table, IMAGENET_CLASSES, 0, target_label("targeted_label"))
    assert (item.labels, item.target) == ((305,), 883)


COCO = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "category_id": 17}]}
TABLE = "filename,label\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("1\n", "has 1 labels but --images_root has 2 images"),
        ("1\n4\n", "line 2 is '4'; expected an integer from 1 to 3"),
        (f"{TABLE}a.png,1\nb.png,\n", "line 3 has no label"),
        (f"{TABLE}a.png,1\n", "has no row for b.png"),
        (f"{TABLE}x/a.png,2\ny/a.png,3\nb.png,1", "line 3 gives 'a.png' another label than"),
        # other forms
        (json.dumps(COCO), "COCO"),
        ("a.png,10,20,100,200,5\nb.png,1,2,3,4,6\n", "'10,20,100,200,5'"),
        ('{"a.png": [1, 2, 3], "b.png": [3, 1, 2]}', "number for each class"),
    ],
)
def test_labels_that_cannot_be_used_are_named_with_the_forms_that_are_read(two, text, message):
    with pytest.raises(InputError, match=f"{message}.*JSON lines"):
        labels_of(two, text, BIRDS)


@pytest.mark.parametrize(
    "files, text, message",
    [
        # rows that could be of several images or classes, or numbers that may be those of images
        ("c1/1.png c2/1.png", f"{TABLE}1.png,4\n", "line 2 may be of 'c1/1.png' or of 'c2/1"),
        ("a.png a.jpg", "a.JPEG 4\n", "only suffixes differ"),
        ("x/1.png y/2.png", f"{TABLE}c1/1.png,4\nc2/2.png,5\n", "no row for x/1.png"),
        ("a.png", "crane\n", "line 1 .* may be .* or .*; give its label or WordNet id"),
        ("a.png", "1 348\n", "may be an image's number and its label, or two labels"),
        ("val_00000002.png val_00000005.png", "2 286\n5 100\n", "may be an image's number"),
        # folders
        ("crane/a.png", None, "root: .*'crane bird' .label 135, n02012849. or 'crane' .label 518, n03126707"),
        (f"{IDS[0]}/a.png n00000001/a.png", None, "--images_root: .*folder 'n00000001'"),
        ("1/a.png 1001/a.png", None, "--images_root: .*'1001'; expected an integer from 1 to 1000"),
        ("1/a.png 01/a.png", None, "--images_root: .*two folders of one class"),
    ],
)
def test_labels_that_could_be_meant_in_two_ways_or_in_none(tmp_path, files, text, message):
    with pytest.raises(InputError, match=message):
        labels_of(images(tmp_path / "r", *files.split()), text)


def test_classes_that_are_called_by_numbers(tmp_path):
    root, digits = images(tmp_path / "r", "a.png"), ClassNames(map(str, range(10)))
    assert labels_of(root, "7\n", digits, 0) == {"a.png": 7}
    with pytest.raises(InputError, match="may be '6' .label 7. or '7' .label 8."):
        labels_of(root, "7\n", digits, 1)


def test_many_labels_are_read_in_seconds(tmp_path):
    (tmp_path / "r").mkdir()
    names = [f"ILSVRC2012_val_{k + 1:08d}.JPEG" for k in range(10_000)]
    for name in names:
        (tmp_path / "r" / name).touch()
    rows = "".join(f"val/{name} {IDS[k % 1000]}\n" for k, name in enumerate(names))
    started = time.monotonic()
    labels = labels_of(tmp_path / "r", rows)
    assert time.monotonic() - started < 10
    assert list(labels.values()) == [k % 1000 for k in range(10_000)]


# ---------------------------------------------------------------- without a file of labels


def test_metadata_in_the_folder(two, tmp_path, capsys):
    text = '{"file_name": "b.png", "label": 7}\n{"file_name": "a.png", "label": 4}\n'
    written(two / "metadata.jsonl", text)
    assert labels_of(two) == {"a.png": 3, "b.png": 6}
    assert "labels are those of metadata.jsonl" in capsys.readouterr().err
    written(two / "metadata.jsonl", text.replace("7", '"tabbi"'))
    with pytest.raises(InputError, match="^--images_root: .*'tabbi'"):  # the flag that was given
        labels_of(two)
    other = images(tmp_path / "s", "tench/a.png")  # it says nothing of labels
    written(other / "metadata.csv", "file_name,text\na.png,4\n")
    assert labels_of(other) == {"tench/a.png": 0}


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000001_{}.JPEG", "{}/x.JPEG", "{}/images/1.JPEG"])
def test_wordnet_ids_in_names_and_folders(tmp_path, name):
    """The last as Tiny ImageNet's training set has it, beside a file of boxes."""
    root = images(tmp_path / "r", *(name.format(IDS[k]) for k in (7, 3)))
    for folder in (path for path in root.iterdir() if path.is_dir()):
        written(folder / "boxes.txt", "0 0 1 1")
    assert list(labels_of(root).values()) == [3, 7]


@pytest.mark.parametrize(
    "folders, classes, base, labels, text",
    [
        ("sooty_albatross Laysan-Albatross __MACOSX", BIRDS, 1, (1, 2), ""),
        ("c10 c9 c1", BIRDS, 1, (0, 1, 2), "c1 is 'black footed albatross', c9 is"),
        ("002.Laysan_Albatross 001.Black_footed_Albatross", BIRDS, 1, (0, 1), ""),  # CUB's
        ("Cardigan ostrich", IMAGENET_CLASSES, 1, (264, 9), ""),
        ("0 5 105 20", IMAGENET_CLASSES, 1, (0, 5, 20, 105), "are labels that count from 0"),
        ("5 105", IMAGENET_CLASSES, 1, (4, 104), "are labels that count from 1"),
        ("005 105", IMAGENET_CLASSES, 0, (5, 105), "are labels that count from 0"),
    ],
)
def test_a_folder_a_class(tmp_path, capsys, folders, classes, base, labels, text):
    files = (f"{name}/{'._' * (name[0] == '_')}{k}.png" for name in folders.split() for k in (10, 9))
    found = labels_of(images(tmp_path / "r", *files), None, classes, base)
    assert list(found.values()) == [label for label in labels for _ in range(2)]
    assert [Path(file).name for file in found] == ["9.png", "10.png"] * len(labels)
    assert text in capsys.readouterr().err


def test_which_files_are_images(tmp_path, capsys):
    root = images(tmp_path / "r", "a.png", "c.jfif")
    (root / "x.jpg").mkdir()
    (root / "b.png").symlink_to(tmp_path / "gone.png")  # it keeps its place
    for name in ("._a.png", "notes.txt", "b.heic", ".DS_Store"):
        (root / name).write_bytes(b"x")
    assert [path.name for path in list_images(root)] == ["a.png", "b.png", "c.jfif"]
    assert capsys.readouterr().err.rstrip().endswith("skipped: ._a.png, b.heic, notes.txt")
    (images(tmp_path / "s", "cat/a.png") / "empty").mkdir()
    (tmp_path / "s/empty/a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="no image in '.*empty'"):  # a class would be left out
        list_images(tmp_path / "s")


# ---------------------------------------------------------------- names of classes


def test_which_classes_a_name_can_mean():
    """ImageNet calls a bird and a machine "crane"."""
    names = {"Cardigan": [264], "cardigan": [474], "CARDIGAN": [264, 474], "crane": [134, 517]}
    names |= {"crane_bird": [134], "maillot": [638, 639], "Great-White_Shark": [2], "n02113186": [264]}
    finder = ClassFinder(IMAGENET_CLASSES)
    assert {name: finder.places(name) for name in names} == names
    assert ClassFinder(("cat", "dog", "cat")).places("cat") == [0, 2]
    assert ClassFinder(("tench, Tinca tinca", "hen")).places("Tinca_tinca") == [0]


NAMES = ("tench", "great white shark", "hen")
CLASS_FILES = {
    "# classes\ntench\ngreat white shark\nhen\n": NAMES,
    "0 n01440764 tench\n1 n01484850 great white shark\n2 n01514859 hen\n": NAMES,
    "2: hen\n0: tench\n1: great white shark\n": NAMES,
    "tench,0\ngreat white shark,1\nhen,2\n": NAMES,
    "hen 3\ntench 1\ngreat white shark 2\n": NAMES,
    "3 wheeler\n7 up\n": ("3 wheeler", "7 up"),  # numbers that are part of a name
    "n01440764 tench, Tinca tinca\nn01514859 hen, fowl\n": ("tench, Tinca tinca", "hen, fowl"),
    "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n": ("Black footed Albatross", "Laysan Albatross"),
    '{"id2label": {"0": "tench", "1": "hen"}, "model_type": "vit"}': ("tench", "hen"),
    '{"class_to_idx": {"hen": 1, "tench": 0}}': ("tench", "hen"),
    f'{{"{IDS[9]}": 1, "{IDS[3]}": 0}}': ("tiger shark", "ostrich"),
}


def test_names_of_classes(tmp_path):
    for text, names in CLASS_FILES.items():
        assert read_class_names(written(tmp_path / "c.txt", text)) == names, text
    found = read_class_names(written(tmp_path / "c.txt", "n02113186\nn01440764\n"))
    assert found == ("Cardigan", "tench") and found.wordnet_ids == (IDS[264], IDS[0])
    names = np.empty((1, 2), object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    savemat(tmp_path / "cars_meta.mat", {"class_names": names})
    assert read_class_names(tmp_path / "cars_meta.mat") == tuple(names[0])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("c.json", "{", "Expecting property name"),
        ("c.json", '{"0": "a", "2": "c"}', "not numbered from 0 or 1 on"),
        ("c.mat", "no mat", "truncated"),
        ("c.txt", "a\n\nb\n", "class 2 is called ''"),
        ("c.yaml", "names:\n- tench\n- hen\n", "names:"),
    ],
)
def test_what_is_no_list_of_names_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputError, match=f"--captions: .*{message}.*what is read: a text file"):
        read_class_names(written(tmp_path / name, text))


def test_imagenets_development_kit(tmp_path, capsys):
    """The first images of its validation set, and what its ground truth says of them."""
    rows = [(n, IDS[k], IMAGENET_CLASSES[k], 0) for n, k in enumerate(DEVELOPMENT_KIT, 1)]
    rows.insert(0, (1001, "n00001740", "entity", 3))  # a synset that is no class
    titles = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    synsets = np.array(rows, [(title, object) for title in titles])
    savemat(tmp_path / "meta.mat", {"synsets": synsets[:, None]})
    names = read_class_names(tmp_path / "meta.mat")
    assert names == IMAGENET_CLASSES and "an order of its own" in capsys.readouterr().err
    root = images(tmp_path / "r", *(f"ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2, 3, 4)))
    for base in (0, 1):  # it counts from 1 whatever is said
        assert list(labels_of(root, "490\n361\n171\n822\n", names, base).values()) == [65, 970, 230, 809]


# ---------------------------------------------------------------- outputs of a classifier

OFFICIAL = [IMAGENET_CLASSES.other_names.get(k, name) for k, name in enumerate(IMAGENET_CLASSES)]


@pytest.mark.parametrize(
    "outputs, class_names, found",
    [
        (("Dog", "cat"), ("cat", "dog"), [1, 0]),
        (("Cardigan", "cardigan", "hen"), ("hen", "cardigan", "Cardigan"), [2, 1, 0]),
        (("dog", "cat"), ("cat", "bird"), None),
        (OFFICIAL, IMAGENET_CLASSES, list(range(1000))),
        (OFFICIAL[::-1], IMAGENET_CLASSES, None),  # two are called the same
        (IDS[::-1], IMAGENET_CLASSES, list(range(1000))[::-1]),
    ],
)
def test_outputs_of_a_classifier_by_their_names(outputs, class_names, found):
    assert permutation_of(outputs, class_names) == found


def test_captions_in_another_order_than_imagenets_are_matched_by_their_ids(tmp_path, capsys):
    rows = [f"{IDS[k]} {IMAGENET_CLASSES[k]}" for k in reversed(range(1000))]
    names = read_class_names(written(tmp_path / "c.txt", "\n".join(rows)))
    picture = torch.rand(1, 3, 224, 224)
    straight, turned = (load_classifier("efficientnet_lite0", n)(picture) for n in (IMAGENET_CLASSES, names))
    assert torch.equal(turned, straight.flip(1))
    assert "matched by their names" in capsys.readouterr().err
