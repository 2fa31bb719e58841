"""Trains demo/tiny_diffusion, the small latent diffusion model that ships with the project.

    python demo/train_tiny_diffusion.py                       # everything; rerun the same line to resume
    python demo/train_tiny_diffusion.py --stages data,teacher,autoencoder --autoencoder_minutes 30
    python demo/train_tiny_diffusion.py --stages unet,export --unet_minutes 90
    python demo/train_tiny_diffusion.py --stages neighbours   # training crops most like what is measured on

It needs Debian's `apt-get` and `dpkg` for the photographs (demo/README.md lists the packages and their
licences), writes everything under --work_dir, checkpoints each minute, and uses CUDA where there is a GPU.
Each stage is a file beside this one. The learning rate falls to zero over the minutes given, so a stage that
is resumed goes on with the same clock. `demo/evaluate_tiny_diffusion.py` measures the result on photographs
that are not trained on.
"""

from training_common import DEMO  # isort: skip  # first: it lets the others find the project's modules

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from training_autoencoder import build_autoencoder, train_autoencoder
from training_data import draw_neighbours, prepare_data
from training_teacher import observe
from training_unet import build_text_encoder, build_tokenizer, build_unet, noise_schedule, train_unet

from diffattack.common.device import keep_freed_memory


def export(work: Path, target: Path) -> None:
    """Writes the pipeline in diffusers format, weights in fp16 safetensors."""
    tokenizer = build_tokenizer(work)
    state = torch.load(work / "unet.pt", map_location="cpu", weights_only=True)
    vae = build_autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", map_location="cpu", weights_only=True)["network"])
    # StableDiffusionPipeline counts them for the factor
    vae.register_to_config(block_out_channels=vae.config.decoder_block_out_channels)
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    networks.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizer,
        unet=networks["unet"],
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    print(
        f"wrote {target.name}: "
        f"{sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**20:.1f} MiB, "
        f"{state['step']} UNet steps in {state['seconds'] / 60:.0f} min"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages",
        default="data,teacher,autoencoder,unet,export",
        help="comma-separated, in this order (default: all)",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=DEMO.parent / "tiny_diffusion_training",
        help="crops and checkpoints (default: tiny_diffusion_training beside demo)",
    )
    parser.add_argument("--autoencoder_minutes", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--unet_minutes", type=float, default=90, help="default: %(default)s")
    parser.add_argument(
        "--target",
        type=Path,
        default=DEMO / "tiny_diffusion",
        help="where export writes (default: tiny_diffusion beside this file)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    work, device = arguments.work_dir, torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    stages = {
        "data": lambda: prepare_data(work),
        "teacher": lambda: observe(work, device),
        "autoencoder": lambda: train_autoencoder(work, arguments.autoencoder_minutes, device),
        "unet": lambda: train_unet(work, arguments.unet_minutes, device),
        "neighbours": lambda: draw_neighbours(work, device),
        "export": lambda: export(work, arguments.target),
    }
    for stage in arguments.stages.split(","):
        stages[stage]()


if __name__ == "__main__":
    main()
