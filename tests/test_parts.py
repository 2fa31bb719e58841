"""Checkpoints whose parts do not fit or are of other models, files in their folders that are never loaded,
and LoRA.
"""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import MAIN, ROOT, flags, run, save_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from diffattack.common.errors import InputError
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.checks import check_prediction_type, prediction_errors
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import Lora, fuse_lora, load_pipeline, loaded_files, parse_lora
from diffattack.options import Options
from diffattack.runner.folder import content_digests, differences, diffusion_digest

CPU = torch.device("cpu")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("unet", dict(in_channels=9), "unet: it takes 9 channels .*expected Stable Diffusion 1.x"),
        ("unet", dict(in_channels=16, out_channels=16), "latents of its vae have 4"),
        ("vae", dict(latent_channels=16), "latents of its vae have 16"),
        ("unet", dict(cross_attention_dim=1024), "are 16 wide, and the unet takes 1024"),
        ("unet", dict(time_cond_proj_dim=256), "time_cond_proj_dim is 256; expected Stable Diffusion 1.x"),
        (
            "unet",
            dict(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
            "addition_embed_type is .text_time",
        ),
        (
            "unet",
            dict(class_embed_type="projection", projection_class_embeddings_input_dim=8),
            "class_embed_type is",
        ),
        ("unet", dict(encoder_hid_dim_type="text_proj", encoder_hid_dim=16), "encoder_hid_dim_type is"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(intact, tmp_path, part, changes, message):
    pipeline = load_pipeline(str(intact), CPU)
    network = getattr(pipeline, part)
    setattr(pipeline, part, type(network).from_config({**network.config, **changes}))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scheduler=["diffusers", "LCMScheduler"]), "scheduler is a LCMScheduler"),
        (dict(_class_name="StableDiffusionInpaintPipeline"), "is a StableDiffusionInpaint"),
    ],
)
def test_models_of_other_kinds_are_refused_in_one_line(folder, changes, message):
    edit(folder / "model_index.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(str(folder), CPU)
    assert "\n" not in str(caught.value)


def beside(name, content):
    def add(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return add


def only_fp16(folder):
    path = folder / "text_encoder/model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))


INDEX = b'{"weight_map": {"x": "pytorch_model.bin"}}'


@pytest.mark.parametrize(
    "change",
    [
        beside("unet/diffusion_pytorch_model.non_ema.safetensors", POINTER),
        beside("v1-5-pruned.safetensors", POINTER),
        beside("unet/._diffusion_pytorch_model.safetensors", b"Mac"),
        beside("unet/diffusion_pytorch_model.bin.index.json", INDEX),
        beside("unet/diffusion_pytorch_model.safetensors.index.fp16.json", INDEX),
        beside("text_encoder/pytorch_model.bin", b"cos\nsystem\n"),
        beside("safety_checker/model.safetensors", POINTER),
        only_fp16,
    ],
)
def test_files_that_are_not_loaded_do_not_matter(folder, intact, change):
    change(folder)
    pipeline = load_pipeline(str(folder), CPU)
    assert torch.equal(pipeline.unet.conv_in.weight, load_pipeline(str(intact), CPU).unet.conv_in.weight)


def test_a_tokenizer_without_its_words_is_refused(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer: it knows .* of the 190 tokens"):
        load_pipeline(str(folder), CPU)


def test_weights_that_are_not_there_are_named_with_their_part(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="vae: there is no .*safetensors; pickles .* are not loaded"):
        load_pipeline(str(folder), CPU)


# ---------------------------------------------------------------- identity


def test_a_checkpoint_is_the_files_that_are_loaded(folder):
    options = Options(pretrained_diffusion_path=str(folder))
    before = content_digests(options, ())
    assert len(before) == 1 + len(loaded_files(folder)) > 8
    for name in (".DS_Store", "README.md", "unet/diffusion_pytorch_model.bin", "._x"):
        (folder / name).write_bytes(b"x")
    assert content_digests(options, ()) == before
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    now = content_digests(options, ())
    (line,) = differences({"contents": before}, {"contents": now})
    assert line.startswith(f"the content of {folder / 'scheduler/scheduler_config.json'} has changed")
    (folder / "tokenizer/added_tokens.json").write_text("{}")
    assert differences({"contents": now}, {"contents": content_digests(options, ())}) == [
        f"the content of {folder / 'tokenizer/added_tokens.json'} has changed, or it is gone"
    ]


# ---------------------------------------------------------------- LoRA

MODEL = ROOT / "demo/tiny_diffusion"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A random LoRA of rank 4 for the small model's UNet and text encoder, saved by diffusers."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, folder = load_pipeline(str(MODEL), CPU), tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    layers = {}
    for part, names in (
        ("unet", ["to_k", "to_q", "to_v", "to_out.0"]),
        ("text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=names))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network, save_embedding_layers=False)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def weights(lora=None):
    pipeline = load_pipeline(str(MODEL), CPU, lora=lora)
    parts = ("unet", "text_encoder")
    return {f"{part}.{k}": v for part in parts for k, v in getattr(pipeline, part).state_dict().items()}


@pytest.fixture(scope="module")
def plain():
    return weights()


def low_rank(file):
    """What the file adds to each layer, multiplied out."""
    tensors = load_file(file)
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    return {f"{name}.weight": tensors[name + ends[1]] @ tensors[name + ends[0]] for name in layers}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_added_to_the_weights(lora, plain, scale):
    added, changed = low_rank(lora), weights(Lora(lora, scale))
    assert set(changed) == set(plain)
    assert len(added) == sum(not torch.equal(changed[k], plain[k]) for k in plain)
    for name, difference in added.items():
        assert torch.allclose(changed[name], plain[name] + scale * difference, atol=1e-5)


def test_a_lora_as_kohyas_scripts_write_it(lora, plain, tmp_path):
    tensors = {}
    for name, value in load_file(lora).items():
        part, module = name.rsplit(".lora_", 1)[0].split(".", 1)
        module = module.replace(".", "_")
        layer = f"lora_unet_{module}" if part == "unet" else f"lora_te_text_model_{module}"
        tensors[f"{layer}.lora_{'down' if '.lora_A.' in name else 'up'}.weight"] = value
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)  # half of the rank
    save_file(tensors, tmp_path / "kohya.safetensors")
    found, expected = weights(Lora(tmp_path / "kohya.safetensors")), weights(Lora(lora, 0.5))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("end, scale", [("", 1.0), (":0.8", 0.8), (":-1", -1)])
def test_how_much_of_a_lora(end, scale):
    found = parse_lora(f"a.safetensors{end}")
    assert (found.path.name, found.scale) == ("a.safetensors", scale)


def test_a_scale_that_is_no_number():
    with pytest.raises(ValueError):
        parse_lora("a.safetensors:x")


@pytest.mark.parametrize(
    "made, message",
    [
        (None, "No such file"),
        (b"cos\nsystem\n", "no safetensors file"),
        (POINTER, "Git LFS pointer"),
        ({"x.weight": torch.zeros(2, 2)}, "has no LoRA in it"),
        ({f"lora_te2_x.lora_{k}.weight": torch.zeros(2, 2) for k in ("down", "up")}, "cannot be added"),
        ({"unet.x.hada_w1_a": torch.zeros(2, 2)}, "has no LoRA in it"),
        ("wide", "cannot be added"),
        ({f"unet.other.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"}, "cannot be added"),
    ],
)
def test_files_that_are_no_lora_of_this_model(lora, tmp_path, made, message):
    path = tmp_path / "a.safetensors"
    if made == "wide":
        made = {k: torch.zeros(v.shape[0], 320) if "_A" in k else v for k, v in load_file(lora).items()}
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif made is not None:
        save_file(made, path)
    with pytest.raises(InputError, match=f"--lora: .*{message}") as caught:
        fuse_lora(load_pipeline(str(MODEL), CPU), Lora(path))
    assert "\n" not in str(caught.value)


def test_what_of_a_lora_is_not_used_is_said(lora, tmp_path, capsys):
    tensors, path = load_file(lora), tmp_path / "a.safetensors"
    layer = next(name for name in tensors if re.search(r"down_blocks\.\d.*lora_A", name))
    elsewhere = re.sub(r"down_blocks\.\d", "down_blocks.9", layer)
    names = {elsewhere.replace("lora_A", k): layer.replace("lora_A", k) for k in ("lora_A", "lora_B")}
    others = {name: tensors[known].clone() for name, known in names.items()}
    save_file(tensors | others, path)
    fuse_lora(load_pipeline(str(MODEL), CPU), Lora(path))
    assert "1 of its" in (said := capsys.readouterr().err) and "none of this model's" in said
    save_file({k: v * float("nan") for k, v in tensors.items()}, path)
    with pytest.raises(InputError, match="NaNs detected"):
        fuse_lora(load_pipeline(str(MODEL), CPU), Lora(path))
    del tensors[next(name for name in tensors if ".lora_B." in name)]
    save_file(tensors, path)
    with pytest.raises(InputError, match="or a part of one"):
        fuse_lora(load_pipeline(str(MODEL), CPU), Lora(path))


def test_judges_know_the_diffusion_model_with_what_is_added_to_it(lora):
    options = Options(pretrained_diffusion_path=str(MODEL), model_name=("a@denoise",), transfer_models=())
    digests = [
        diffusion_digest(changed)
        for changed in (
            options,
            replace(options, lora=Lora(lora)),
            replace(options, lora=Lora(lora, 0.5)),
            replace(options, prediction_type="v_prediction"),
        )
    ]
    assert len(set(digests)) == 4


def test_an_attack_with_a_lora_differs_and_is_a_run_of_its_own(lora, quick, data, tmp_path):
    shared = ["--pretrained_diffusion_path", MODEL, "--model_name", quick, "--limit", "1", "--processes", "1"]
    command = lambda out, *more: [*MAIN, *flags(data, tmp_path / out, *shared, *more)]  # noqa: E731
    assert run(command("plain")).returncode == 0
    result = run(command("lora", "--lora", f"{lora}:0.5"))
    assert result.returncode == 0, result.stderr
    pictures = [Image.open(tmp_path / out / "0000_adv_image.png").tobytes() for out in ("plain", "lora")]
    assert pictures[0] != pictures[1]
    again = run(command("lora", "--lora", str(lora)))
    assert again.returncode == 2 and "lora was" in again.stderr


# ---------------------------------------------------------------- what the UNet predicts


def test_a_scheduler_that_says_something_else_than_the_unet_predicts(tmp_path):
    """The small model predicts noise; its copy says that it predicts velocity."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    command = [*MAIN, "--pretrained_diffusion_path", str(folder), "--limit", "1", "--check"]
    result = run(command)
    assert result.returncode == 2 and result.stderr.rstrip().endswith("give --prediction_type epsilon")
    assert "its UNet predicts epsilon and not v_prediction (relative errors" in result.stderr
    given = load_pipeline(str(folder), CPU, prediction_type="epsilon")
    model = LatentDiffusion(given)
    picture = to_tensor(read_image(ROOT / "demo/images/bison.jpg", 224))
    errors = prediction_errors(model, picture, torch.tensor([[347]]))
    assert errors["epsilon"] < 0.4 and errors["v_prediction"] > 0.8
    check_prediction_type(model, picture, torch.tensor([[347]]))


def test_random_weights_are_no_evidence_of_what_they_predict(intact):
    picture = to_tensor(read_image(ROOT / "demo/images/bison.jpg", 64))
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        pipeline = load_pipeline(str(intact), CPU, prediction_type=prediction_type)
        check_prediction_type(LatentDiffusion(pipeline, ("cat",)), picture, torch.tensor([[0]]))
