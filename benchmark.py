"""Times this project's defaults, its `--preset diffattack` and the slow reference of tests/, which is that
preset, on the same model, classifier, image and seed, each in a process of its own, one after the other.

    python benchmark.py                                  # the small diffusion model
    python benchmark.py --checkpoint PATH                # another one
    python benchmark.py --random sd2-base --device cuda  # the shape of Stable Diffusion 2, random weights
    python benchmark.py --json                           # `ratios` are those to the reference

Stages are timed apart, after a warm-up, and the median of the runs is given. Evaluations of the UNet (a
sample's forward pass, and its backward pass) and of the VAE's decoder are counted too, because counts are the
same on every machine. Peak memory is the process's, with the libraries (on CUDA, the device's).
"""

import diffattack.common.environment  # isort: skip  # noqa: F401
import diffattack.common.mended  # isort: skip  # noqa: F401

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diff_latent_attack import DiffAttack
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.commands import run_program
from diffattack.common.costs import BACKWARD, measured
from diffattack.common.devices import resolve_device, set_up
from diffattack.common.flags import HelpFormatter
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.dataset import read_dataset
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.pipeline import compile_pipeline, load_pipeline
from diffattack.evaluation.tables import table
from diffattack.options import ATTACK_PRESETS

ROOT = Path(__file__).resolve().parent
ORIGINAL = ATTACK_PRESETS["diffattack"]
SIDES = ("default", "diffattack", "reference")
MEASURES = ("unet_evaluations", "vae_evaluations", "seconds", "peak_memory")


def random_stable_diffusion(device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Stable Diffusion 2-base's shape with random weights; the tokenizer is the small model's, so prompts are
    padded to 77 tokens as usual.
    """
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
            )
        )
    tokenizer = load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu")).tokenizer
    tokenizer.model_max_length = 77
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype)


@contextmanager
def watched_memory(device: torch.device) -> Iterator[list[int]]:
    """The peak inside the block in bytes: of what CUDA allocated, or of the resident set, sampled 50 times a
    second.
    """
    peak = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    process, stop, highest = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            highest[0] = max(highest[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
    peak.append(highest[0])


@contextmanager
def timed(
    owner: object, methods: dict[str, tuple[str, ...]], device: torch.device
) -> Iterator[dict[str, float]]:
    """Adds up the seconds that the owner's methods take inside the block, by stage."""
    seconds = dict.fromkeys(methods, 0.0)

    def wrap(stage: str, method: Callable) -> Callable:
        def call(*arguments, **options):
            finish(device)
            started = time.perf_counter()
            result = method(*arguments, **options)
            finish(device)
            seconds[stage] += time.perf_counter() - started
            return result

        return call

    with ExitStack() as stack:
        for stage, names in methods.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, wrap(stage, getattr(owner, name))))
        yield seconds


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    work: Callable,
    warm_up: Callable,
    owner: object,
    methods: dict,
    pipeline: StableDiffusionPipeline,
    images: int,
    runs: int,
) -> dict:
    """Median seconds an image, whole and by stage, peak memory, and the counts of one run."""
    device = pipeline.device
    started = time.perf_counter()
    warm_up()
    finish(device)
    warmed_up = time.perf_counter() - started
    networks, totals, stages = {"unet": [pipeline.unet], "vae": [pipeline.vae.decoder]}, [], []
    with watched_memory(device) as peak, measured(networks, device) as costs:
        for _ in range(runs):
            finish(device)
            started = time.perf_counter()
            with timed(owner, methods, device) as seconds:
                work()
            totals.append((time.perf_counter() - started) / images)
            stages.append({stage: value / images for stage, value in seconds.items()})
    return {
        "seconds": statistics.median(totals),
        "stages": {stage: statistics.median(s[stage] for s in stages) for stage in methods},
        **{
            f"{name}_evaluations": (costs.counts[name] + costs.counts[name + BACKWARD]) / runs / images
            for name in networks
        },
        "peak_memory": peak[0],
        "warm_up": warmed_up,  # of which most is compiling where there is any
    }


def load(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    if arguments.random:
        return random_stable_diffusion(device, dtype)
    return load_pipeline(arguments.checkpoint, device, dtype)


def measure_project(
    arguments: argparse.Namespace,
    preset: dict,
    images: torch.Tensor,
    labels: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict:
    """This project under a preset, on all images at once."""
    set_up(device)
    pipeline, classifier = load(arguments, device, dtype), load_classifier(arguments.model_name).to(device)
    if arguments.compile:
        compile_pipeline(pipeline)
    checkpointing = {"auto": None, "on": True, "off": False}[arguments.checkpointing]
    asked = {} if arguments.iterations is None else {"iterations": arguments.iterations}
    attack = DiffAttack(pipeline, classifier, checkpointing=checkpointing, **preset | asked)
    quick = DiffAttack(pipeline, classifier, checkpointing=checkpointing, **preset | {"iterations": 2})
    methods = {
        "encode": ("encode",),
        "inversion": ("ddim_inversion",),
        "null-text": ("optimise_null_text",),
        "attack": ("attack",),
    }
    return measure(
        lambda: attack(images, torch.tensor(labels)),
        lambda: quick(images, torch.tensor(labels)),
        attack,
        methods,
        pipeline,
        len(images),
        arguments.runs,
    )


def measure_reference(
    arguments: argparse.Namespace, images: torch.Tensor, labels: list[int], device: torch.device
) -> dict:
    """The reference on the first image, in float32 with PyTorch's defaults."""
    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    pipeline, classifier = (
        load(arguments, device, torch.float32),
        load_classifier(arguments.model_name).to(device),
    )
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.to(memory_format=torch.contiguous_format).requires_grad_(False)
    image, caption, scheduler = (
        images[:1].to(device),
        IMAGENET_CLASSES[labels[0]],
        DiffAttack(pipeline, classifier).scheduler,
    )
    methods = {
        "encode": ("encode",),
        "inversion": ("invert_as_diffattack",),
        "null-text": ("null_text",),
        "attack": ("optimise", "denoise"),
    }

    def work(iterations: int = arguments.iterations or ORIGINAL["iterations"]) -> None:
        reference.attack(
            pipeline,
            scheduler,
            classifier,
            image,
            labels[0],
            caption,
            iterations=iterations,
            inversion=lambda *arguments: reference.invert_as_diffattack(*arguments),  # as it is timed
        )

    return measure(work, lambda: work(2), reference, methods, pipeline, 1, arguments.runs)


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint",
        default=str(ROOT / "demo/tiny_diffusion"),
        metavar="PATH",
        help="a folder in diffusers format, or a hub id",
    )
    parser.add_argument(
        "--random", choices=("sd2-base",), default=None, help="random weights of that shape instead"
    )
    parser.add_argument(
        "--model_name", choices=list(REGISTRY), default="efficientnet_lite0", help="the classifier"
    )
    parser.add_argument("--res", type=int, default=224, metavar="PIXELS", help="side of the image")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:1, mps or cpu")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of this project; the reference runs in fp32",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="B",
        help="of this project; the reference takes one image at a time",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=None,
        metavar="K",
        help="optimisation steps on the latent, of all sides (default: of each its own)",
    )
    parser.add_argument("--compile", action="store_true", help="this project with torch.compile")
    parser.add_argument(
        "--checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="of this project: keep the graph of one timestep at a time",
    )
    parser.add_argument("--runs", type=int, default=3, metavar="K", help="of which the median is given")
    parser.add_argument(
        "--only",
        choices=SIDES,
        default=None,
        help="measure one of the sides, where another does not fit",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def measure_side(side: str, arguments: argparse.Namespace) -> dict:
    """What was measured of one side; to be called in a process of its own."""
    device = resolve_device(arguments.device)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    items = read_dataset(ROOT / "demo/images", ROOT / "demo/labels.txt", IMAGENET_CLASSES)
    items = list(islice(cycle(items), arguments.batch_size))
    labels = [item.labels[0] for item in items]
    images = torch.cat([to_tensor(read_image(item.path, arguments.res)) for item in items])
    if side == "reference":
        measured = measure_reference(arguments, images, labels, device)
    else:
        preset = ORIGINAL if side == "diffattack" else {}
        measured = measure_project(arguments, preset, images, labels, device, dtype)
    return measured | {"machine": describe_machine(device)}


def compare(arguments: argparse.Namespace) -> dict:
    """What was measured of the sides, and the ratios to the reference."""
    results = {
        "model": arguments.random or Path(arguments.checkpoint).name,
        "res": arguments.res,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "runs": arguments.runs,
    }
    for side in SIDES if arguments.only is None else (arguments.only,):
        # one process for each, since a resident set does not shrink
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results[side] = pool.submit(measure_side, side, arguments).result()
        results["machine"] = results[side].pop("machine")
    if arguments.only is None:
        results["ratios"] = {
            side: {key: results[side][key] / results["reference"][key] for key in MEASURES}
            for side in ("default", "diffattack")
        }
    return results


def describe(results: dict) -> list[str]:
    """The same as an aligned table."""
    sides = [side for side in SIDES if side in results]
    whole = len(sides) == len(SIDES)
    lines = [
        f"{results['machine']}; {results['model']}, {results['res']} pixels; this project in "
        f"{results['dtype']}, {results['batch_size']} at once"
    ]
    rows = [["an image", *sides, *(["default / reference", "diffattack / reference"] if whole else [])]]

    def row(label: str, values: list[float]) -> list[str]:
        ratios = [f"{value / values[-1]:.3f}" if values[-1] else "" for value in values[:-1]]
        return [label, *(f"{value:.2f}" for value in values), *(ratios if whole else [])]

    for stage in results[sides[0]]["stages"]:
        rows.append(row(f"{stage}, s", [results[side]["stages"][stage] for side in sides]))
    for label, key, scale in (
        ("whole, s", "seconds", 1),
        ("UNet evaluations", "unet_evaluations", 1),
        ("VAE decoder evaluations", "vae_evaluations", 1),
        ("peak memory, GB", "peak_memory", 1e-9),
    ):
        rows.append(row(label, [results[side][key] * scale for side in sides]))
    return lines + table(rows)


def report(arguments: argparse.Namespace) -> int:
    results = compare(arguments)
    print(json.dumps(results, indent=2) if arguments.json else "\n".join(describe(results)))
    return 0


def main() -> int:
    arguments = parse_arguments()
    return run_program("benchmark.py", lambda: report(arguments), done="")


if __name__ == "__main__":
    sys.exit(main())
