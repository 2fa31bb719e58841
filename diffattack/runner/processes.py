"""How many processes share out a run's images, and what each of them holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.common.costs import bytes_of
from diffattack.common.workers import import_ahead, processes_for
from diffattack.data.dataset import Item
from diffattack.data.layout import Layout
from diffattack.options import Options
from diffattack.runner.folder import missing_of

# by each process of a CPU: reading and compiling all of this takes longer than to attack a picture
NEEDED = (
    "diffattack.common.mended",
    "diffattack.runner.runner",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_dc",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torchmetrics.functional.image",
)


LIBRARIES = 0.5e9  # bytes of a process that has imported them


def largest_count(options: Options, device: torch.device, images: int, launched: int) -> int:
    """How many processes of this machine share out the images, as far as memory allows."""
    if options.processes is not None:
        return min(options.processes, images)
    alone = options.weight_mode == "learnable" or (options.batch_size or 1) > 1
    return 1 if launched > 1 or device.type != "cpu" or alone else processes_for(images)


def get_ready(
    runs: Sequence[tuple[Options, Layout]], device: torch.device, items: Sequence[Item], launched: int = 1
) -> None:
    """Has imported ahead what processes need, if any of these runs will have some for images that are not
    finished.
    """
    for options, layout in runs:
        unfinished = options.overwrite or missing_of(items, layout)
        if unfinished and largest_count(options, device, len(items), launched) > 1:
            import_ahead(NEEDED)


def count_processes(options: Options, attack: DiffAttack | PixelAttack, images: int, launched: int) -> int:
    """How many processes of this machine share out the images. It does not depend on how many are done, so
    that a run that goes on computes as before.
    """
    largest = largest_count(options, attack.device, images, launched)
    if options.processes is not None or largest == 1:
        return largest
    weights = bytes_of(loaded_networks(attack))
    # Measured at 224 pixels: the small model's activations, and those of Stable Diffusion 2-base's shape,
    # which are 1.2 times its weights.
    activations = max(0.3e9, 1.2 * weights) * (options.res / 224) ** 2
    return processes_for(images, int(LIBRARIES + weights + activations))


def loaded_networks(attack: DiffAttack | PixelAttack) -> list[torch.nn.Module]:
    """Whose weights an attack needs in memory."""
    pipeline = attack.pipeline
    if isinstance(attack, PixelAttack) and not attack.needs_diffusion:  # it is there to judge
        pipeline = None
    parts = [] if pipeline is None else [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    return [*parts, *attack.classifiers]
