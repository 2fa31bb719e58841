"""Checkpoints of the diffusion model that are not what they say: each is refused in one line that names what
is wrong; and noise schedules of every kind, against diffusers' own step.
"""

import json
import shutil
import socket
import time

import pytest
import torch
from conftest import CLASS_NAMES, save_checkpoint
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from diffattack.common.checkpoints import stay_offline_if_out_of_reach
from diffattack.common.errors import CheckpointError, InputError
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import load_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "model")


WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def edit_weights(part, edit):
    def change(folder):
        tensors = edit(load_file(folder / WEIGHTS[part]))
        save_file(tensors, folder / WEIGHTS[part], metadata={"format": "pt"})

    return change


def without_first(tensors):
    return dict(sorted(tensors.items())[1:])


def renamed(tensors):
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


def first_of(change):
    def edit(tensors):
        name = sorted(tensors)[0]
        return tensors | {name: change(tensors[name])}

    return edit


def edit_json(path, **changes):
    def change(folder):
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | changes))

    return change


def write(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def index(names):
    def change(folder):
        text = json.dumps({"metadata": {}, "weight_map": {f"w{k}": name for k, name in enumerate(names)}})
        (folder / "text_encoder/model.safetensors.index.json").write_text(text)

    return change


BROKEN = {
    "text encoder without a tensor": (
        edit_weights("text_encoder", without_first),
        "text_encoder: the checkpoint has no weights for .*, which would be random",
    ),
    "text encoder of other names": (edit_weights("text_encoder", renamed), "text_encoder: .*no weights for"),
    "unet without a tensor": (edit_weights("unet", without_first), "no weights|missing"),
    "vae without a tensor": (edit_weights("vae", without_first), "no weights|missing"),
    "vae with another": (
        edit_weights("vae", lambda tensors: tensors | {"more": torch.zeros(1)}),
        "vae: the checkpoint has weights that its network does not know: more",
    ),
    "another shape": (edit_weights("unet", first_of(lambda t: t[:-1].clone())), "cannot be loaded"),
    "not finite": (
        edit_weights("vae", first_of(lambda t: t * float("nan"))),
        "vae: .* holds numbers that are not finite",
    ),
    "empty": (write(WEIGHTS["unet"], b""), "no safetensors file, or not whole"),
    "a pickle under the name": (
        write(WEIGHTS["unet"], b"cos\nsystem\n(S'false'\ntR."),
        "no safetensors file",
    ),
    "header of 2^64": (write(WEIGHTS["vae"], b"\xff" * 8 + b"{}"), "no safetensors file"),
    "damaged header": (
        write(WEIGHTS["vae"], (20).to_bytes(8, "little") + b"{" * 20),
        "invalid JSON in header",
    ),
    "index of pickles": (
        index(["pytorch_model.bin"]),
        "no index of .safetensors files .*'pytorch_model.bin'",
    ),
    "index that leaves": (index(["../../x.safetensors"]), "no index of .safetensors .*'../../x.safetensors'"),
    "index of nothing": (index(["x.safetensors"]), "names .'x.safetensors'., which are not there"),
    "no index": (
        write("unet/diffusion_pytorch_model.safetensors.index.json", b"[1"),
        "is no index of .safetensors",
    ),
    "unet of no width": (edit_json("unet/config.json", block_out_channels=[0, 0, 0, 0]), "cannot be loaded"),
    "unet of 10^12": (edit_json("unet/config.json", in_channels=10**12), "cannot be loaded"),
    "negative heads": (edit_json("unet/config.json", attention_head_dim=-1), "its attention_head_dim is -1"),
    "scaling factor of 0": (edit_json("vae/config.json", scaling_factor=0), "its scaling_factor is 0"),
    "scaling factor in words": (
        edit_json("vae/config.json", scaling_factor="big"),
        "scaling_factor is 'big'",
    ),
    "tokenizer of length 1": (
        edit_json("tokenizer/tokenizer_config.json", model_max_length=1),
        "a prompt has 1 tokens",
    ),
    "tokenizer of length -1": (
        edit_json("tokenizer/tokenizer_config.json", model_max_length=-1),
        "a prompt has -1 tokens",
    ),
    "another component": (
        edit_json("model_index.json", vae=["diffusers", "VQModel"]),
        "its vae is a VQModel; expected AutoencoderKL",
    ),
    "no component": (edit_json("model_index.json", unet=None), "cannot be loaded"),
    "index of another kind": (write("model_index.json", b"[]"), "cannot be loaded"),
    "prediction type": (
        edit_json("scheduler/scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'",
    ),
    "betas": (edit_json("scheduler/scheduler_config.json", beta_end=2.0), "betas do not make noise"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(folder, case):
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(InputError, match=f"--pretrained_diffusion_path: .*{message}") as caught:
        load_pipeline(str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_token_ids_beyond_the_embedding_are_refused(folder):
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace('"!": 0', '"!": 4000'))
    with pytest.raises(InputError, match="has a token 4000, but the text encoder knows"):
        load_pipeline(str(folder), CPU)


@pytest.mark.parametrize("length", [10**6, None])
def test_a_tokenizer_that_knows_no_length_takes_the_text_encoders(folder, length):
    path = folder / "tokenizer/tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop("model_max_length")
    path.write_text(json.dumps(content | ({"model_max_length": length} if length else {})))
    assert load_pipeline(str(folder), CPU).tokenizer.model_max_length == 16


# ---------------------------------------------------------------- noise schedules


def latent_diffusion(intact, diffusion_steps=20, start_step=15, **config) -> LatentDiffusion:
    pipeline = load_pipeline(str(intact), CPU)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    return LatentDiffusion(pipeline, CLASS_NAMES, diffusion_steps=diffusion_steps, start_step=start_step)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(timestep_spacing="trailing"),
        dict(steps_offset=0),
        dict(set_alpha_to_one=True),
        dict(rescale_betas_zero_snr=True),
        dict(beta_schedule="squaredcos_cap_v2"),
    ],
)
def test_every_step_is_diffusers_own(intact, prediction_type, config):
    model = latent_diffusion(intact, prediction_type=prediction_type, **config)
    random = torch.Generator().manual_seed(0)
    for t in model.timesteps.tolist():
        latents, prediction = torch.randn(2, 1, 4, 8, 8, generator=random)
        expected = model.scheduler.step(prediction, t, latents).prev_sample
        assert torch.allclose(model.ddim_step(latents, prediction, t), expected, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_with_the_true_noise_lead_to_the_image_and_back(intact, spacing):
    model = latent_diffusion(intact, timestep_spacing=spacing)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = [*model.timesteps.tolist(), -1]
    latents = clean
    for t in reversed(steps[:-1]):
        latents = model.ddim_step(latents, noise, t, model.following[t], t)
        if model.following[t] == -1:  # from the image, whose final alpha need not be one
            alpha, sigma = model.signal_and_noise(t)
            start, rest = model.signal_and_noise(-1)
            expected = alpha * (clean - rest * noise) / start + sigma * noise
            assert torch.allclose(latents, expected, atol=1e-5)
    for t in steps[:-1]:
        latents = model.ddim_step(latents, noise, t)
    assert torch.allclose(latents, clean, atol=1e-4)


def test_timesteps_beyond_the_training_are_refused(intact):
    with pytest.raises(CheckpointError, match="beyond the 1000 that it was trained with"):
        latent_diffusion(intact, steps_offset=5000)


def test_a_tiny_autoencoder_serves_as_the_vae(intact, tmp_path):
    from diffusers import AutoencoderTiny

    pipeline = load_pipeline(str(intact), CPU)
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        latent_channels=4,
    )
    pipeline.save_pretrained(tmp_path / "model")
    model = LatentDiffusion(load_pipeline(str(tmp_path / "model"), CPU), CLASS_NAMES, start_step=18)
    images = torch.rand(1, 3, 64, 64)
    reconstruction = model.reconstruct(model.invert(images, torch.tensor([1])))
    assert reconstruction.shape == images.shape and reconstruction.isfinite().all()


def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_long(monkeypatch):
    """A server that takes connections and says nothing."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        stay_offline_if_out_of_reach.cache_clear()
        started = time.perf_counter()
        for _ in range(3):
            stay_offline_if_out_of_reach(0.5)
        assert time.perf_counter() - started < 1 and constants.HF_HUB_OFFLINE
    stay_offline_if_out_of_reach.cache_clear()
