"""What a UNet predicts, found out by asking it: single files do not say it, and a model that is read wrongly
makes noise of every image.
"""

from __future__ import annotations

import torch

from diffattack.common.compiling import stance
from diffattack.common.errors import InputError
from diffattack.diffusion.inversion import PREDICTION_TYPES, LatentDiffusion

HALF = 0.3  # of the signal's power that is left where it is asked: there the three differ most
FITS, BETTER = 0.85, 0.7  # relative errors: of one that fits, and of it over that of the one that is said


@torch.no_grad()
def prediction_errors(model: LatentDiffusion, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How far the UNet's output is from each thing that it may predict, relative to that, for noised images.

    With a and s the scales of signal and noise, epsilon is the noise n, v_prediction a n - s z (Salimans and
    Ho, ICLR 2022), and sample the latents z themselves.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        labels: `(B, L)`, -1 where an image has fewer.
    """
    clean = model.encode(images.to(model.unet.device, model.dtype))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    alphas = model.scheduler.alphas_cumprod
    t = int((alphas - HALF).abs().argmin())
    signal, sigma = float(alphas[t] ** 0.5), float((1 - alphas[t]) ** 0.5)
    embeddings, _ = model.embed(model.prompts(labels))
    noised = (signal * clean + sigma * noise).to(model.unet_dtype)
    with stance(model.unet, "force_eager"):
        output = model.unet(noised, t, embeddings.to(model.unet_dtype)).sample.to(clean)
    meant = dict(zip(PREDICTION_TYPES, (noise, signal * noise - sigma * clean, clean)))
    return {name: float((output - target).norm() / target.norm()) for name, target in meant.items()}


def check_prediction_type(model: LatentDiffusion, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises InputError where the UNet predicts something else than its scheduler says."""
    errors, said = prediction_errors(model, images, labels), model.scheduler.config.prediction_type
    best = min(errors, key=errors.get)
    if best != said and errors[best] < min(FITS, BETTER * errors[said]):
        raise InputError(
            f"--pretrained_diffusion_path: its UNet predicts {best} and not {said} (relative errors on the "
            f"first image {errors[best]:.2f} and {errors[said]:.2f}); give --prediction_type {best}"
        )
