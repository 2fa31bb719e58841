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
from diffattack.common.errors import DatasetError, note
from diffattack.data.class_names import read_class_names
from diffattack.data.classes import (
    DEVELOPMENT_KIT,
    IMAGENET_CLASSES,
    ClassFinder,
    ClassNames,
    indistinct,
    permutation_of,
)
from diffattack.data.dataset import list_images, read_dataset, target_label
from diffattack.data.labels import Labels

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
    with pytest.raises(DatasetError, match="'crane bird' .label 135, n02012849. or 'crane' .label 518, n031"):
        read_dataset(images(tmp_path / "r", "crane/a.png"), None, IMAGENET_CLASSES)
    assert labels_of(images(tmp_path / "s", "Cardigan/a.png"), None, IMAGENET_CLASSES) == {
        "Cardigan/a.png": 264
    }


@pytest.mark.parametrize("line", ["CARDIGAN", "crane", "Maillot"])
def test_a_label_of_an_ambiguous_name_is_refused(tmp_path, line):
    root, path = images(tmp_path / "r", "a.png", "b.png"), written(tmp_path / "l.txt", f"{line}\ncardigan\n")
    with pytest.raises(DatasetError, match="line 1 .* may be .* or .*; give the label or WordNet id"):
        read_dataset(root, path, IMAGENET_CLASSES)


# ---------------------------------------------------------------- outputs of a classifier


def test_imagenets_names_in_another_order_are_matched_but_for_those_that_are_equal():
    order = random.Random(0).sample(range(1000), 1000)
    official = [IMAGENET_CLASSES.other_names.get(k, name) for k, name in enumerate(IMAGENET_CLASSES)]
    official[639] = "maillot, tank suit"
    found = permutation_of([official[k] for k in order], IMAGENET_CLASSES)
    wrong = [k for k in range(1000) if order[found[k]] != k]
    assert set(wrong) <= {134, 517}
    assert indistinct([official[k] for k in order], found) == [134, 517]
    assert permutation_of(official, IMAGENET_CLASSES) == list(range(1000))
    assert indistinct(official, list(range(1000))) == []


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


OFFICIAL = ["crane" if k == 134 else name for k, name in enumerate(IMAGENET_CLASSES)]


def test_a_head_with_imagenets_names_in_another_order_is_put_right(vit, capsys):
    picture = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    straight = load_classifier(vit(IMAGENET_CLASSES, list(range(1000))), IMAGENET_CLASSES)(picture)
    order = random.Random(0).sample(range(1000), 1000)
    for names in (IMAGENET_CLASSES, OFFICIAL, IDS):
        other = load_classifier(vit(names, order), IMAGENET_CLASSES)
        apart = (other(picture) != straight)[0].nonzero().flatten().tolist()
        assert set(apart) <= ({134, 517} if names is OFFICIAL else set())
        assert "matched by their names" in capsys.readouterr().err
        note.cache_clear()


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
    with pytest.raises(DatasetError, match="no class has the WordNet id 'n00000001'"):
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
        ("l.csv", "ImageId,PredictionString\nb,n02113186 1 2 3 4 n02113186 5 6 7 8 \na,n01440764 1 2 3 4\n"),
        ("l.txt", "val/a.png n01440764\nval/b.png n02113186\n"),
        ("l.txt", "1 n01440764\n2 n02113186\n"),
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
    with pytest.raises(DatasetError, match="labels count from 1, so expected 1 to 1000"):
        read_dataset(root, written(tmp_path / "l.txt", "0\n1\n2\n3\n"), names)


def test_classes_of_a_list_of_wordnet_ids(tmp_path):
    names = read_class_names(written(tmp_path / "c.txt", "n02113186\nn01440764\n"))
    assert names == ("Cardigan", "tench") and names.wordnet_ids == ("n02113186", "n01440764")


# ---------------------------------------------------------------- numbers before labels


@pytest.mark.parametrize("text", ["1 348\n2 286\n", "0 348\n1 286\n", "1,348\n2,286\n", "1\t348\n2\t286"])
def test_a_first_column_that_counts_images(tmp_path, capsys, text):
    root = images(tmp_path / "r", "a.png", "b.png")
    found = labels_of(root, written(tmp_path / "l.txt", text), IMAGENET_CLASSES)
    assert found == {"a.png": 347, "b.png": 285}
    assert "first column of" in capsys.readouterr().err


def test_numbers_of_images_that_are_a_part_of_a_set(tmp_path):
    root = images(tmp_path / "r", "ILSVRC2012_val_00000002.png", "ILSVRC2012_val_00000005.png")
    for text in ("2 286\n5 100\n", "\n".join(f"{k} {90 + k}" for k in range(1, 9))):
        labels = list(labels_of(root, written(tmp_path / "l.txt", text), IMAGENET_CLASSES).values())
        assert labels == ([285, 99] if text.startswith("2") else [91, 94])


@pytest.mark.parametrize("names, text", [(("a",), "1 348\n"), (("img1", "img2", "img3"), "2 9\n3 8\n1 7\n")])
def test_numbers_that_may_be_labels_are_refused(tmp_path, names, text):
    root = images(tmp_path / "r", *(f"{name}.png" for name in names))
    with pytest.raises(DatasetError, match="may be an image's number and its label, or two labels"):
        read_dataset(root, written(tmp_path / "l.txt", text), IMAGENET_CLASSES)


def test_several_labels_are_said(tmp_path, capsys):
    root = images(tmp_path / "r", "a.png", "b.png")
    items = read_dataset(root, written(tmp_path / "l.txt", "3 17\n5\n"), IMAGENET_CLASSES)
    assert [item.labels for item in items] == [(2, 16), (4,)]
    assert "1 of 2 lines of" in capsys.readouterr().err


def test_cubs_labels_go_by_the_names_of_its_list(tmp_path):
    names = ["001.Black_footed_Albatross/Black_46.jpg", "002.Laysan_Albatross/Laysan_3.jpg"]
    written(tmp_path / "images.txt", f"1 {names[0]}\n2 {names[1]}\n3 003.Other/Other_1.jpg\n")
    labels = written(tmp_path / "image_class_labels.txt", "1 1\n2 2\n3 3\n")
    classes = ("Black footed Albatross", "Laysan Albatross", "Other")
    root = images(tmp_path / "images", *names)
    assert list(labels_of(root, labels, classes).values()) == [0, 1]
    assert labels_of(root, None, classes) == labels_of(root, labels, classes)  # the folders say the same
    flat = images(tmp_path / "flat", "Laysan_3.jpg")  # one of them, by its name and not by its place
    assert labels_of(flat, labels, classes) == {"Laysan_3.jpg": 1}


def test_stanford_cars_annotations(tmp_path):
    rows = np.array([("00002.jpg", 2), ("00001.jpg", 3)], [("fname", object), ("class", object)])
    savemat(tmp_path / "cars_annos.mat", {"annotations": rows[None]})
    root = images(tmp_path / "r", "00001.jpg", "00002.jpg")
    assert labels_of(root, tmp_path / "cars_annos.mat", ("a", "b", "c")) == {"00001.jpg": 2, "00002.jpg": 1}


# ---------------------------------------------------------------- names in tables


def test_paths_in_a_table_tell_folders_apart(tmp_path):
    root = images(tmp_path / "r", "c1/0001.png", "c2/0001.png")
    table = written(tmp_path / "l.csv", "filename,label\nc2/0001.png,5\nc1/0001.png,4\n")
    assert labels_of(root, table, IMAGENET_CLASSES) == {"c1/0001.png": 3, "c2/0001.png": 4}
    one = images(tmp_path / "c2", "0001.png")  # a folder of its own
    assert labels_of(one, table, IMAGENET_CLASSES) == {"0001.png": 4}
    with pytest.raises(DatasetError, match="no row for c3/0001.png"):
        read_dataset(images(root, "c3/0001.png"), table, IMAGENET_CLASSES)


@pytest.mark.parametrize(
    "files, text, message",
    [
        (("c1/1.png", "c2/1.png"), "filename,label\n1.png,4\n", "line 2 .* may be of 'c1/1.png' or of 'c2/1"),
        (("a.png", "a.jpg"), "filename,label\na,4\n", "may be of 'a.*' or of 'a"),
        (("x/1.png", "y/2.png"), "filename,label\nc1/1.png,4\nc2/2.png,5\n", "no row for x/1.png"),
        (("a.png",), "filename,label,Label\na.png,4,5\n", "two columns 'Label'"),
        (("a.png",), "filename,label,class\na.png,475,tench\n", "475.* is 'cardigan', and beside it 'tench'"),
    ],
)
def test_rows_that_could_be_of_several_images_or_classes(tmp_path, files, text, message):
    with pytest.raises(DatasetError, match=message):
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
    for content in ({"a.png": 4, "b.png": [7, 9]}, {"labels": [["x/b.png", [7, 9]], ["x/a.png", 4]]}):
        items = read_dataset(root, written(tmp_path / "l.json", json.dumps(content)), IMAGENET_CLASSES)
        assert [item.labels for item in items] == [(3,), (6, 8)]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "image,No Finding,cat,Red_Fox,sex\nb.jpg,0,1,1,m\nc.jpg,0,0,0,\na.jpg,,0.0,1.0,f\n"),
        ("a.csv", "Image Index,Finding Labels\nb.jpg,cat|red fox\na.jpg,red fox\n"),
        ("a.jsonl", '{"file_name": "b", "cat": true, "red fox": 1}\n{"file_name": "a", "red fox": true}\n'),
        (
            "a.json",
            json.dumps(
                {
                    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 9, "file_name": "a.jpg"}],
                    "annotations": [
                        {"image_id": image, "category_id": category}
                        for image, category in ((9, 18), (7, 17), (7, 18), (7, 17))
                    ],
                    "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "red fox"}],
                }
            ),
        ),
    ],
)
def test_several_labels_in_the_forms_of_medical_data_and_coco(tmp_path, name, text):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    found = read_dataset(tmp_path / "photos", written(tmp_path / name, text), ("cat", "hen", "red fox"))
    assert [item.labels for item in found] == [(2,), (0, 2)]


def test_what_columns_of_classes_leave_open_is_refused_where_it_is_used(tmp_path):
    images(tmp_path / "photos", "a.jpg")
    table = written(tmp_path / "l.csv", "image,cat,hen\na.jpg,-1.0,0\nb.jpg,0,1\n")
    with pytest.raises(DatasetError, match="line 2 of .* says -1.0 of 'cat'; expected 1"):
        read_dataset(tmp_path / "photos", table, ("cat", "hen"))
    (tmp_path / "photos/a.jpg").rename(tmp_path / "photos/b.jpg")
    assert labels_of(tmp_path / "photos", table, ("cat", "hen")) == {"b.jpg": 1}
    written(table, "image,cat,hen\nb.jpg,0,0\n")
    with pytest.raises(DatasetError, match="line 2 of .* has no label; give it one"):
        read_dataset(tmp_path / "photos", table, ("cat", "hen"))


def test_cocos_categories_are_classes_in_the_order_of_their_ids(tmp_path):
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]
    path = written(tmp_path / "instances.json", json.dumps({"categories": categories, "images": []}))
    assert read_class_names(path) == ("person", "cat", "dog")


def test_tiny_imagenets_annotations_with_boxes(tmp_path):
    images(tmp_path / "photos", "val_0.JPEG", "val_1.JPEG")
    text = f"val_0.JPEG\t{IDS[5]}\t0\t32\t44\t62\nval_1.JPEG\t{IDS[3]}\t52\t55\t57\t59\n"
    path = written(tmp_path / "val_annotations.txt", text)
    assert list(labels_of(tmp_path / "photos", path, IMAGENET_CLASSES).values()) == [5, 3]


@pytest.mark.parametrize("heading", ["label", "# labels of 2026", "Class"])
def test_a_heading_above_labels_a_line(tmp_path, heading):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    path = written(tmp_path / "l.csv", f"{heading}\n2\n1\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen")).values()) == [1, 0]


def test_rows_of_images_that_are_called_otherwise_now(tmp_path, capsys):
    path = written(tmp_path / "l.csv", "image,label\nc2/img10.png,1\nc2/img2.png,2\nc1/img3.png,3\n")
    clean = [Path(f"000{k}_originImage.png") for k in range(3)]
    assert Labels(path, ("cat", "hen", "fox"), 1).of_images_in_order(clean) == [(2,), (1,), (0,)]
    assert "in the natural order of their names" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, message",
    [
        ("beagle_1 5 2 2\npug_1 6 2 3\n", "has 3 numbers after the image"),  # Oxford-IIIT Pet
        ("beagle_1.jpg,10,20,100,200,5\npug_1.jpg,1,2,3,4,6\n", "has 5 numbers after the image"),
        ("beagle_1.jpg 1.0 0.0\npug_1.jpg 0.0 1.0\n", "has 2 numbers after the image"),
        ("1 5 500 375\n2 6 500 333\n", "has 3 numbers after the image"),
        ("0 0 1 0 0\n1 0 0 0 0\n", "ones and zeros|4 numbers after the image"),
        (f"beagle_1 {IDS[3]} 64 64\npug_1 {IDS[4]} 64 64\n", "gives a WordNet id and numbers"),
    ],
)
def test_numbers_that_are_no_labels_are_refused(tmp_path, lines, message):
    images(tmp_path / "photos", "beagle_1.jpg", "pug_1.jpg")
    for base in (0, 1):
        with pytest.raises(DatasetError, match=message):
            labels_of(tmp_path / "photos", written(tmp_path / "l.txt", lines), IMAGENET_CLASSES, base)


@pytest.mark.parametrize("rows", [([0, 0, 1], [0, 1, 0]), ([0, 1], [1, 0])])
def test_a_number_for_each_class_is_no_list_of_labels(tmp_path, rows):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    path = written(tmp_path / "l.json", json.dumps(dict(zip(("a.jpg", "b.jpg"), rows))))
    with pytest.raises(DatasetError, match="is ones and zeros"):
        labels_of(tmp_path / "photos", path, ("cat", "hen", "fox")[: len(rows[0])], 0)


def test_several_labels_of_some_images_are_said(tmp_path, capsys):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    path = written(tmp_path / "l.txt", "a.jpg 1 2\nb.jpg 3\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen", "fox")).values()) == [0, 2]
    assert "give several labels, such as line 1" in capsys.readouterr().err


def test_a_column_of_file_names_is_before_one_of_numbers(tmp_path):
    images(tmp_path / "photos", "0.png", "1.png")
    path = written(tmp_path / "l.csv", "image_id,file_name,label\n0,1.png,1\n1,0.png,2\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen")).values()) == [1, 0]


def test_a_name_beside_a_label_is_looked_at(tmp_path):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    path = written(tmp_path / "l.csv", "filename,label,label_name\na.jpg,0,cat\nb.jpg,1,hen\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen", "fox"), 0).values()) == [0, 1]
    written(path, "filename,label,name\na.jpg,1,hen\nb.jpg,2,fox\n")
    with pytest.raises(DatasetError, match="and beside it 'hen'; --label_base"):
        labels_of(tmp_path / "photos", path, ("cat", "hen", "fox"))


@pytest.mark.parametrize(
    "content",
    [
        {"1": "cat", "2": "dog", "3": "bird"},  # Oxford's flowers
        {"dog": 1, "cat": 0, "bird": 2},
        {"label2id": {"dog": 1, "cat": 0, "bird": 2}},
        {"names": ["cat", "dog", "bird"]},
        [{"id": 7, "name": "dog"}, {"id": 9, "name": "bird"}, {"id": 1, "name": "cat"}],
    ],
)
def test_class_names_in_forms_of_json(tmp_path, content):
    path = written(tmp_path / "c.json", json.dumps(content))
    assert read_class_names(path) == ("cat", "dog", "bird")


def test_a_table_of_excels_and_folders_of_a_macs_archive(tmp_path):
    images(tmp_path / "photos", "a.jpg", "b.jpg")
    path = written(tmp_path / "l.csv", "sep=;\nfilename;label\nb.jpg;1\na.jpg;2\n")
    assert list(labels_of(tmp_path / "photos", path, ("cat", "hen")).values()) == [1, 0]
    images(tmp_path / "folders", "cat/a.jpg", "__MACOSX/._a.jpg")
    assert labels_of(tmp_path / "folders", None, ("cat", "hen")) == {"cat/a.jpg": 0}


@pytest.mark.parametrize(
    "text",
    [
        "bird 2\ncat 0\ndog 1\n",
        "2 bird\n0 cat\n1 dog\n",
        "1. cat\n2. dog\n3. bird\n",
        "1) cat\n2) dog\n3) bird\n",
        "1 - cat\n2 - dog\n3 - bird\n",
        "/c/cat 0\n/d/dog 1\n/b/bird 2\n",
        "class_name\ncat\ndog\nbird\n",
        "# classes\ncat\ndog\nbird\n",
        "names:\n- cat\n- dog\n- bird\n",
    ],
)
def test_numbers_and_headings_are_no_part_of_class_names(tmp_path, text):
    assert read_class_names(written(tmp_path / "c.txt", text)) == ("cat", "dog", "bird")


def test_folders_that_look_like_classes_in_another_order_are_refused(tmp_path):
    images(tmp_path, "Dogs/a.jpg", "cats/a.jpg")
    with pytest.raises(DatasetError, match="does not have the place of its class among them"):
        labels_of(tmp_path, None, ("cat", "dog"))


def test_images_that_lie_deeper(tmp_path):
    images(tmp_path, "val/cat/a.jpg")
    with pytest.raises(DatasetError, match="lie deeper, as 'val/cat/a.jpg'; give --images_root '.*val'"):
        list_images(tmp_path)


def test_classes_that_are_called_by_numbers(tmp_path):
    root, digits = images(tmp_path / "r", "a.png"), ClassNames(map(str, range(10)))
    path = written(tmp_path / "l.txt", "7\n")
    assert labels_of(root, path, digits, 0) == {"a.png": 7}
    with pytest.raises(DatasetError, match="as a name and as a label that counts from 1"):
        read_dataset(root, path, digits, 1)


# ---------------------------------------------------------------- folders


def test_a_folder_that_is_called_like_an_image_is_none(tmp_path, capsys):
    root = images(tmp_path / "r", "a.png", "b.png")
    (root / "x.jpg").mkdir()
    os.mkfifo(root / "pipe.png")
    assert [path.name for path in list_images(root)] == ["a.png", "b.png"]
    assert capsys.readouterr().err.rstrip().endswith("skipped: pipe.png, x.jpg/")


def test_a_link_that_leads_nowhere_keeps_its_place(tmp_path):
    root = images(tmp_path / "r", "a.png", "c.png")
    (root / "b.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in list_images(root)] == ["a.png", "b.png", "c.png"]


def test_folders_that_are_neither_names_nor_in_order(tmp_path):
    root = images(tmp_path / "r", "cat/a.png", "dog/a.png", "unknown/a.png")
    with pytest.raises(DatasetError, match="'unknown', .* and 'cat' does not have the place of its class"):
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
