"""The Frechet distance to a file of statistics, and files that are none."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.linalg import sqrtm

import main
from diffattack.common.errors import InputError
from diffattack.data.images import read_image
from diffattack.evaluation.distances import (
    Reference,
    distance_to,
    feature_network,
    features_of,
    frechet_distance,
    quality_of,
    read_reference,
)
from diffattack.evaluation.metrics import measures

CPU = torch.device("cpu")
NETWORK = "efficientnet_lite2"  # what judges where there is no Inception and it is no surrogate


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([read_image(path, 96) for path in sorted((ROOT / "demo/images").iterdir())])


@pytest.fixture(scope="module")
def features(pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the demo's photographs, and of these a little darker: `(12, 1280)` each."""
    found = feature_network([])
    assert (found.name, found.dimension) == (NETWORK, 1280)
    return features_of(found.network, pictures, CPU), features_of(found.network, pictures // 2, CPU)


def reference_of(features: torch.Tensor) -> Reference:
    return Reference(features.mean(0), torch.cov(features.T))


@pytest.mark.parametrize("dimension", [6, 11, 30])  # fewer features than pictures, as many, more
def test_the_distance_is_that_of_the_formula(features, dimension):
    clean, other = (each[:, :dimension] for each in features)
    reference = reference_of(clean)
    if dimension > 11:  # of more pictures than these
        reference = Reference(reference.mean, reference.covariance + 0.1 * torch.eye(dimension).double())
    mean, covariance = other.mean(0).numpy(), np.cov(other.numpy().T)
    sigma = reference.covariance.numpy()
    # as it is usually computed; where S has not full rank, by a matrix that is similar and symmetric
    half = np.real(sqrtm(sigma))
    product = covariance @ sigma if dimension == 6 else half @ covariance @ half
    expected = (
        np.square(mean - reference.mean.numpy()).sum()
        + np.trace(covariance + sigma)
        - 2 * np.trace(np.real(sqrtm(product)))
    )
    assert distance_to(reference, other) == pytest.approx(expected, rel=1e-6)


def test_the_distance_to_the_clean_pictures_own_statistics_is_the_other_row(features):
    clean, other = features
    assert distance_to(reference_of(clean), other) == pytest.approx(frechet_distance(clean, other), rel=1e-6)
    assert distance_to(reference_of(clean), clean) == pytest.approx(0, abs=1e-6)


def test_the_row_is_its_own_and_its_note_has_the_clean_images(pictures, features, tmp_path):
    clean, other = features
    np.savez(tmp_path / "ref.npz", mu=other.mean(0), sigma=np.cov(other.numpy().T), arr_0=np.zeros(3))
    by_image = [measures(pictures, pictures // 2, CPU)]
    quality = quality_of(by_image, features, feature_network([]), tmp_path / "ref.npz")
    row = quality[f"Frechet distance to ref.npz, {NETWORK}"]
    assert row.adversarial.value == pytest.approx(0, abs=1e-4) and row.by_image is None
    expected = distance_to(reference_of(other), clean)
    assert float(re.match(r"(\S+) for the clean images; biased with 12", row.note)[1]) == pytest.approx(
        expected, rel=5e-3
    )
    assert quality[f"Frechet distance, {NETWORK}"].adversarial.value == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- files that cannot be used

GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}
TILTED = np.eye(4) + np.triu(np.ones((4, 4)), 1)
BAD_FILES = {
    "absent": (None, "is no file"),
    "text": (b"mu sigma", r"is no \.npz file"),
    "no sigma": ({"mu": GOOD["mu"]}, "has no sigma; expected mu and sigma"),
    "neither": ({"arr_0": GOOD["mu"]}, "has no mu and no sigma"),
    "pickled": (GOOD | {"mu": np.array([None] * 4)}, "cannot be read .* allow_pickle=False"),
    "shapes": (GOOD | {"sigma": np.eye(5)}, r"mu is of shape \(4,\) and sigma of \(5, 5\)"),
    "a row": (GOOD | {"mu": np.zeros((1, 4))}, r"mu is of shape \(1, 4\)"),
    "NaN": (GOOD | {"mu": np.array([0, 0, np.nan, 0])}, "not a finite"),
    "infinite": (GOOD | {"sigma": np.diag([1, 1, 1, np.inf])}, "not a finite"),
    "words": (GOOD | {"mu": np.array(["a", "b", "c", "d"])}, "not a finite"),
    "tilted": (GOOD | {"sigma": TILTED}, "sigma is not symmetric"),
    "of another network": ({"mu": np.zeros(6), "sigma": np.eye(6)}, "of 6 features, .* here, net, has 4"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_holds_no_such_statistics_is_refused(tmp_path, case):
    content, message = BAD_FILES[case]
    path = tmp_path / "ref.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(InputError, match=rf"^--fid_reference: '.*ref\.npz'.*{message}") as error:
        read_reference(path, "net", 4)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused_and_a_good_one_is_read(tmp_path):
    path = tmp_path / "ref.npz"
    np.savez_compressed(path, **GOOD | {"mu": np.float32([1, 2, 3, 4])})
    found = read_reference(path, "net", 4)
    assert found.mean.tolist() == [1, 2, 3, 4] and found.covariance.dtype == torch.float64
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as an .npz file"):
        read_reference(path, "net", 4)


@pytest.mark.parametrize("program", ["main", "main --is_test"])
def test_it_is_refused_before_anything_is_done(tmp_path, capsys, monkeypatch, program):
    monkeypatch.chdir(ROOT)
    np.savez(tmp_path / "ref.npz", **GOOD)
    source = tmp_path / "in"
    source.mkdir()
    picture = read_image(sorted((ROOT / "demo/images").iterdir())[0], 96)
    for name in ("0_originImage.png", "0_adv_image.png") if "test" in program else ("a.png",):
        Image.fromarray(picture).save(source / name)
    (tmp_path / "labels.txt").write_text("1\n")
    arguments = [
        "--images_root",
        source,
        "--label_path",
        tmp_path / "labels.txt",
        "--save_dir",
        tmp_path / "out",
    ]
    code = main.main(
        [*program.split()[1:], *map(str, arguments), "--fid_reference", str(tmp_path / "ref.npz")]
    )
    assert code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert re.fullmatch(r"main\.py: error: --fid_reference: [^\n]+ is of 4 features[^\n]+\n", error), error
