"""A user's own classifier of ten classes, with captions and one folder a class, attacked by one command, as
README shows it.
"""

import json

import numpy as np
import pytest
import skimage.data
import torch
from conftest import MAIN, succeed
from PIL import Image
from torch import nn

SIDE = 96
NAMES = "astronaut brick chelsea coffee coins grass gravel moon page rocket".split()  # of scikit-image
CLASSES = ["cat" if name == "chelsea" else "printed page" if name == "page" else name for name in NAMES]


def crops(picture: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Squares of 120 pixels at random places, scaled down: uint8 (count, SIDE, SIDE, 3)."""
    picture = Image.fromarray(picture).convert("RGB")
    places = random.integers(0, np.array(picture.size[::-1]) - 119, (count, 2)).tolist()
    parts = [picture.crop((x, y, x + 120, y + 120)).resize((SIDE, SIDE), Image.LANCZOS) for y, x in places]
    return np.stack([np.asarray(part) for part in parts])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A classifier trained for some seconds and saved as TorchScript; captions, in another order than the
    folders; and crops it has not seen, one folder a class.
    """
    folder, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    torch.manual_seed(0)
    pictures = [getattr(skimage.data, name)() for name in NAMES]
    order = random.permutation(len(CLASSES))  # label k is class order[k]
    images = torch.from_numpy(np.concatenate([crops(pictures[c], 48, random) for c in order]))
    images = images.permute(0, 3, 1, 2).float() / 255
    labels = torch.arange(len(CLASSES)).repeat_interleave(48)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in ((3, 16), (16, 32), (32, 64))
    ]
    network = nn.Sequential(
        nn.BatchNorm2d(3), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.jit.script(network.eval()).save(folder / "classifier.ts")
    (folder / "captions.txt").write_text("\n".join(CLASSES[c] for c in order) + "\n")
    for picture, name in zip(pictures, CLASSES):
        path = folder / "crops" / name.replace(" ", "_") / "crop.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(crops(picture, 1, random)[0]).save(path)
    return folder, [CLASSES[c] for c in order]


def attack(folder, extra=""):
    text = f"""--images_root {folder}/crops --captions {folder}/captions.txt --weight_mode fixed
        --model_name {folder}/classifier.ts --save_dir {folder}/out --res {SIDE} --iterations 12 --draws 2
        --start_step 18 --limit 3 --figures none --budget psnr=28 --contrast_limit 0
        --high_pass 0 --colour 1"""
    return succeed([*MAIN, *text.split(), *extra.split()])


def test_one_command_attacks_it(own):
    folder, class_names = own
    result = attack(folder)
    results = json.loads((folder / "out/results.json").read_text())
    rows = results["images"]
    assert [row["class"] for row in rows] == [class_names[row["label"] - 1] for row in rows]
    assert [row["class"] for row in rows] == sorted(CLASSES)[:3]
    assert len(list((folder / "out").glob("000?_diff_classifier.ts_image_*.png"))) == 3
    surrogate = results["classifiers"][0]
    assert surrogate["accuracy_before"]["count"] == 3  # crops that it has not seen
    assert surrogate["success"]["value"] >= 0.5, result.stdout
    assert all(row["psnr"] > 20 for row in rows) and "warning" not in result.stdout


def test_it_is_checked_before(own, data):
    folder, _ = own
    result = attack(folder, f"--check --save_dir {folder}/none --pretrained_diffusion_path {data}/model")
    parts = "10, of 10 classes|astronaut/crop.png: astronaut|dB, which is not seen|peak memory"
    for part in parts.split("|"):
        assert part in result.stdout
    assert not (folder / "none").exists()
