"""Stage `autoencoder` of demo/train_tiny_diffusion.py: a lapped orthogonal transform as encoder, and a
decoder trained from its inverse.

The network is the deep compression autoencoder of Chen et al. (arXiv 2410.10733), which moves pixels into
channels and back instead of averaging and repeating them. So encoder and decoder can be *set* to a linear
transform and its inverse, exactly, and training only has to add what a linear decoder cannot do.

The transform gives each place of the latents a window of 16 x 16 pixels, half of which it shares with its
neighbours. Its rows are orthogonal, so that noise of a given size in the latents is noise of one size in the
picture, whatever its direction, and most of the variance is in few channels, which is what lets a UNet tell a
picture from noise; an encoder that is trained freely gives fine detail as much variance as everything else.
Principal components of patches of 8 x 8 do the same with edges that show as blocks.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from training_common import SIZE, Clock, as_input, save_atomically

FACTOR, WINDOW = 8, 16
LATENT_CHANNELS = 48
# Of the latents, in all directions together. The attack moves each of their numbers by about 0.01 an
# iteration, whatever they mean: the smaller the deviation, the more of the picture that is. With 0.72 the
# adversarial images are as far from the originals as a mean PSNR of 29 dB allows.
LATENT_DEVIATION = 0.72
# the first only counts: the network's last layer makes 2 x 2 pixels of each place of the second
DECODER_WIDTHS = (16, 32, 64, 128)
# up to this share of the latents' deviation: what a UNet hands to the decoder is never quite a latent of the
# encoder
DECODER_NOISE = 0.1
LARGE = 10.0  # of constant channels, beside which the rest hardly changes the last normalisation


# ---------------------------------------------------------------- the transform


def lapped_transform(
    crops: np.ndarray, device: torch.device, steps: int = 8000, batch: int = 8, peak: float = 2e-3
) -> torch.Tensor:
    """Kernel `(LATENT_CHANNELS, 3, WINDOW, WINDOW)` whose transpose undoes it as well as possible.

    It starts at the principal components of the patches and minimises the error of `K^T K x`, which is
    smallest for orthogonal rows that span the strongest directions (Baldi and Hornik, 1989), here with
    overlapping windows (Malvar and Staelin, 1989).
    """
    patches = (
        F.pixel_unshuffle(as_input(torch.from_numpy(np.array(crops[:600]))), FACTOR).movedim(1, 0).flatten(1)
    )  # (192, many)
    patches = patches - patches.mean(1, keepdim=True)
    directions = torch.linalg.eigh(patches @ patches.T).eigenvectors.flip(1)[:, :LATENT_CHANNELS].T
    margin = (WINDOW - FACTOR) // 2
    kernel = F.pad(directions.unflatten(1, (3, FACTOR, FACTOR)), (margin,) * 4).to(device).requires_grad_()
    optimizer = torch.optim.Adam([kernel], lr=peak)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(0)
    for _ in range(steps):
        x = as_input(torch.from_numpy(crops[np.sort(random.integers(0, len(crops), batch))]).to(device))
        latents = F.conv2d(x, kernel, stride=FACTOR, padding=margin)
        error = (
            (F.conv_transpose2d(latents, kernel, stride=FACTOR, padding=margin) - x).square().mean((1, 2, 3))
        )
        optimizer.zero_grad()
        (error + 1e-4).log().mean().backward()
        optimizer.step()
        schedule.step()
    return kernel.detach().cpu()


class Encoder:
    """What the autoencoder's encoder computes: images `(B, 3, H, W)` in [-1, 1] to latents `(B,
    LATENT_CHANNELS, H / 8, W / 8)` of deviation LATENT_DEVIATION.

    It is kept in encoder.pt: were it computed anew from other crops, decoder and UNet would have to be
    trained anew.
    """

    def __init__(self, work: Path, crops: np.ndarray, device: torch.device):
        if not (work / "encoder.pt").exists():
            kernel = lapped_transform(crops, device)
            latents = self._transform(as_input(torch.from_numpy(np.array(crops[:600]))), kernel)
            mean = latents.mean((0, 2, 3))
            save_atomically(
                {
                    "kernel": kernel,
                    "mean": mean,
                    "scale": (latents - mean.view(-1, 1, 1)).std() / LATENT_DEVIATION,
                },
                work / "encoder.pt",
            )
        state = torch.load(work / "encoder.pt", map_location=device, weights_only=True)
        self.kernel, self.mean, self.scale = state["kernel"], state["mean"], state["scale"]

    @staticmethod
    def _transform(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, kernel, stride=FACTOR, padding=(WINDOW - FACTOR) // 2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self._transform(x, self.kernel) - self.mean.view(-1, 1, 1)) / self.scale

    @property
    def centred_kernel(self) -> torch.Tensor:
        """The kernel in the middle of a window of 3 x 3 patches, `(LATENT_CHANNELS, 3, 24, 24)`."""
        return F.pad(self.kernel, ((3 * FACTOR - WINDOW) // 2,) * 4)


# ---------------------------------------------------------------- the network, set to the transform


def build_autoencoder() -> AutoencoderDC:
    vae = AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(12, 12, 48, 192),
        encoder_layers_per_block=(0, 1, 1, 0),
        encoder_qkv_multiscales=((),) * 4,
        encoder_out_shortcut=False,
        decoder_block_out_channels=DECODER_WIDTHS,
        decoder_layers_per_block=(0, 1, 2, 2),
        decoder_qkv_multiscales=((),) * 4,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )
    for module in vae.modules():
        if type(module).__name__ == "ResBlock":  # starts as the identity
            torch.nn.init.zeros_(module.norm.weight)
    return vae


@torch.no_grad()
def set_to_transform(vae: AutoencoderDC, encode: Encoder) -> None:
    """Makes the encoder compute the transform and the decoder its transpose, both exactly but for the last
    normalisation.
    """
    set_encoder(vae.encoder, encode)
    set_decoder(vae.decoder, encode)


def set_encoder(encoder: torch.nn.Module, encode: Encoder) -> None:
    """Pixels become channels by the network's own shortcuts; its last convolution is the kernel."""
    for convolution in (module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)):
        convolution.weight.zero_()
        if convolution.bias is not None:
            convolution.bias.zero_()
    encoder.conv_in.conv.weight[range(3), range(3), 1, 1] = 1
    order = torch.arange(3 * FACTOR**2, dtype=torch.float32).view(1, 3, FACTOR, FACTOR)
    for _ in range(3):
        order = F.pixel_unshuffle(order, 2)
    kernel = encode.centred_kernel.unflatten(3, (3, FACTOR)).unflatten(
        2, (3, FACTOR)
    )  # (latents, 3, 3, y, 3, x)
    kernel = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (latents, pixel of a patch, 3, 3)
    encoder.conv_out.weight.copy_(kernel[:, order.flatten().long()] / encode.scale)
    encoder.conv_out.bias.copy_(-encode.mean / encode.scale)


def set_decoder(decoder: torch.nn.Module, encode: Encoder) -> None:
    """28 to 56: the transpose of the kernel, as pixels of patches of 4 x 4; 56 to 112: those to patches of 2
    x 2, with both signs; then pixels.

    The two signs undo the ReLU: `relu(v) - relu(-v) = v`. The channels that both leave are large constants,
    so that the normalisation before it divides by almost a constant.
    """
    finer, last = decoder.up_blocks[2][0], decoder.up_blocks[1][0]
    decoder.conv_in.weight[:LATENT_CHANNELS] = 0
    decoder.conv_in.weight[range(LATENT_CHANNELS), range(LATENT_CHANNELS), 1, 1] = 1
    decoder.conv_in.bias.zero_()

    # A pixel at (y, x) of patch (i, j) gets from the latents at (i + a - 1, j + b - 1) what their kernel has
    # at that pixel, seen from there.
    kernel = encode.centred_kernel * encode.scale
    synthesis = (
        kernel.unflatten(3, (3, FACTOR)).unflatten(2, (3, FACTOR)).flip(2, 4)
    )  # (latents, 3, a, y, b, x)
    synthesis = synthesis.unflatten(5, (2, 4)).unflatten(3, (2, 4))  # (latents, colour, a, Y, y, b, X, x)
    synthesis = (
        synthesis.permute(1, 4, 7, 3, 6, 0, 2, 5).flatten(0, 2).flatten(1, 2)
    )  # (pixel of 4 x 4, Y X, latents, a, b)
    set_upsampling(finer, synthesis)
    # The mean's own synthesis is the same at every place, so it is a bias, given through the four phases.
    bias = torch.einsum("psk,k->ps", synthesis.sum((3, 4)), encode.mean / encode.scale)
    finer.conv.bias[: bias.numel()] = bias.flatten()

    # of 48 channels (colour, 4, 4), the 2 x 2 at phase (Y, X): channels (colour, 2, 2)
    width = DECODER_WIDTHS[2]
    pick = torch.eye(48).unflatten(0, (3, 2, 2, 2, 2)).permute(0, 2, 4, 1, 3, 5)  # (colour, y, x, Y, X, 48)
    pick = F.pad(pick.flatten(3, 4).flatten(0, 2), (0, width - 48))  # (12, 4, width)
    centre = F.pad(torch.cat([pick, -pick])[..., None, None], (1, 1, 1, 1))
    set_upsampling(last, centre)
    last.conv.bias[4 * 24 :] = LARGE

    constants = DECODER_WIDTHS[1] - 24
    decoder.norm_out.weight.fill_(LARGE * (constants / DECODER_WIDTHS[1]) ** 0.5)
    decoder.norm_out.bias.zero_()
    out = decoder.conv_out.conv
    out.weight.zero_()
    out.bias.zero_()
    out.weight[range(12), range(12), 1, 1] = 1
    out.weight[range(12), range(12, 24), 1, 1] = -1


def set_upsampling(block: torch.nn.Module, weights: torch.Tensor) -> None:
    """Sets an upsampling block to `weights`, `(channels out, 4 phases, channels in, 3, 3)`, against its own
    shortcut, which repeats its input.
    """
    weight = block.conv.weight
    weight.zero_()
    block.conv.bias.zero_()
    channels, _, inputs = weights.shape[:3]
    weight[: 4 * channels, :inputs] = weights.flatten(0, 1)
    outputs = torch.arange(len(weight))
    weight[outputs, outputs // block.repeats, 1, 1] -= 1


# ---------------------------------------------------------------- training of the decoder


def random_windows(
    crops: np.ndarray, chosen: np.ndarray, side: int, random: np.random.Generator, device: torch.device
) -> torch.Tensor:
    """Random windows of the chosen crops, half of them mirrored: `(B, 3, side, side)` in [-1, 1]."""
    x = np.empty((len(chosen), side, side, 3), np.uint8)
    for k, i in enumerate(chosen):
        top, left = random.integers(0, SIZE - side + 1, 2)
        x[k] = crops[i, top : top + side, left : left + side][:, :: 1 if random.random() < 0.5 else -1]
    return as_input(torch.from_numpy(x).to(device))


@torch.no_grad()
def holdout_psnr(autoencoder: Callable, holdout: np.ndarray, device: torch.device) -> float:
    """Mean PSNR in dB over the held-out crops."""
    x = as_input(torch.from_numpy(holdout).to(device))
    errors = [(autoencoder(part).clamp(-1, 1) - part).square().mean((1, 2, 3)) for part in x.split(8)]
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


def train_autoencoder(
    work: Path, minutes: float, device: torch.device, batch: int = 8, side: int = 112, peak: float = 3e-5
) -> None:
    """Trains the decoder for so many minutes in all, resuming from autoencoder.pt; the encoder is the
    transform.

    The loss is the log of each crop's squared error, which is its PSNR: dark and smooth pictures count as
    much as busy ones.
    """
    torch.manual_seed(0)
    crops, holdout = np.load(work / "crops.npy", mmap_mode="r"), np.load(work / "holdout.npy")
    encode, vae, path = Encoder(work, crops, device), build_autoencoder().to(device), work / "autoencoder.pt"
    set_to_transform(vae.cpu(), Encoder(work, crops, torch.device("cpu")))
    vae.to(device).encoder.requires_grad_(False)
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0)
    step, clock = 0, Clock(minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        vae.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], Clock(minutes, state["seconds"])
    random = np.random.default_rng(step + 1)

    def save() -> None:
        save_atomically(
            {
                "network": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": clock.done,
            },
            path,
        )
        quality = holdout_psnr(lambda x: vae.decoder(encode(x)), holdout, device)
        with open(path.with_suffix(".log"), "a") as log:
            print(f"step {step} {clock.done / 60:.1f} min held-out PSNR {quality:.2f} dB", file=log)

    if step == 0:
        save()
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.learning_rate(peak, step)
        x = random_windows(crops, random.integers(0, len(crops), batch), side, random, device)
        latents = encode(x)
        noise = (
            DECODER_NOISE
            * LATENT_DEVIATION
            * torch.rand(batch, 1, 1, 1, device=device)
            * torch.randn_like(latents)
        )
        loss = ((vae.decoder(latents + noise) - x).square().mean((1, 2, 3)) + 3e-4).log().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if clock.time_to_save():
            save()
    save()
