"""Labels that are not those of the images are recognised before an attack, by what a classifier sees in real
photographs; right ones are left alone.
"""

import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import MAIN, ROOT, flags, network, run

from diffattack.classifiers.registry import load_classifier
from diffattack.common.errors import InputError
from diffattack.data.classes import DEVELOPMENT_KIT, IMAGENET_CLASSES, read_class_names
from diffattack.data.dataset import read_dataset
from diffattack.evaluation.warnings import check_labels
from diffattack.options import Options
from diffattack.runner.setup import Experiment, clean_accuracies


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, list[int]]:
    """34 photographs, img1 to img34, and their labels, counted from 1."""
    folder, numbers = tmp_path_factory.mktemp("clean") / "photos", []
    folder.mkdir()
    for place, file in (("images", "labels.txt"), ("heldout", "heldout_labels.txt")):
        for item in read_dataset(ROOT / "demo" / place, ROOT / "demo" / file, IMAGENET_CLASSES):
            numbers.append(item.labels[0] + 1)
            shutil.copy(item.path, folder / f"img{len(numbers)}{item.path.suffix}")
    return folder, numbers


@pytest.fixture(scope="module")
def surrogate() -> torch.nn.Module:
    return load_classifier("efficientnet_lite0", 1000)


def looked_at(folder, path, surrogate, base=1, captions=None, limit=None):
    options = Options(images_root=folder, label_path=path, label_base=base, limit=limit)
    options.fill_in_defaults()
    names = IMAGENET_CLASSES if captions is None else read_class_names(captions)
    items = read_dataset(folder, path, names, base)
    experiment = Experiment(options, names, items, torch.device("cpu"), torch.float32, {})
    return clean_accuracies(experiment, items[:limit], [surrogate])


def right_of_34(accuracy) -> int:
    return int(re.fullmatch(r".* is right on (\d+) of 34 clean images", accuracy.description)[1])


def file_of(tmp_path, labels) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(map(str, labels)))
    return path


def test_right_labels_are_counted_and_two_hundred_images_take_seconds(photos, surrogate, tmp_path, capsys):
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, photos[1]), surrogate)
    assert right_of_34(accuracy) >= 28 and not accuracy.doubt
    check_labels([accuracy], trusted=False)
    assert "is right on" in capsys.readouterr().err
    (tmp_path / "many").mkdir()
    for k in range(200):
        shutil.copy(photos[0] / f"img{k % 34 + 1}.jpg", tmp_path / "many" / f"img{k + 1}.jpg")
    labels, started = file_of(tmp_path, [photos[1][k % 34] for k in range(200)]), time.monotonic()
    (accuracy,) = looked_at(tmp_path / "many", labels, surrogate)
    assert time.monotonic() - started < 20 and not accuracy.doubt


def as_text(labels):
    """The labels in the order of the names sorted as text."""
    return [labels[k] for k in sorted(range(len(labels)), key=lambda k: f"img{k + 1}")]


def of_the_kit(labels):
    return [DEVELOPMENT_KIT.index(label - 1) + 1 for label in labels]


def mixed(labels):
    return random.Random(0).sample(labels, len(labels))


@pytest.mark.parametrize(
    "made, base, advice",
    [
        (lambda labels: [label - 1 or 1 for label in labels], 1, "labels one higher; give --label_base 0"),
        (lambda labels: labels, 0, "labels one lower; give --label_base 1"),
        (as_text, 1, "sorted as text .*give a table"),
        (of_the_kit, 1, "development kit; give its meta.mat"),
        (lambda labels: [n - 1 for n in of_the_kit(labels)], 1, "development kit; .* add one to each"),
        (mixed, 1, "as by chance: the labels are not those of the images"),
    ],
)
def test_labels_that_are_off_stop_a_run_with_what_would_fit(photos, surrogate, tmp_path, made, base, advice):
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, made(photos[1])), surrogate, base)
    with pytest.raises(InputError, match=f"is right on .*{advice}.*--trust_labels"):
        check_labels([accuracy], trusted=False)
    check_labels([accuracy], trusted=True)


@pytest.mark.parametrize("first, base, advice", [(1, 1, "kit; give its meta.mat"), (0, 0, "add one to each")])
def test_folders_numbered_in_the_order_of_the_kit_are_named(photos, surrogate, tmp_path, first, base, advice):
    for k, number in enumerate(of_the_kit(photos[1]), 1):
        folder = tmp_path / "root" / str(number - 1 + first)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[0] / f"img{k}.jpg", folder)
    (accuracy,) = looked_at(tmp_path / "root", None, surrogate, base)
    with pytest.raises(InputError, match=f"is right on .*{advice}") as caught:
        check_labels([accuracy], trusted=False)
    assert "--label_path" not in str(caught.value)


def test_the_order_of_the_development_kit_is_read_where_it_is_given(photos, surrogate, tmp_path):
    kit, ids = tmp_path / "map_clsloc.txt", IMAGENET_CLASSES.wordnet_ids
    rows = [(ids[k], n, IMAGENET_CLASSES[k].replace(" ", "_")) for n, k in enumerate(DEVELOPMENT_KIT, 1)]
    kit.write_text("".join(f"{i} {number} {name}\n" for i, number, name in rows))
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, of_the_kit(photos[1])), surrogate, captions=kit)
    assert right_of_34(accuracy) >= 28 and not accuracy.doubt
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, photos[1]), surrogate, captions=kit)
    assert accuracy.is_certain and accuracy.doubt.endswith("leave --captions out")


def test_few_images_are_enough_to_see_a_shift_and_random_weights_are_no_evidence(photos, surrogate, tmp_path):
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, photos[1]), surrogate, 0, limit=4)
    assert accuracy.is_certain
    (accuracy,) = looked_at(photos[0], file_of(tmp_path, photos[1]), network(1000).eval())
    assert accuracy.doubt and not accuracy.is_certain and "is not trained" in accuracy.doubt


def test_a_folder_whose_only_picture_is_damaged_is_a_line(data, quick, photos, tmp_path):
    folder, out = tmp_path / "cut", tmp_path / "out"
    folder.mkdir()
    (folder / "img0.jpg").write_bytes((photos[0] / "img1.jpg").read_bytes()[:3000])
    options = ["--model_name", quick, "--images_root", folder, "--label_path", file_of(tmp_path, [1])]
    result = run([*MAIN, *flags(data, out, *options)])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    line = "img0.jpg: img0.jpg is not a readable image"
    assert line in (out / "0000_failed.txt").read_text() and f"not attacked: {line}" in result.stdout
