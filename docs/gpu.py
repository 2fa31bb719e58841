"""Figures for a GPU, in ten minutes and without a network: Stable Diffusion 2-base's shape with random
weights (2.5 GB, kept in --out) under this project and under the reference, and the small model's pictures
beside a CPU's.

    python docs/gpu.py                                            # on CUDA; the table grows as it goes
    python docs/gpu.py --device cpu --res 96 --random none        # to see that it runs

Each row is `benchmark.py` in a process of its own, so that one that does not fit costs no other. What is done
is kept in --out, and the same command goes on with the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to be run from anywhere

import diffattack.common.environment  # isort: skip  # noqa: F401

import argparse
import json
import subprocess
import tempfile
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr

# in the order of how much is learnt from them: a name, and flags of benchmark.py
ROWS = [
    ("default, bf16, 1 at once", "--only default --dtype bf16"),
    ("default, fp32 (TF32), 1 at once", "--only default --dtype fp32"),
    ("default, fp32 (TF32), 1 at once, 256 pixels", "--only default --dtype fp32 --res 256"),
    ("reference, fp32, 1 at once, 256 pixels", "--only reference --res 256"),
    ("default, bf16, 2 at once", "--only default --dtype bf16 --batch_size 2"),
    ("default, bf16, 4 at once", "--only default --dtype bf16 --batch_size 4"),
    ("default, bf16, 1, compiled", "--only default --dtype bf16 --compile"),
    ("default, bf16, 8 at once", "--only default --dtype bf16 --batch_size 8"),
    ("default, bf16, 1, checkpointing", "--only default --dtype bf16 --checkpointing on"),
    ("preset diffattack, bf16, 1 at once", "--only diffattack --dtype bf16"),
    ("reference, fp32, 1 at once", "--only reference"),
    ("default, fp32 (TF32), 4 at once", "--only default --dtype fp32 --batch_size 4"),
    ("default, bf16, 2, no checkpointing", "--only default --dtype bf16 --batch_size 2 --checkpointing off"),
    ("default, bf16, 16 at once", "--only default --dtype bf16 --batch_size 16"),
]
SMALL_MODEL_AFTER = 4  # rows
LATE = "not finished in time"
LEAST = 20  # seconds that a row is given, or it is not begun


def save_random_stable_diffusion(folder: Path, device: str) -> None:
    """Writes Stable Diffusion 2-base's shape with random weights, in bf16; the tokenizer is the small
    model's, so prompts are padded to 77 tokens as usual.
    """
    tokenizer = load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu")).tokenizer
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
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
                vocab_size=len(tokenizer),
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.bfloat16).save_pretrained(folder)


def remaining(deadline: float) -> float:
    return deadline - time.perf_counter()


def measure(flags: str, arguments: argparse.Namespace, deadline: float) -> dict:
    """What benchmark.py measured, or why not."""
    model = [] if arguments.random == "none" else ["--checkpoint", str(arguments.out / "random_sd2")]
    command = [sys.executable, "benchmark.py", *model, "--device", arguments.device]
    command += ["--res", str(arguments.res), *flags.split()]
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=remaining(deadline)
        )
    except subprocess.TimeoutExpired:
        return {"failed": LATE}
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": "does not fit" if "out of memory" in result.stderr.lower() else last[0][:200]}
    return json.loads(result.stdout)


def run_small_model(out: Path, arguments: argparse.Namespace, deadline: float) -> dict:
    """Pictures of the small model, by the GPU in both precisions and by the CPU, which computes in fp32."""
    results, pictures = {}, {}
    for name, flags in (
        ("GPU, fp32", ["--device", arguments.device, "--dtype", "fp32", "--batch_size", "1"]),
        ("CPU", ["--device", "cpu"]),
        ("GPU, bf16", ["--device", arguments.device, "--dtype", "bf16", "--batch_size", "1"]),
        ("GPU, fp32, batches", ["--device", arguments.device, "--dtype", "fp32"]),
    ):
        folder = out / name.lower().replace(", ", "_")
        command = [sys.executable, "main.py", "--save_dir", str(folder), "--limit", str(arguments.pictures)]
        command += ["--figures", "none", "--transfer_models", "", *flags]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=remaining(deadline)
            )
        except subprocess.TimeoutExpired:
            results[name] = {"failed": LATE}
            continue
        records = sorted(folder.glob("*_record.npz"))  # also where judges are not at hand
        if not records:
            results[name] = {"failed": result.stderr.strip()[-300:]}
            continue
        rows = [json.loads(str(np.load(path)["row"])) for path in records]
        paths = sorted(folder.glob("*_adv_image.png"))
        pictures[name] = [np.asarray(Image.open(path)) for path in paths]
        results[name] = {
            "seconds": float(np.mean([row["seconds"] for row in rows])),
            "fooled": sum(row["fooled"] for row in rows),
            "psnr": float(np.mean([row["psnr"] for row in rows])),
            "iterations": float(np.mean([row["iterations"] for row in rows])),
        }
    for name in pictures.keys() - {"CPU"} if "CPU" in pictures else ():
        pairs = zip(pictures[name], pictures["CPU"])
        results[name]["to the CPU's, dB"] = [round(psnr(ours, theirs), 1) for ours, theirs in pairs]
    return results


def described(name: str, result: dict) -> str:
    """A row of the table in docs/performance.md."""
    if "failed" in result:
        return f"| {name} | {result['failed']} | | | | |"
    (side,) = (result[side] for side in ("default", "diffattack", "reference") if side in result)
    seconds = side["seconds"]
    return (
        f"| {name} | {seconds:.2f} | {1 / seconds:.2f} | {side['peak_memory'] / 1e9:.1f} | "
        f"{side['warm_up']:.0f} | {side['unet_evaluations']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", metavar="DEVICE")
    parser.add_argument("--random", default="sd2-base", choices=("sd2-base", "none"))
    parser.add_argument("--res", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--minutes", type=float, default=9.5, metavar="M", help="after which it ends")
    parser.add_argument("--pictures", type=int, default=4, metavar="K", help="of the small model")
    parser.add_argument("--rows", type=int, default=len(ROWS), metavar="K", help="the first K rows alone")
    parser.add_argument("--out", type=Path, default=Path("output_gpu"), metavar="FOLDER")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.random != "none" and not (arguments.out / "random_sd2").is_dir():
        save_random_stable_diffusion(arguments.out / "random_sd2", arguments.device)
    known = arguments.out / "gpu.json"
    results = json.loads(known.read_text()) if known.is_file() else {}

    def keep(name: str, result: dict) -> None:
        results[name] = result
        known.write_text(json.dumps(results, indent=2))

    print("| | s an image | images a second | peak GB | s of warm-up | UNet evaluations |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, flags in ROWS[: arguments.rows]:
        if name not in results and remaining(deadline) > LEAST:
            result = measure(flags, arguments, deadline)
            if result.get("failed") == LATE:  # to be tried by the next call
                print(f"{name}: {LATE}", file=sys.stderr)
            else:
                keep(name, result)
        if name in results:
            print(described(name, results[name]), flush=True)
        if name == ROWS[min(SMALL_MODEL_AFTER, arguments.rows) - 1][0] and "small model" not in results:
            with tempfile.TemporaryDirectory() as folder:
                keep("small model", run_small_model(Path(folder), arguments, deadline))
    print(json.dumps(results.get("small model"), indent=2))


if __name__ == "__main__":
    main()
