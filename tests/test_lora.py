"""A LoRA in the weights of the diffusion model, against its matrices multiplied out."""

from dataclasses import replace

import pytest
import torch
from conftest import MAIN, ROOT, flags, run
from safetensors.torch import load_file, save_file

from diffattack.common.errors import InputError
from diffattack.diffusion.pipeline import Lora, fuse_lora, load_pipeline, parse_lora
from diffattack.options import Options
from diffattack.runner.folder import diffusion_digest

CPU = torch.device("cpu")
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


def test_how_much_of_a_lora():
    for end, scale in (("", 1.0), (":0.8", 0.8), (":-1", -1)):
        found = parse_lora(f"a.safetensors{end}")
        assert (found.path.name, found.scale) == ("a.safetensors", scale)
    with pytest.raises(ValueError):
        parse_lora("a.safetensors:x")


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda tensors: None, "no safetensors file"),
        (lambda tensors: {k: v[:, :8] if "_A" in k else v for k, v in tensors.items()}, "cannot be added"),
        (lambda tensors: {f"unet.other.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"}, "cannot be added"),
        (lambda tensors: dict(list(tensors.items())[1:]), "it has a part of a LoRA"),
    ],
)
def test_files_that_are_no_lora_of_this_model(lora, tmp_path, made, message):
    path, content = tmp_path / "a.safetensors", made(load_file(lora))
    path.write_bytes(b"cos\nsystem\n")
    if content:
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    with pytest.raises(InputError, match=f"--lora: .*{message}") as caught:
        fuse_lora(load_pipeline(str(MODEL), CPU), Lora(path))
    assert "\n" not in str(caught.value)


def test_judges_know_the_diffusion_model_with_what_is_added_to_it(lora):
    options = Options(pretrained_diffusion_path=str(MODEL), model_name=("a@denoise",), transfer_models=())
    changes = ({}, {"lora": Lora(lora)}, {"lora": Lora(lora, 0.5)}, {"prediction_type": "v_prediction"})
    digests = [diffusion_digest(replace(options, **each)) for each in changes]
    assert len(set(digests)) == 4


def test_an_attack_with_a_lora_differs_and_is_a_run_of_its_own(lora, data, tmp_path):
    def attacked(out, *more):
        given = ["--pretrained_diffusion_path", MODEL, "--limit", 1, "--processes", 1, *more]
        return run([*MAIN, *flags(data, tmp_path / out, *given)])

    assert attacked("plain").returncode == attacked("lora", "--lora", f"{lora}:0.5").returncode == 0
    pictures = [(tmp_path / out / "0000_adv_image.png").read_bytes() for out in ("plain", "lora")]
    assert pictures[0] != pictures[1]
    again = attacked("lora", "--lora", lora)
    assert again.returncode == 2 and "lora was" in again.stderr
