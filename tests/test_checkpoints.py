"""Checkpoints of the diffusion model that are not what they say: each is refused in one line that names what
is wrong; files beside them that do not matter; what the UNet predicts; and noise schedules of every kind,
against diffusers' own step.
"""

import json
import shutil
import socket
import time

import pytest
import torch
from conftest import CLASS_NAMES, MAIN, ROOT, run, save_checkpoint
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from diffattack.common.checkpoints import stay_offline_if_out_of_reach
from diffattack.common.errors import InputError
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.checks import check_prediction_type, prediction_errors
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import load_pipeline, loaded_files
from diffattack.options import Options
from diffattack.runner.folder import content_digests, differences

CPU = torch.device("cpu")
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
INDEX = b'{"weight_map": {"x": "pytorch_model.bin"}}'
OUTSIDE = b'{"weight_map": {"x": "../../x.safetensors"}}'


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "model")


def weights(path, edit):
    def change(folder):
        save_file(edit(load_file(folder / path)), folder / path, metadata={"format": "pt"})

    return change


def without_first(tensors):
    return dict(sorted(tensors.items())[1:])


def config(path, **changes):
    def change(folder):
        content = json.loads((folder / path).read_text()) | changes
        (folder / path).write_text(json.dumps(content))

    return change


def scheduler(**changes):
    return config("scheduler/scheduler_config.json", **changes)


def write(path, content):
    def change(folder):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)

    return change


def renamed(path, name):
    return lambda folder: (folder / path).rename((folder / path).with_name(name))


BROKEN = [
    (weights(TEXT, without_first), "text_encoder has no weights for .*, which would be random"),
    (weights(VAE, lambda t: t | {"a": torch.zeros(1)}), "vae has weights that its network does not .*: a"),
    (weights(VAE, lambda t: {name: t[name] * torch.nan for name in t}), "networks compute is not finite"),
    (renamed(VAE, "diffusion_pytorch_model.bin"), f"there is no {VAE}; pickles .* are not loaded"),
    (write(UNET, b""), "no safetensors file, or not whole"),
    (write(f"{TEXT}.index.json", INDEX), "names .'pytorch_model.bin'.; expected .safetensors"),
    (write(f"{TEXT}.index.json", OUTSIDE), "names .*x.safetensors'.; expected .safetensors"),
    (config("unet/config.json", in_channels=10**12), "cannot be loaded"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "it has 2 tokens, .* the text encoder has 190"),
    (config("model_index.json", vae=["diffusers", "VQModel"]), "vae is a VQModel; expected AutoencoderKL"),
    (config("model_index.json", _class_name="StableDiffusionInpaintPipeline"), "a StableDiffusionInpaint"),
    (config("model_index.json", scheduler=["diffusers", "LCMScheduler"]), "it is a latent consistency model"),
    (scheduler(prediction_type="flow"), "prediction_type is 'flow'"),
]


@pytest.mark.parametrize("change, message", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=f"--pretrained_diffusion_path: .*{message}") as caught:
        load_pipeline(str(folder), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("unet", dict(in_channels=9), "to have 9 channels, but got 4"),
        ("vae", dict(latent_channels=16), "to have 4 channels, but got 16"),
        ("unet", dict(cross_attention_dim=1024), "shapes cannot be multiplied"),
        ("unet", dict(encoder_hid_dim_type="text_proj", encoder_hid_dim=16), "takes more than latents"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(intact, tmp_path, part, changes, message):
    pipeline = load_pipeline(str(intact), CPU)
    network = getattr(pipeline, part)
    setattr(pipeline, part, type(network).from_config({**network.config, **changes}))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{message}.*of Stable Diffusion 1.x or 2.x") as caught:
        load_pipeline(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        write("unet/diffusion_pytorch_model.non_ema.safetensors", POINTER),
        write("unet/diffusion_pytorch_model.bin.index.json", INDEX),
        renamed(TEXT, "model.fp16.safetensors"),
    ],
)
def test_files_that_are_not_loaded_do_not_matter(folder, intact, change):
    change(folder)
    pipeline = load_pipeline(str(folder), CPU)
    assert torch.equal(pipeline.unet.conv_in.weight, load_pipeline(str(intact), CPU).unet.conv_in.weight)


def test_a_checkpoint_is_the_files_that_are_loaded(folder):
    options = Options(pretrained_diffusion_path=str(folder))
    before = content_digests(options, ())
    assert len(before) == 1 + len(loaded_files(folder)) > 8
    for name in (".DS_Store", "README.md", "unet/diffusion_pytorch_model.bin", "._x"):
        (folder / name).write_bytes(b"x")
    assert content_digests(options, ()) == before
    scheduler(prediction_type="v_prediction")(folder)
    (folder / "tokenizer/added_tokens.json").write_text("{}")
    changed = [folder / "scheduler/scheduler_config.json", folder / "tokenizer/added_tokens.json"]
    lines = differences({"contents": before}, {"contents": content_digests(options, ())})
    assert lines == [f"the content of {path} has changed, or it is gone" for path in changed]


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


# ---------------------------------------------------------------- what the UNet predicts


def test_a_scheduler_that_says_something_else_than_the_unet_predicts(tmp_path):
    """The small model predicts noise; its copy says that it predicts velocity."""
    folder = shutil.copytree(ROOT / "demo/tiny_diffusion", tmp_path / "model")
    scheduler(prediction_type="v_prediction")(folder)
    result = run([*MAIN, "--pretrained_diffusion_path", str(folder), "--limit", "1", "--check"])
    assert result.returncode == 2 and result.stderr.rstrip().endswith("give --prediction_type epsilon")
    assert "its UNet predicts epsilon and not v_prediction (relative errors" in result.stderr
    model = LatentDiffusion(load_pipeline(str(folder), CPU, prediction_type="epsilon"))
    picture = to_tensor(read_image(ROOT / "demo/images/bison.jpg", 224))
    errors = prediction_errors(model, picture, torch.tensor([[347]]))
    assert errors["epsilon"] < 0.4 and errors["v_prediction"] > 0.8
    check_prediction_type(model, picture, torch.tensor([[347]]))


def test_random_weights_are_no_evidence_of_what_they_predict(intact):
    picture = to_tensor(read_image(ROOT / "demo/images/bison.jpg", 64))
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        pipeline = load_pipeline(str(intact), CPU, prediction_type=prediction_type)
        check_prediction_type(LatentDiffusion(pipeline, ("cat",)), picture, torch.tensor([[0]]))


# ---------------------------------------------------------------- noise schedules


def latent_diffusion(intact, **given) -> LatentDiffusion:
    pipeline = load_pipeline(str(intact), CPU)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **given)
    return LatentDiffusion(pipeline, CLASS_NAMES)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(timestep_spacing="trailing"),
        dict(steps_offset=0),
        dict(set_alpha_to_one=True),
        dict(rescale_betas_zero_snr=True),
        dict(beta_schedule="squaredcos_cap_v2"),
    ],
)
def test_every_step_is_diffusers_own(intact, prediction_type, given):
    model = latent_diffusion(intact, prediction_type=prediction_type, **given)
    random = torch.Generator().manual_seed(0)
    for t in model.timesteps.tolist():
        latents, prediction = torch.randn(2, 1, 4, 8, 8, generator=random)
        expected = model.scheduler.step(prediction, t, latents).prev_sample
        assert torch.allclose(model.ddim_step(latents, prediction, t), expected, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_with_the_true_noise_lead_to_the_image_and_back(intact, spacing):
    model = latent_diffusion(intact, timestep_spacing=spacing)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, latents = model.timesteps.tolist(), clean
    for t in reversed(timesteps):
        latents = model.ddim_step(latents, noise, t, model.following[t], t)
        if model.following[t] == -1:  # from the image, whose final alpha need not be one
            alpha, sigma = model.signal_and_noise(t)
            start, rest = model.signal_and_noise(-1)
            expected = alpha * (clean - rest * noise) / start + sigma * noise
            assert torch.allclose(latents, expected, atol=1e-5)
    for t in timesteps:
        latents = model.ddim_step(latents, noise, t)
    assert torch.allclose(latents, clean, atol=1e-4)
