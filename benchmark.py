"""Times this project's defaults, its `--preset diffattack` and the slow reference of tests/, which is that
preset, on the same model, classifier, image and seed, each in a process of its own, one after the other.

    python benchmark.py                                  # the small diffusion model
    python benchmark.py --checkpoint PATH                # another one

It prints JSON: seconds and evaluations an image, of one run after a warm-up, bytes of memory, and the ratios
to the reference. Evaluations of the UNet (a sample's forward pass, and its backward pass) and of the decoder
are the same on every machine. Peak memory is the process's, with the libraries (on CUDA, the device's).
"""

import diffattack.common.environment  # isort: skip  # noqa: F401

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch

from diff_latent_attack import DiffAttack
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.device import BACKWARD, measured, resolve_device, set_up
from diffattack.common.errors import run_program
from diffattack.common.flags import HelpFormatter
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.dataset import read_dataset
from diffattack.data.images import read_image, to_tensor
from diffattack.diffusion.pipeline import compile_pipeline, load_pipeline
from diffattack.options import ATTACK_PRESETS

ROOT = Path(__file__).resolve().parent
ORIGINAL = ATTACK_PRESETS["diffattack"]
SIDES = ("default", "diffattack", "reference")
MEASURES = ("seconds", "unet_evaluations", "vae_evaluations", "peak_memory")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add, ours = parser.add_argument, "of this project; the reference"
    add("--checkpoint", default=str(ROOT / "demo/tiny_diffusion"), metavar="PATH", help="the diffusion model")
    add("--model_name", choices=list(REGISTRY), default="efficientnet_lite0", help="the classifier")
    add("--res", type=int, default=224, metavar="PIXELS", help="side of the image")
    add("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:1, mps or cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help=f"{ours} runs in fp32")
    add("--batch_size", type=int, default=1, metavar="B", help=f"{ours} takes one image at a time")
    add("--iterations", type=int, metavar="K", help="of all sides (default: of each its own)")
    add("--compile", action="store_true", help="this project with torch.compile")
    add("--checkpointing", choices=("auto", "on", "off"), default="auto", help=f"{ours} has none")
    add("--only", choices=SIDES, help="measure one of the sides, where another does not fit")
    return parser.parse_args()


def measure_side(side: str, arguments: argparse.Namespace) -> dict:
    """Seconds, evaluations and memory of one side; to be called in a process of its own."""
    device = resolve_device(arguments.device)
    is_ours = side != "reference"
    dtype = torch.bfloat16 if is_ours and arguments.dtype == "bf16" else torch.float32
    if is_ours:
        set_up(device)
    items = read_dataset(ROOT / "demo/images", ROOT / "demo/labels.txt", IMAGENET_CLASSES)
    items = list(islice(cycle(items), arguments.batch_size if is_ours else 1))
    images = torch.cat([to_tensor(read_image(item.path, arguments.res)) for item in items])
    labels = [item.labels[0] for item in items]
    torch.manual_seed(0)
    pipeline = load_pipeline(arguments.checkpoint, device, dtype)
    classifier = load_classifier(arguments.model_name).to(device)
    if arguments.compile and is_ours:
        compile_pipeline(pipeline)
    settings = ORIGINAL if side == "diffattack" else {}
    checkpointing = {"auto": None, "on": True, "off": False}[arguments.checkpointing]

    def attack(**iterations: int) -> None:
        if is_ours:
            settled = DiffAttack(pipeline, classifier, checkpointing=checkpointing, **settings | iterations)
            settled(images, labels)
        else:
            plain_attack(pipeline, classifier, images.to(device), labels[0], **ORIGINAL | iterations)

    return timed(attack, arguments.iterations, pipeline) | {"images": len(images)}


def plain_attack(pipeline, classifier, image: torch.Tensor, label: int, iterations: int, **ignored) -> None:
    """The reference, in float32 with PyTorch's defaults."""
    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    torch.backends.cudnn.allow_tf32 = False
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.to(memory_format=torch.contiguous_format).requires_grad_(False)
    given = (pipeline, DiffAttack(pipeline, classifier).scheduler, classifier, image, label)
    more = dict(iterations=iterations, inversion=reference.invert_as_diffattack)
    reference.attack(*given, IMAGENET_CLASSES[label], **more)


def timed(attack: Callable, iterations: int | None, pipeline) -> dict:
    """What one run takes, after a warm-up of two iterations; of all its images together."""
    networks, device = {"unet": [pipeline.unet], "vae": [pipeline.vae.decoder]}, pipeline.device

    with measured({}, device) as warm_up:
        attack(iterations=2)  # of which most is compiling where there is any
    with measured(networks, device) as cost:
        attack(**({} if iterations is None else {"iterations": iterations}))
    evaluations = {f"{k}_evaluations": cost.counts[k] + cost.counts[k + BACKWARD] for k in networks}
    times = {"seconds": cost.seconds, "warm_up": warm_up.seconds}
    return times | evaluations | {"peak_memory": cost.peak_memory}


def compare(arguments: argparse.Namespace) -> dict:
    """What was measured of an image on each side, and the ratios to the reference."""
    results = {"torch": torch.__version__, **vars(arguments)}
    for side in SIDES if arguments.only is None else (arguments.only,):
        # one process for each, since a resident set does not shrink
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results[side] = pool.submit(measure_side, side, arguments).result()
        images = results[side].pop("images")
        for name in ("seconds", "unet_evaluations", "vae_evaluations"):
            results[side][name] /= images
    if arguments.only is None:
        plain = results["reference"]
        results["ratios"] = {side: {k: results[side][k] / plain[k] for k in MEASURES} for side in SIDES[:2]}
    return results


def report(arguments: argparse.Namespace) -> int:
    print(json.dumps(compare(arguments), indent=2))
    return 0


def main() -> int:
    arguments = parse_arguments()
    return run_program("benchmark.py", lambda: report(arguments), done="")


if __name__ == "__main__":
    sys.exit(main())
