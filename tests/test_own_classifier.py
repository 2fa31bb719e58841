"""A user's own classifier of ten classes, with captions and one folder a class, attacked by one command, as
README shows it.
"""

import json

import numpy as np
import pytest
import skimage.data
import torch
from conftest import MAIN, run
from PIL import Image

SIDE = 96
CLASSES = (
    "astronaut",
    "brick",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "printed page",
    "rocket",
)
SOURCES = (
    "astronaut",
    "brick",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "page",
    "rocket",
)  # of scikit-image


def crops(picture: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Squares of 120 pixels at random places, scaled down: uint8 (count, SIDE, SIDE, 3)."""
    picture = np.asarray(Image.fromarray(picture).convert("RGB"))
    places = random.integers(0, np.array(picture.shape[:2]) - 119, (count, 2))
    return np.stack(
        [
            np.asarray(Image.fromarray(picture[y : y + 120, x : x + 120]).resize((SIDE, SIDE), Image.LANCZOS))
            for y, x in places
        ]
    )


class SmallNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64)
        self.layers = torch.nn.Sequential(
            *[
                layer
                for a, b in zip(widths, widths[1:])
                for layer in (
                    torch.nn.Conv2d(a, b, 3, stride=2, padding=1),
                    torch.nn.BatchNorm2d(b),
                    torch.nn.ReLU(),
                )
            ],
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(256, len(CLASSES)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images - 0.5)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A classifier trained for some seconds and saved as TorchScript; captions, in another order than the
    folders; and crops it has not seen, one folder a class.
    """
    folder, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    torch.manual_seed(0)
    pictures = [getattr(skimage.data, source)() for source in SOURCES]
    order = random.permutation(len(CLASSES))  # label k is class order[k]
    images = (
        torch.from_numpy(np.stack([crops(pictures[c], 48, random) for c in order]))
        .flatten(0, 1)
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    labels = torch.arange(len(CLASSES)).repeat_interleave(48)
    network = SmallNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    network.eval()
    torch.jit.script(network).save(folder / "classifier.ts")
    (folder / "captions.txt").write_text("\n".join(CLASSES[c] for c in order) + "\n")
    for c, name in enumerate(CLASSES):
        (folder / "crops" / name.replace(" ", "_")).mkdir(parents=True)
        Image.fromarray(crops(pictures[c], 1, random)[0]).save(
            folder / "crops" / name.replace(" ", "_") / "crop.png"
        )
    return folder, [CLASSES[c] for c in order]


def command(folder, *extra):
    return [
        *MAIN,
        "--images_root",
        folder / "crops",
        "--captions",
        folder / "captions.txt",
        "--model_name",
        folder / "classifier.ts",
        "--save_dir",
        folder / "out",
        "--res",
        SIDE,
        "--iterations",
        12,
        "--draws",
        2,
        "--start_step",
        18,
        "--limit",
        3,
        "--weight_mode",
        "fixed",
        "--figures",
        "none",
        "--budget",
        "psnr=28",
        "--contrast_limit",
        "none",
        *extra,
    ]


def test_one_command_attacks_it(own):
    folder, class_names = own
    result = run(list(map(str, command(folder))))
    assert result.returncode == 0, result.stderr
    results = json.loads((folder / "out/results.json").read_text())
    rows = results["images"]
    assert (
        [row["class"] for row in rows]
        == [class_names[row["label"] - 1] for row in rows]
        == sorted(CLASSES)[:3]
    )
    assert len(list((folder / "out").glob("000?_diff_classifier.ts_image_*.png"))) == 3
    surrogate = results["classifiers"][0]
    assert surrogate["accuracy_before"]["count"] == 3  # crops that it has not seen
    assert surrogate["success"]["value"] >= 0.5, result.stdout
    assert all(row["psnr"] > 20 for row in rows) and "warning" not in result.stdout


def test_it_is_checked_before(own, data):
    folder, _ = own
    result = run(
        list(
            map(
                str,
                command(
                    folder,
                    "--check",
                    "--save_dir",
                    folder / "none",
                    "--pretrained_diffusion_path",
                    data / "model",
                ),
            )
        )
    )
    assert result.returncode == 0, result.stderr
    for part in (
        "10, of 10 classes",
        "astronaut/crop.png: astronaut",
        "dB, which is not seen",
        "peak memory",
        "s an image",
    ):
        assert part in result.stdout
    assert not (folder / "none").exists()


def test_another_target(own, data):
    """Two images to one class that is neither's; several labels for one of them."""
    folder, class_names = own
    (folder / "two").mkdir()
    for name in ("brick", "moon"):
        (folder / "two" / f"{name}.png").write_bytes((folder / "crops" / name / "crop.png").read_bytes())
    number = {name: k for k, name in enumerate(class_names)}
    (folder / "two.csv").write_text(
        f"filename,label\nmoon.png,{number['moon']}\nbrick.png,{number['brick']} {number['coins']}\n"
    )
    result = run(
        list(
            map(
                str,
                command(
                    folder,
                    "--images_root",
                    folder / "two",
                    "--label_path",
                    folder / "two.csv",
                    "--label_base",
                    0,
                    "--target_label",
                    number["grass"],
                    "--iterations",
                    3,
                    "--save_dir",
                    folder / "targeted",
                    "--pretrained_diffusion_path",
                    data / "model",
                ),
            )
        )
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((folder / "targeted/results.json").read_text())["images"]
    assert (
        rows[0]["label"] == [number["brick"], number["coins"]]
        and rows[0]["class"] == "brick, coins"
        and rows[1]["label"] == number["moon"]
    )
    for row in rows:
        assert row["target_class"] == "grass" and row["fooled"] == (row["after"]["class"] == "grass")
