"""Small random checkpoints of every kind the attack must run on, saved to disk and loaded as a user's
checkpoint is; and runs of main.py on one of them.
"""

import contextlib
import copy
import functools
import importlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes with two threads each on two cores wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported

import diffattack.common.environment  # isort: skip  # noqa: F401
import diffattack.common.torchvision  # isort: skip  # noqa: F401

import numpy as np
import pytest
import stored
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from filelock import FileLock
from forked import Forked
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffattack.classifiers import arguments
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.errors import notes
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.predictions import PREDICTION, ClassifierResult

ROOT = Path(__file__).resolve().parent.parent
MAIN = [sys.executable, "main.py"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
HOSTILE = "<img src=x onerror=alert(1)>.png"
CLASS_NAMES = ("cat", "polar bear", "espresso", "fire engine", "daisy")


# of tests that start the program as a process, or run the small model for long
SLOW_FIXTURES = {"data", "quick", "runs", "own", "demo", "pipeline"}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is `nightly` unless -m asks for it: addopts would be replaced by -m "not slow"."""
    is_nightly = "nightly" in config.option.markexpr
    stored.ANEW = is_nightly
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if is_nightly and item.get_closest_marker("reference"):
            item.add_marker(pytest.mark.nightly)
    if not is_nightly:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(autouse=True, scope="session")
def embedded_classifiers_are_read_once():
    """And copied wherever they are loaded."""
    for name, load in REGISTRY.items():
        REGISTRY[name] = functools.partial(lambda load: copy.deepcopy(load()), functools.cache(load))


LEAST_SIDE, arguments.LEAST_SIDE = arguments.LEAST_SIDE, 64  # which goes with the random models


@pytest.fixture(autouse=True)
def notes_are_said_anew():
    notes.clear()


def save_checkpoint(
    folder: Path,
    prediction_type: str = "epsilon",
    latent_channels: int = 4,
    vae_levels: int = 3,
    heads: int | tuple = 2,
    linear_projection: bool = False,
    scheduler: type = DDIMScheduler,
    scaling_factor: float = 0.5,
    steps_offset: int = 1,
) -> Path:
    """Writes a random Stable Diffusion pipeline with attention on three of its four levels, as Stable
    Diffusion has; fp32 safetensors.
    """
    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokens_of = dict(bos_token_id=vocab["<|startoftext|>"], eos_token_id=vocab["<|endoftext|>"])
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(vocab_size=len(vocab), max_position_embeddings=16)
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, **tokens_of))
    small = dict(layers_per_block=1, norm_num_groups=4)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=(8,) * vae_levels,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        **small,
    )
    unet = UNet2DConditionModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownBlock2D", *3 * ["CrossAttnDownBlock2D"]),
        up_block_types=(*3 * ["CrossAttnUpBlock2D"], "UpBlock2D"),
        attention_head_dim=heads,
        cross_attention_dim=16,
        use_linear_projection=linear_projection,
        **small,
    )
    config = dict(skip_prk_steps=True) if scheduler is PNDMScheduler else dict(clip_sample=False)
    config |= dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
    config |= dict(steps_offset=steps_offset, prediction_type=prediction_type)
    lacking = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    pipeline = StableDiffusionPipeline(**parts, scheduler=scheduler(**config), **lacking)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Returns a function from the arguments of `save_checkpoint` to a loaded pipeline in float64; each kind
    is written once.
    """

    @functools.cache
    def load(**kind) -> StableDiffusionPipeline:
        folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), **kind)
        return load_pipeline(str(folder), torch.device("cpu")).to(torch.float64)

    return load


class TinyClassifier(torch.nn.Module):
    """A random convolutional classifier of five classes, smooth, so that its gradients do not jump."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layers = [torch.nn.Conv2d(3, 8, 5, stride=3), torch.nn.Tanh(), torch.nn.Conv2d(8, 8, 5, stride=3)]
        layers += [torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(32, len(CLASS_NAMES)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * self.layers(x)


@pytest.fixture(scope="session")
def classifier() -> torch.nn.Module:
    return TinyClassifier().double()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Three smooth random images, float64 (3, 3, 64, 64) in [0, 1]."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0.1, 0.9, (3, 3, 8, 8)))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="session")
def labels() -> torch.Tensor:
    return torch.tensor([1, 0, 3])


def predictions(rows) -> np.ndarray:
    """Labels, or rows of a label, its confidence, and that in the true class and the target, NaN for none."""
    given = [row if isinstance(row, tuple) else (row, 0.9, 0.1) for row in rows]
    return np.array([(*row, np.nan)[:4] for row in given], PREDICTION)


def classifier_result(labels, before, after, reconstructed=None, targets=None, **more) -> ClassifierResult:
    """What a classifier predicts, given by labels."""
    sides = [predictions(each) for each in (before, after, reconstructed) if each is not None]
    given = np.stack(sides, 1)[:, None], np.array(targets or [-1] * len(labels))
    return ClassifierResult("by hand", np.array(labels), *given, **more)


# ---------------------------------------------------------------- classifiers as people bring them


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, classes)
    return torch.nn.Sequential(*layers)


IMAGES = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def check(name: str, classes: int, expected: torch.Tensor) -> None:
    """The same logits, and a gradient at the images."""
    classifier = load_classifier(str(name), classes, 96)
    x = IMAGES.clone().requires_grad_()
    logits = classifier(x)
    assert torch.allclose(logits, expected, atol=1e-5)
    logits[0, 1].backward()
    assert x.grad[0].abs().sum() > 0 and not x.grad[1:].any()
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def save_vit(folder, **labels):
    """Writes a small random vision transformer in transformers format, with `num_labels` or `id2label`,
    and its processor.
    """
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = ViTConfig(**sizes, image_size=96, patch_size=16, **labels)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)


# ---------------------------------------------------------------- pages in a browser


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, without a window."""
    from selenium import webdriver

    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


# ---------------------------------------------------------------- runs of main.py as a process


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of pytest-xdist see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


QUICK = """import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 1000))
"""


def once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, which the first worker that asks for it makes."""
    with FileLock(shared / f"{name}.lock"):
        if not (shared / f"{name}.made").exists():
            make(shared / name)
            (shared / f"{name}.made").touch()
    return shared / name


@pytest.fixture(scope="session")
def data(shared) -> Path:
    """A random checkpoint, four small pictures with labels, and a classifier of 1,000 classes."""

    def make(folder):
        save_checkpoint(folder / "model")
        (folder / "images").mkdir()
        random = np.random.default_rng(0)
        for k in range(4):
            picture = Image.fromarray(random.integers(0, 255, (6, 6, 3), np.uint8))
            picture.resize((96, 96), Image.BICUBIC).save(folder / "images" / f"img{k}.png")
        (folder / "labels.txt").write_text("1\n22\n333\n444\n")
        (folder / "quick.py").write_text(QUICK)

    return once(shared, "data", make)


@pytest.fixture(scope="session")
def quick(data) -> str:
    """The name of a classifier of 1,000 classes that takes no time, where it does not matter which it is."""
    return f"{data}/quick.py:build"


@pytest.fixture(scope="session")
def whole(data, shared) -> Callable[[str], Path]:
    """The folder of an uninterrupted run in a mode, to compare with."""

    def folder(mode: str) -> Path:
        def make(out):
            succeed([*MAIN, *flags(data, out, "--weight_mode", mode, "--weight_lr", "0.1")])

        return once(shared, f"whole_{mode}", make)

    return folder


@pytest.fixture(scope="session")
def finished(data, shared) -> Path:
    """A run on four images, one of which has a hostile name and another a name that would be a formula."""

    def make(folder):
        (folder / "images").mkdir(parents=True)
        names = ("img2.png", "img10.png", HOSTILE, "$x_1.png")
        for source, name in zip(sorted((data / "images").iterdir()), names):
            shutil.copy(source, folder / "images" / name)
        more = f"--images_root {folder}/images --figures all --figure_images 2".split()
        result = succeed([*MAIN, *flags(data, folder / "out", *more)])
        assert "self-attention loss by timestep" in result.stdout and "report.html" in result.stdout

    return once(shared, "hostile", make) / "out"


SMALL = "--res 96 --iterations 3 --start_step 18 --draws 2 --transfer_models= --figures none"


def flags(data: Path, out: Path, *extra: object) -> list[str]:
    """Of a quick run on the four pictures; the last value of a flag counts."""
    inputs = (
        f"--pretrained_diffusion_path {data}/model --images_root {data}/images --label_path {data}/labels.txt"
    )
    inputs += f" --model_name {data}/quick.py:build --save_dir {out}"
    return [*inputs.split(), *SMALL.split(), *map(str, extra)]


def start(command: list[str], anew: bool = False, **options) -> subprocess.Popen | Forked:
    """A command as a process of its own; one of this project's is forked from a process that has imported the
    libraries, unless it is to be started `anew`.
    """
    options = {"env": ENVIRONMENT} | options
    if command[0] == sys.executable and command[1].endswith(".py") and sys.platform == "linux" and not anew:
        return Forked(command[1:], **options)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def launch(command: list[str], processes: int) -> list[subprocess.Popen | Forked]:
    """So many processes of a command, which know of each other as those of a launcher do."""
    return [
        start(command, env=ENVIRONMENT | {"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(processes)})
        for k in range(processes)
    ]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """A command from its start to its end; main.py and compare.py without options in this process, which has
    imported the libraries.
    """
    if not options and command[0] == sys.executable and command[1] in ("main.py", "compare.py"):
        return run_here(command)
    process = start(command, **options)
    try:
        out, errors = process.communicate(timeout=600)
    finally:
        process.kill()  # one that takes too long
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def succeed(command: list[str], **options) -> subprocess.CompletedProcess:
    """A command as `run` runs it, which must end well."""
    result = run(command, **options)
    assert result.returncode == 0, result.stderr
    return result


def refusal(command: list[str]) -> str:
    """What a command says that must be refused: one line, but for notes before it."""
    result = run(command)
    (error,) = (line for line in result.stderr.splitlines() if not line.startswith("note: "))
    assert result.returncode == 2 and ".py: error: " in error
    return error


def run_here(command: list[str]) -> subprocess.CompletedProcess:
    program = importlib.import_module(command[1].removesuffix(".py"))
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    notes.clear()
    sys.argv = [*map(str, command[1:])]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program.main(sys.argv[1:])
    except SystemExit as end:  # of --help
        code = end.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def done(out: Path) -> list[str]:
    return sorted(path.name[:4] for path in out.glob("*_record.npz"))


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}
