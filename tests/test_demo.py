"""The small diffusion model and the photographs that ship with the project, and the trick that its training starts with."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from natsort import natsorted
from safetensors import safe_open

from attentionControl import AttentionControlEdit
from conftest import ROOT
from diff_latent_attack import DiffAttack
from evaluate import psnr
from main import load_pipeline
from utils import read_image, to_pixels, to_tensor


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu"))


def test_it_is_small_and_in_half_precision_safetensors():
    files = [path for path in (ROOT / "demo").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 40e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}


def test_its_attention_grids_are_stable_diffusions(pipeline):
    controller = AttentionControlEdit(5)
    with torch.no_grad(), controller.attached(pipeline.unet), controller.collecting() as maps:
        pipeline.unet(torch.zeros(2, 16, 56, 56), 1, torch.zeros(2, 24, 128))
    assert {round(attention.shape[2] ** 0.5) for attention in maps.values()} == {28, 14, 7}


def test_the_autoencoder_keeps_the_photographs(pipeline):
    attack = DiffAttack(pipeline, torch.nn.Identity())
    figures = []
    for path in natsorted((ROOT / "demo/heldout").iterdir(), key=lambda path: path.name):
        clean = read_image(path, 224)
        with torch.no_grad():
            figures.append(psnr(clean, to_pixels(attack.decode(attack.encode(to_tensor(clean)))[0])))
    assert len(figures) >= 20 and np.mean(figures) >= 27


def load_training_script():
    specification = importlib.util.spec_from_file_location("training", ROOT / "demo/train_tiny_diffusion.py")
    training = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(training)
    return training


def test_the_training_starts_from_the_linear_autoencoder():
    training = load_training_script()
    torch.manual_seed(0)
    crops = np.stack([read_image(path, 64) for path in sorted((ROOT / "demo/heldout").iterdir())])
    x = training.as_input(torch.from_numpy(crops))
    kernel, bias = training.principal_components(crops)
    patches = torch.nn.functional.unfold(x, 4, stride=4).movedim(1, 0).flatten(1)  # (48, many), independent of pixel_unshuffle
    expected = torch.linalg.svdvals(patches - patches.mean(1, keepdim=True)).square()[:16]
    vae, linear = training.build_autoencoder(), training.LinearAutoencoder(kernel, bias)
    training.transplant(linear, vae, x)
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        energies = linear.encoder(x).movedim(1, 0).flatten(1).square().sum(1)
        assert torch.allclose(energies / energies.sum(), expected / expected.sum(), rtol=1e-3)
        assert linear.encoder(x).std().item() == pytest.approx(1, abs=1e-3)
        assert (posterior.mean - linear.encoder(x)).abs().max() < 0.1
        assert torch.allclose(posterior.logvar, torch.full_like(posterior.logvar, -7))
        ours, expected = vae.decode(posterior.mean).sample, linear.decoder(linear.encoder(x))
        assert (ours - expected).square().mean() < 0.01 * expected.square().mean()


def test_every_stage_of_the_training_runs_and_resumes(tmp_path, monkeypatch):
    """A few steps of each, on the held-out photographs; what it exports is loaded and run."""
    training, device = load_training_script(), torch.device("cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    pictures = np.stack([read_image(path, 224) for path in sorted((ROOT / "demo/heldout").iterdir())])
    for name in ("crops.npy", "holdout.npy"):
        np.save(tmp_path / name, pictures)
    training.train_autoencoder(tmp_path, 0.01, device, linear_minutes=0.05)
    training.train_unet(tmp_path, 0.01, device)
    for name, train in (("autoencoder", training.train_autoencoder), ("unet", training.train_unet)):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        train(tmp_path, state["seconds"] / 60 + 0.01, device)
        assert torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"] > state["step"] > 0
    before, after = (float(re.search(r"([\d.]+) dB", line)[1]) for line in (tmp_path / "linear.log").read_text().splitlines())
    assert after > before + 1
    training.export(tmp_path, tmp_path / "model")
    attack = DiffAttack(load_pipeline(str(tmp_path / "model"), device), torch.nn.Identity())
    with torch.no_grad():
        decoded = attack.decode(attack.encode(to_tensor(pictures[0])))
        assert psnr(pictures[0], to_pixels(decoded[0])) > 8
        noise = attack.unet(attack.encode(to_tensor(pictures[0])), 201, attack.embed(["ram"])[0]).sample
    assert noise.shape == (1, 16, 56, 56) and noise.isfinite().all()
