"""The small diffusion model and the photographs that ship with the project, and the stages of its
training.
"""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from natsort import natsorted
from safetensors import safe_open

from attentionControl import AttentionControlEdit
from diff_latent_attack import DiffAttack
from diffattack.data.images import read_image, to_pixels, to_tensor
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr

sys.path.insert(0, str(ROOT / "demo"))

import evaluate_tiny_diffusion as measure  # noqa: E402
import train_tiny_diffusion  # noqa: E402
import training_autoencoder as autoencoder  # noqa: E402
import training_teacher as teacher  # noqa: E402
import training_unet  # noqa: E402
from training_common import as_input  # noqa: E402

HELD_OUT = natsorted((ROOT / "demo/heldout").iterdir(), key=lambda path: path.name)
LABELS = [int(line) - 1 for line in (ROOT / "demo/heldout_labels.txt").read_text().split()]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu"))


def test_it_is_small_and_in_half_precision_safetensors():
    files = [path for path in (ROOT / "demo").rglob("*.*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}


def test_its_attention_grids_are_stable_diffusions(pipeline):
    controller = AttentionControlEdit(5)
    with torch.no_grad(), controller.attached(pipeline.unet), controller.collecting() as maps:
        pipeline.unet(torch.zeros(2, 48, 28, 28), 1, torch.zeros(2, 24, 128))
    assert [
        (layer.place, round(attention.shape[2] ** 0.5)) for layer, attention in maps.items() if layer.is_cross
    ] == [("down", 28), ("down", 14), ("down", 7), ("mid", 4), ("up", 7), ("up", 7), ("up", 14), ("up", 14)]


def test_the_autoencoder_keeps_the_photographs(pipeline):
    attack = DiffAttack(pipeline, torch.nn.Identity())
    figures = []
    for path in HELD_OUT:
        clean = read_image(path, 224)
        with torch.no_grad():
            figures.append(psnr(clean, to_pixels(attack.decode(attack.encode(to_tensor(clean)))[0])))
    assert len(figures) >= 20 and np.mean(figures) >= 33


def test_its_attention_stands_out_inside_the_boxes(pipeline):
    """Two of the held-out photographs, without null-text optimisation, which hardly changes where the
    conditional half looks.
    """
    attack = DiffAttack(pipeline, torch.nn.Identity(), is_apply_mask=True)
    masks = measure.read_boxes(ROOT / "demo/heldout_boxes.csv")
    assert set(masks) == {path.name for path in HELD_OUT}
    attack.optimise_null_text = lambda trajectory, classes, null: [null] * attack.num_timesteps
    for k in (5, 18):  # goose, spoonbill
        inversion = attack.invert(to_tensor(read_image(HELD_OUT[k], 224)), torch.tensor([LABELS[k]]))
        figures = measure.attention_figures(attack, inversion, masks[HELD_OUT[k].name])
        assert figures["inside over outside"] > 1.3
        assert figures["self-attention inside over chance"] > 1.2
        assert figures["entropy of self-attention"] < 0.9
        assert 0.02 < figures["hard mask covers"] < 0.9


# ---------------------------------------------------------------- training


def test_the_autoencoder_starts_as_a_lapped_transform_and_its_transpose(tmp_path):
    torch.manual_seed(0)
    crops = np.stack([read_image(path, 64) for path in HELD_OUT])
    kernel, start = (autoencoder.lapped_transform(crops, torch.device("cpu"), steps=k) for k in (30, 0))
    assert start[:, :, :4].abs().max() == 0  # it starts at patches of 8 x 8
    rows = kernel.flatten(1) @ kernel.flatten(1).T
    assert (rows - torch.eye(48)).abs().max() < 0.1
    mean, scale = torch.randn(48), torch.tensor(0.7)
    torch.save({"kernel": kernel, "mean": mean, "scale": scale}, tmp_path / "encoder.pt")
    encode, vae = autoencoder.Encoder(tmp_path, crops, torch.device("cpu")), autoencoder.build_autoencoder()
    autoencoder.set_to_transform(vae, encode)
    x = as_input(torch.from_numpy(crops[:3]))
    windows = F.unfold(x, 16, padding=4, stride=8)  # independent of conv2d and of pixel_unshuffle
    latents = ((kernel.flatten(1) @ windows).unflatten(2, (8, 8)) - mean.view(-1, 1, 1)) / scale
    with torch.no_grad():
        assert torch.allclose(encode(x), latents, atol=1e-4)
        assert torch.allclose(vae.encode(x).latent, latents, atol=1e-4)
        coefficients = (latents * scale + mean.view(-1, 1, 1)).flatten(2)
        expected = F.fold(kernel.flatten(1).T @ coefficients, (64, 64), 16, padding=4, stride=8)
        difference = (vae.decode(latents).sample - expected)[..., 8:-8, 8:-8]
        # but for the last normalisation, and the mean at the border
        assert difference.square().mean() < 1e-3 * expected.square().mean()


def test_targets_of_attention_against_plain_loops():
    torch.manual_seed(0)
    features = {28: torch.randn(1, 28, 28, 5), 14: torch.randn(1, 14, 14, 6), 7: torch.randn(1, 7, 7, 4)}
    target = teacher.self_attention_target(features, 7, 0.1)[0]
    centred = [row - features[7][0].flatten(0, 1).mean(0) for row in features[7][0].flatten(0, 1)]
    for i in (0, 17, 48):
        logits = [
            float(torch.dot(centred[i], other) / centred[i].norm() / other.norm()) / 0.1 for other in centred
        ]
        logits[i] = max(logits[:i] + logits[i + 1 :])  # as like itself as the place most like it
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(target[i], expected, rtol=1e-4)
    for grid in (28, 14, 4):
        sums = teacher.self_attention_target(features, grid, 0.05).sum(-1)
        assert torch.allclose(sums, torch.ones(1, grid**2), atol=1e-4)


@pytest.mark.slow
def test_every_stage_of_the_training_runs_and_resumes(tmp_path):
    """A few steps of each, on the held-out photographs; what it exports is loaded and run."""
    device = torch.device("cpu")
    pictures = np.stack([read_image(path, 224) for path in HELD_OUT])
    for name in ("crops.npy", "holdout.npy"):
        np.save(tmp_path / name, pictures)
    teacher.observe(tmp_path, device)
    found = np.load(tmp_path / "classes.npy")
    assert sum(label in classes for label, classes in zip(LABELS, found)) >= 20
    kernel = autoencoder.lapped_transform(pictures, device, steps=20)
    encoder = {"kernel": kernel, "mean": torch.zeros(48), "scale": torch.tensor(1.0)}
    torch.save(encoder, tmp_path / "encoder.pt")
    autoencoder.train_autoencoder(tmp_path, 0.01, device)
    training_unet.train_unet(tmp_path, 0.01, device, batch=2)
    for name, train in (("autoencoder", autoencoder.train_autoencoder), ("unet", training_unet.train_unet)):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        train(tmp_path, state["seconds"] / 60 + 0.01, device, batch=2)
        assert torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"] > state["step"] > 0
    train_tiny_diffusion.export(tmp_path, tmp_path / "model")
    attack = DiffAttack(load_pipeline(str(tmp_path / "model"), device), torch.nn.Identity())
    with torch.no_grad():
        decoded = attack.decode(attack.encode(to_tensor(pictures[0])))
        assert psnr(pictures[0], to_pixels(decoded[0])) > 20
        noise = attack.unet(attack.encode(to_tensor(pictures[0])), 201, attack.embed(["ram"])[0]).sample
    assert noise.shape == (1, 48, 28, 28) and noise.isfinite().all()
