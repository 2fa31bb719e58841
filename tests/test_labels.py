"""Labels in the forms of data sets of the field, and names that could be those of several classes."""

import copy
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError, notes
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


def images(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / file)
    return root


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def labels_of(*arguments, **options):
    root = arguments[0]
    return {str(item.path.relative_to(root)): item.labels[0] for item in read_dataset(*arguments, **options)}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, labels",
    [
        ("Cardigan", [264]),
        ("cardigan", [474]),
        ("CARDIGAN", [264, 474]),
        ("crane", [134, 517]),  # ImageNet calls both so
        ("crane_bird", [134]),
        ("maillot", [638, 639]),
        ("Great-White_Shark", [2]),
        ("n02113186", [264]),
        ("n02113186-Cardigan", [264]),
        ("N02113186", [264]),
        ("hot_dog", [934]),
        ("Bath Tub", [435]),
        ("n00000001", []),
        ("no class", []),
    ],
)
def test_which_classes_a_name_can_mean(name, labels):
    assert ClassFinder(IMAGENET_CLASSES).places(name) == labels


def test_names_that_are_equal_are_not_told_apart():
    assert ClassFinder(("cat", "dog", "cat")).places("cat") == [0, 2]
    assert ClassFinder(("tench, Tinca tinca", "hen")).places("Tinca_tinca") == [0]
    assert ClassFinder(("10", "x 1 0")).places("1.0") == []


def test_a_folder_of_an_ambiguous_name_is_refused_with_what_tells_apart(tmp_path):
    with pytest.raises(InputError, match="'crane bird' .label 135, n02012849. or 'crane' .label 518, n031"):
        read_dataset(images(tmp_path / "r", "crane/a.png"), None, IMAGENET_CLASSES)
    assert labels_of(images(tmp_path / "s", "Cardigan/a.png"), None, IMAGENET_CLASSES) == {
        "Cardigan/a.png": 264
    }


@pytest.mark.parametrize("line", ["CARDIGAN", "crane", "Maillot"])
def test_a_label_of_an_ambiguous_name_is_refused(tmp_path, line):
    root, path = images(tmp_path / "r", "a.png", "b.png"), written(tmp_path / "l.txt", f"{line}\ncardigan\n")
    with pytest.raises(InputError, match="line 1 .* may be .* or .*; give its label or WordNet id"):
        read_dataset(root, path, IMAGENET_CLASSES)


# ---------------------------------------------------------------- outputs of a classifier


def test_imagenets_own_names_are_matched_unless_two_that_are_equal_are_in_another_order():
    official = [IMAGENET_CLASSES.other_names.get(k, name) for k, name in enumerate(IMAGENET_CLASSES)]
    assert permutation_of(official, IMAGENET_CLASSES) == list(range(1000))
    assert permutation_of(official[::-1], IMAGENET_CLASSES) is None
    assert permutation_of(IMAGENET_CLASSES[::-1], IMAGENET_CLASSES) == list(range(1000))[::-1]


def test_outputs_that_are_called_by_wordnet_ids():
    order = random.Random(1).sample(range(1000), 1000)
    found = permutation_of([IDS[k] for k in order], IMAGENET_CLASSES)
    assert [order[place] for place in found] == list(range(1000))


def test_names_that_differ_in_case_alone_are_matched_exactly():
    assert permutation_of(("Cardigan", "cardigan", "hen"), ("hen", "cardigan", "Cardigan")) == [2, 1, 0]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder in transformers format with a random network of 1000 classes, and how to write it anew with
    outputs in another order.
    """
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=1000))
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)

    def ordered(names, order):
        """Output k is that of class order[k], and has the name names[order[k]]."""
        shown = copy.deepcopy(network)
        shown.classifier.weight.data = network.classifier.weight.data[order]
        shown.classifier.bias.data = network.classifier.bias.data[order]
        shown.config.id2label = {k: names[place] for k, place in enumerate(order)}
        shown.config.label2id = {name: k for k, name in shown.config.id2label.items()}
        shown.save_pretrained(folder)
        return f"hf:{folder}"

    return ordered


def test_a_head_with_imagenets_names_in_another_order_is_put_right(vit, capsys):
    picture = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    straight = load_classifier(vit(IMAGENET_CLASSES, list(range(1000))), IMAGENET_CLASSES)(picture)
    order = random.Random(0).sample(range(1000), 1000)
    for names in (IMAGENET_CLASSES, IDS):
        other = load_classifier(vit(names, order), IMAGENET_CLASSES)
        assert torch.equal(other(picture), straight)
        assert "matched by their names" in capsys.readouterr().err
        notes.clear()


def test_captions_in_another_order_than_imagenets_are_matched_by_their_ids(tmp_path, capsys):
    rows = [f"{IDS[k]} {IMAGENET_CLASSES[k]}" for k in reversed(range(1000))]
    names = read_class_names(written(tmp_path / "c.txt", "\n".join(rows)))
    picture = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    straight, turned = (
        load_classifier("efficientnet_lite0", some)(picture) for some in (IMAGENET_CLASSES, names)
    )
    assert torch.equal(turned, straight.flip(1))
    assert "matched by their names" in capsys.readouterr().err


# ---------------------------------------------------------------- WordNet ids


def test_folders_of_imagenet(tmp_path):
    root = images(tmp_path / "r", *(f"{IDS[k]}/x.JPEG" for k in (0, 264, 999)))
    assert list(labels_of(root, None, IMAGENET_CLASSES).values()) == [0, 264, 999]
    with pytest.raises(InputError, match="no class is called 'n00000001'"):
        read_dataset(images(root, "n00000001/x.JPEG"), None, IMAGENET_CLASSES)


@pytest.mark.parametrize("name", ["{id}_10026.JPEG", "ILSVRC2012_val_00000001_{id}.JPEG"])
def test_wordnet_ids_in_the_names_of_images(tmp_path, name):
    root = images(tmp_path / "r", name.format(id=IDS[7]), name.format(id=IDS[3]))
    assert sorted(labels_of(root, None, IMAGENET_CLASSES).values()) == [3, 7]


@pytest.mark.parametrize(
    "name, content",
    [
        ("l.txt", "n01440764\nn02113186\n"),
        ("l.csv", "ImageId,Class\na,n01440764\nb,n02113186\n"),
        ("l.txt", "val/a.png n01440764\nval/b.png n02113186\n"),
        ("l.csv", "path,wnid\nval/a.png,n01440764\nval/b.png,n02113186\n"),
    ],
)
def test_wordnet_ids_as_labels(tmp_path, name, content):
    root = images(tmp_path / "r", "a.png", "b.png")
    found = labels_of(root, written(tmp_path / name, content), IMAGENET_CLASSES)
    assert found == {"a.png": 0, "b.png": 264}


def development_kit(folder, kind):
    """Its own files, with the content that they have as far as it is read."""
    rows = [(number, IDS[k], IMAGENET_CLASSES[k]) for number, k in enumerate(DEVELOPMENT_KIT, 1)]
    if kind == "map_clsloc.txt":
        text = "".join(f"{wordnet} {number} {name.replace(' ', '_')}\n" for number, wordnet, name in rows)
        return written(folder / kind, text)
    kind_of_row = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    inner = (1001, "n00001740", "entity", 3)  # a synset that is no class
    savemat(folder / kind, {"synsets": np.array([inner, *((*row, 0) for row in rows)], kind_of_row)[:, None]})
    return folder / kind


@pytest.mark.parametrize("kind", ["map_clsloc.txt", "meta.mat"])
def test_imagenets_development_kit(tmp_path, capsys, kind):
    """The first images of its validation set, and what its ground truth says of them."""
    names = read_class_names(development_kit(tmp_path, kind))
    assert names == IMAGENET_CLASSES and "an order of its own" in capsys.readouterr().err
    root = images(tmp_path / "r", *(f"ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2, 3, 4)))
    truth = written(tmp_path / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n171\n822\n")
    for base in (0, 1):  # it counts from 1 whatever is said
        assert list(labels_of(root, truth, names, base).values()) == [65, 970, 230, 809]
    with pytest.raises(InputError, match="labels count from 1, so expected 1 to 1000"):
        read_dataset(root, written(tmp_path / "l.txt", "0\n1\n2\n3\n"), names)


def test_classes_of_a_list_of_wordnet_ids(tmp_path):
    names = read_class_names(written(tmp_path / "c.txt", "n02113186\nn01440764\n"))
    assert names == ("Cardigan", "tench") and names.wordnet_ids == ("n02113186", "n01440764")


# ---------------------------------------------------------------- what cannot be told, and other forms


@pytest.mark.parametrize(
    "names, text",
    [
        (("a",), "1 348\n"),
        (("a", "b"), "0 348\n1 286\n"),
        (("a", "b"), "1\t348\n2\t286"),
        (("1", "2"), "2 9\n1 7\n"),
        (("img1", "img2", "img3"), "2 9\n3 8\n1 7\n"),
        (("val_00000002", "val_00000005"), "2 286\n5 100\n"),
    ],
)
def test_numbers_that_may_be_those_of_images_are_refused(tmp_path, names, text):
    root = images(tmp_path / "r", *(f"{name}.png" for name in names))
    with pytest.raises(InputError, match="may be an image's number and its label, or two labels"):
        read_dataset(root, written(tmp_path / "l.txt", text), IMAGENET_CLASSES)


COCO = {"images": [{"id": 7, "file_name": "a.png"}], "categories": [{"id": 17, "name": "hen"}]}
COCO["annotations"] = [{"image_id": 7, "category_id": 17}]


@pytest.mark.parametrize(
    "name, text, form",
    [
        ("l.json", json.dumps(COCO), "COCO's annotations"),
        ("l.json", json.dumps({"labels": [["x/b.png", 7], ["x/a.png", 4]]}), "no row for a.png"),
        (
            "l.json",
            json.dumps([{"file_name": "a.png", "label": 4}, {"file_name": "b.png", "label": 4}]),
            "list",
        ),
        ("l.csv", "image,hen,cock\na.png,1,0\nb.png,0,1\n", "the columns image, hen, cock"),
        ("l.csv", "photo,label,x\na.png,1,0\nb.png,3,1\n", "the columns photo, label, x"),
        ("l.csv", "a.png,10,20,100,200,5\nb.png,1,2,3,4,6\n", "'10,20,100,200,5'"),
        ("l.txt", "1,348\n2,286\n", "'1,348'"),
        ("l.txt", "1 n01440764\n2 n02113186\n", "'1 n01440764'"),
        ("l.txt", f"a.png\t{IDS[5]}\t0\t32\t44\t62\nb.png\t{IDS[3]}\t5\t5\t5\t5\n", "0.t32"),
        ("l.txt", "a 1.0 0.0\nb 0.0 1.0\n", "'1.0 0.0'"),
        ("l.txt", "# image class species\n# 1:37\na.png 286 1 6\nb.png 348 2 7\n", "line 3 .* '286 1 6'"),
        ("annos.mat", "\0\1", "no text"),
    ],
)
def test_other_forms_are_refused_with_those_that_are_read(tmp_path, name, text, form):
    root = images(tmp_path / "r", "a.png", "b.png")
    with pytest.raises(InputError, match=f"--label_path: .*{form}.*JSON lines"):
        read_dataset(root, written(tmp_path / name, text), IMAGENET_CLASSES)


@pytest.mark.parametrize("text", ["# labels of 2026\n\n4\n9\n", "4\n# the second\n9\n\n\n", "\n4\r\n\r\n9"])
def test_comments_and_blank_lines_count_for_nothing(tmp_path, text):
    root = images(tmp_path / "r", "a.png", "b.png")
    assert list(labels_of(root, written(tmp_path / "l.txt", text), IMAGENET_CLASSES).values()) == [3, 8]


@pytest.mark.parametrize("rows", ["a.png 4\n# b.png 5\nb.png 9", "# f l\nfilename,label\n\na,4\n#b,7\nb,9"])
def test_comments_between_names(tmp_path, rows):
    root = images(tmp_path / "r", "a.png", "b.png")
    assert list(labels_of(root, written(tmp_path / "l.txt", rows), IMAGENET_CLASSES).values()) == [3, 8]


def test_several_labels_are_said(tmp_path, capsys):
    root = images(tmp_path / "r", "a.png", "b.png")
    items = read_dataset(root, written(tmp_path / "l.txt", "3 17\n5\n"), IMAGENET_CLASSES)
    assert [item.labels for item in items] == [(2, 16), (4,)]
    assert "1 of 2 lines of" in capsys.readouterr().err


def test_cubs_folders_have_the_number_before_the_name(tmp_path):
    classes = ("Black footed Albatross", "Laysan Albatross", "Other")
    root = images(tmp_path / "images", "002.Laysan_Albatross/3.jpg", "001.Black_footed_Albatross/46.jpg")
    assert list(labels_of(root, None, classes).values()) == [0, 1]


# ---------------------------------------------------------------- names in tables


def test_paths_in_a_table_tell_folders_apart(tmp_path):
    root = images(tmp_path / "r", "c1/0001.png", "c2/0001.png")
    table = written(tmp_path / "l.csv", "filename,label\nc2/0001.png,5\nc1/0001.png,4\n")
    assert labels_of(root, table, IMAGENET_CLASSES) == {"c1/0001.png": 3, "c2/0001.png": 4}
    one = images(tmp_path / "c2", "0001.png")  # a folder of its own
    assert labels_of(one, table, IMAGENET_CLASSES) == {"0001.png": 4}
    with pytest.raises(InputError, match="no row for c3/0001.png"):
        read_dataset(images(root, "c3/0001.png"), table, IMAGENET_CLASSES)


@pytest.mark.parametrize(
    "files, text, message",
    [
        (("c1/1.png", "c2/1.png"), "filename,label\n1.png,4\n", "line 2 .* may be of 'c1/1.png' or of 'c2/1"),
        (("a.png", "a.jpg"), "filename,label\na,4\n", "may be of 'a.*' or of 'a"),
        (("x/1.png", "y/2.png"), "filename,label\nc1/1.png,4\nc2/2.png,5\n", "no row for x/1.png"),
        (("a.png",), "filename,label,Label\na.png,4,5\n", "the columns filename, label, Label; expected one"),
        (
            ("a.png",),
            "filename,label,class\na.png,475,tench\n",
            "the columns filename, label, class; expected one",
        ),
    ],
)
def test_rows_that_could_be_of_several_images_or_classes(tmp_path, files, text, message):
    with pytest.raises(InputError, match=message):
        read_dataset(images(tmp_path / "r", *files), written(tmp_path / "l.csv", text), IMAGENET_CLASSES)


def test_letters_with_accents_as_a_mac_writes_them(tmp_path):
    root = images(tmp_path / "r", "e\u0301te\u0301.png")
    path = written(tmp_path / "l.txt", "\u00e9t\u00e9.png 4\n")
    assert list(labels_of(root, path, IMAGENET_CLASSES).values()) == [3]


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name,label\na.png,4\nb.png,7\n"),
        ("metadata.jsonl", '{"file_name": "b.png", "label": 7}\n{"file_name": "a.png", "label": 4}\n'),
    ],
)
def test_metadata_in_the_folder(tmp_path, capsys, name, content):
    root = images(tmp_path / "r", "a.png", "b.png")
    written(root / name, content)
    assert labels_of(root, None, IMAGENET_CLASSES) == {"a.png": 3, "b.png": 6}
    assert f"labels are those of {name}" in (said := capsys.readouterr().err) and "skipped" not in said


def test_what_is_wrong_with_metadata_names_the_flag_that_was_given(tmp_path):
    root = images(tmp_path / "r", "a.png")
    written(root / "metadata.csv", "file_name,label\na.png,tabbi\n")
    with pytest.raises(InputError, match="^--images_root: line 2 of .*'tabbi'"):
        read_dataset(root, None, IMAGENET_CLASSES)


def test_metadata_without_labels_is_none(tmp_path):
    root = images(tmp_path / "r", "tench/a.png")
    written(root / "metadata.csv", "file_name,text\ntench/a.png,a fish\n")
    assert labels_of(root, None, IMAGENET_CLASSES) == {"tench/a.png": 0}


def test_transferattacks_table(tmp_path):
    root = images(tmp_path / "r", "a.png", "b.png")
    table = written(tmp_path / "labels.csv", "filename,label,targeted_label\na.png,305,883\nb.png,1,2\n")
    for text in ("TargetClass", "targeted_label"):
        items = read_dataset(root, table, IMAGENET_CLASSES, 0, target_label(text))
        assert [(item.labels, item.target) for item in items] == [((305,), 883), ((1,), 2)]


def test_labels_in_json(tmp_path):
    root = images(tmp_path / "r", "a.png", "b.png")
    path = written(tmp_path / "l.json", json.dumps({"x/a.png": "4", "b": [7, IDS[8]]}, indent=1))
    assert [item.labels for item in read_dataset(root, path, IMAGENET_CLASSES)] == [(3,), (6, 8)]
    path = written(
        tmp_path / "l.jsonl", '{"file_name": "b.png", "label": [7, 9]}\n{"file_name": "a", "label": 4}\n'
    )
    assert [item.labels for item in read_dataset(root, path, IMAGENET_CLASSES)] == [(3,), (6, 8)]


@pytest.mark.parametrize(
    "files, text",
    [
        (("a.png", "b.png"), "a.JPEG 4\nb.JPEG 9\n"),
        (("a.png", "b.jpg"), "9,val/b.JPEG\n4,val/a.JPEG\n7,val/c.JPEG"),
        (("c1/a.png", "c1/b.png"), "filename,label\nc1/a.JPEG,4\nc1/b.JPEG,9\nc2/a.JPEG,5"),
        (("a.1.png", "b.png"), '{"a.1.JPEG": 4, "b.png": 9}'),
    ],
)
def test_names_that_differ_in_suffixes_alone_are_found_with_a_note(tmp_path, capsys, files, text):
    root = images(tmp_path / "r", *files)
    assert list(labels_of(root, written(tmp_path / "val.txt", text), IMAGENET_CLASSES).values()) == [3, 8]
    assert "other suffixes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, text",
    [
        (("a.png", "a.jpg"), "a.JPEG 4\n"),
        (("a.png",), "a.JPEG 4\na.jpg 5\n"),
        (("a.png", "b.png"), '{"a.JPEG": 4, "a.webp": 5, "b.JPEG": 9}'),
    ],
)
def test_names_of_which_only_suffixes_differ_are_refused_where_several_fit(tmp_path, files, text):
    root = images(tmp_path / "r", *files)
    with pytest.raises(InputError, match="only suffixes differ"):
        read_dataset(root, written(tmp_path / "val.txt", text), IMAGENET_CLASSES)


def test_rows_of_images_that_are_called_otherwise_now(tmp_path, capsys):
    path = written(tmp_path / "l.csv", "image,label\nc2/img10.png,1\nc2/img2.png,2\nc1/img3.png,3\n")
    clean = [Path(f"000{k}_originImage.png") for k in range(3)]
    finder = ClassFinder(("cat", "hen", "fox"))
    assert read_labels(path, clean, finder, None)[0] == [(2,), (1,), (0,)]


@pytest.mark.parametrize("rows", [([0, 0, 1], [0, 1, 0]), ([0, 1], [1, 0])])
@pytest.mark.parametrize("name", ["l.json", "l.txt"])
def test_a_number_for_each_class_is_no_list_of_labels(tmp_path, rows, name):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    lines = "".join(" ".join(map(str, row)) + "\n" for row in rows[::-1])
    text = json.dumps(dict(zip(("a.jpg", "b.jpg"), rows))) if name == "l.json" else lines
    with pytest.raises(InputError, match="has a class twice|a number for each class|or two labels"):
        labels_of(
            tmp_path / "photos", written(tmp_path / name, text), ("cat", "hen", "fox")[: len(rows[0])], 0
        )


def test_a_column_of_file_names_is_before_one_of_numbers(tmp_path):
    images(tmp_path / "photos", "0.png", "1.png")
    path = written(tmp_path / "l.csv", "image_id,file_name,label\n0,1.png,1\n1,0.png,2\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen")).values()) == [1, 0]


@pytest.mark.parametrize(
    "content",
    [
        {"1": "cat", "2": "dog", "3": "bird"},  # Oxford's flowers
        {"dog": 1, "cat": 0, "bird": 2},
        {"label2id": {"dog": 1, "cat": 0, "bird": 2}},
        {"class_to_idx": {"dog": 1, "cat": 0, "bird": 2}},
    ],
)
def test_class_names_in_forms_of_json(tmp_path, content):
    path = written(tmp_path / "c.json", json.dumps(content))
    assert read_class_names(path) == ("cat", "dog", "bird")


def test_folders_of_a_macs_archive(tmp_path):
    images(tmp_path / "folders", "cat/a.jpg", "__MACOSX/._a.jpg")
    assert labels_of(tmp_path / "folders", None, ("cat", "hen")) == {"cat/a.jpg": 0}


@pytest.mark.parametrize("content", [{IDS[9]: 1, IDS[3]: 0}, {"id2label": {"0": IDS[3], "1": IDS[9]}}])
def test_numbers_of_wordnet_ids_are_a_list_of_classes(tmp_path, content):
    names = read_class_names(written(tmp_path / "c.json", json.dumps(content)))
    assert names == (IMAGENET_CLASSES[3], IMAGENET_CLASSES[9]) and names.wordnet_ids == (IDS[3], IDS[9])
    assert labels_of(images(tmp_path / "r", f"{IDS[9]}/a.png"), None, names) == {f"{IDS[9]}/a.png": 1}


@pytest.mark.parametrize(
    "text",
    [
        "bird 2\ncat 0\ndog 1\n",
        "2 bird\n0 cat\n1 dog\n",
        "1. cat\n2. dog\n3. bird\n",
        "1) cat\n2) dog\n3) bird\n",
        "# classes\ncat\ndog\nbird\n",
    ],
)
def test_numbers_and_comments_are_no_part_of_class_names(tmp_path, text):
    assert read_class_names(written(tmp_path / "c.txt", text)) == ("cat", "dog", "bird")


def test_folders_that_look_like_classes_in_another_order_are_refused(tmp_path):
    images(tmp_path, "Dogs/a.jpg", "cats/a.jpg")
    with pytest.raises(InputError, match="no class is called 'Dogs'"):
        labels_of(tmp_path, None, ("cat", "dog"))


@pytest.mark.parametrize("files", [("{}/images/{}_0.JPEG",), ("{}/images/1.JPEG", "{}/images/2.JPEG")])
def test_a_folder_images_between_class_and_pictures_is_looked_through(tmp_path, files):
    """As Tiny ImageNet's training set has it, beside a file of boxes."""
    root = images(tmp_path / "r", *(file.format(IDS[k], IDS[k]) for k in (7, 3) for file in files))
    written(root / IDS[3] / f"{IDS[3]}_boxes.txt", "0 0 1 1")
    assert list(labels_of(root, None, IMAGENET_CLASSES).values()) == [3] * len(files) + [7] * len(files)
    table = "".join(f"{path.relative_to(root)} {IDS[9]}\n" for path in list_images(root))
    found = labels_of(root, written(tmp_path / "l.txt", table), IMAGENET_CLASSES)
    assert set(found.values()) == {9}


def test_classes_that_are_called_by_numbers(tmp_path):
    root, digits = images(tmp_path / "r", "a.png"), ClassNames(map(str, range(10)))
    path = written(tmp_path / "l.txt", "7\n")
    assert labels_of(root, path, digits, 0) == {"a.png": 7}
    with pytest.raises(InputError, match="may be '6' .label 7. or '7' .label 8."):
        read_dataset(root, path, digits, 1)


# ---------------------------------------------------------------- folders


def test_a_folder_that_is_called_like_an_image_is_none(tmp_path, capsys):
    root = images(tmp_path / "r", "a.png", "b.png")
    (root / "x.jpg").mkdir()
    os.mkfifo(root / "pipe.png")
    assert [path.name for path in list_images(root)] == ["a.png", "b.png"]
    assert capsys.readouterr().err.rstrip().endswith("skipped: pipe.png")


def test_a_link_that_leads_nowhere_keeps_its_place(tmp_path):
    root = images(tmp_path / "r", "a.png", "c.png")
    (root / "b.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in list_images(root)] == ["a.png", "b.png", "c.png"]


def test_folders_that_are_neither_names_nor_in_order(tmp_path):
    root = images(tmp_path / "r", "cat/a.png", "dog/a.png", "unknown/a.png")
    with pytest.raises(InputError, match="no class is called 'unknown'"):
        read_dataset(root, None, ("dog", "bird", "cat"))


def test_many_labels_are_read_in_seconds(tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    for k in range(10_000):
        (root / f"ILSVRC2012_val_{k + 1:08d}.JPEG").touch()
    rows = "".join(f"val/ILSVRC2012_val_{k + 1:08d}.JPEG {IDS[k % 1000]}\n" for k in range(10_000))
    started = time.monotonic()
    items = read_dataset(root, written(tmp_path / "val.txt", rows), IMAGENET_CLASSES)
    assert time.monotonic() - started < 10
    assert [item.labels[0] for item in items] == [k % 1000 for k in range(10_000)]
