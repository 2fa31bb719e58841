"""Trains demo/tiny_diffusion, the small latent diffusion model that ships with the project.

    python demo/train_tiny_diffusion.py                       # everything; rerun the same line to resume
    python demo/train_tiny_diffusion.py --stages data,autoencoder --autoencoder_minutes 40
    python demo/train_tiny_diffusion.py --stages unet,export --unet_minutes 90
    python demo/train_tiny_diffusion.py --stages neighbours   # which training crops look most like the photographs that are measured on

It needs Debian's `apt-get` and `dpkg` for the photographs (demo/README.md lists the packages and their licences),
writes everything under --work_dir, checkpoints each minute, and uses CUDA where there is a GPU.
The learning rate falls to zero over the minutes given, so a stage that is resumed goes on with the same clock.
`demo/evaluate_tiny_diffusion.py` measures the result on photographs that are not trained on.
"""

import argparse
import copy
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from classifiers import IMAGENET_CLASSES, load_classifier  # noqa: E402
from utils import image_grid, keep_freed_memory, read_image, write_image  # noqa: E402

SIZE = 224
PACKAGES = ("plasma-workspace-wallpapers", "gnome-backgrounds", "mate-backgrounds", "ukui-wallpapers", "lomiri-wallpapers-16.04",
            "lomiri-wallpapers-20.04", "opencv-doc", "scratch", "tuxpaint-stamps-default", "gcompris-qt-data")
# Drawn rather than photographed, or many times the same scene (OpenCV's calibration pictures).
EXCLUDED = ("cartoon", "/symbols/", "/flags/", "_mirror", "/html/", "/contents/screenshot", "data/left", "data/right")
# GCompris packs its photographs into Qt resource files; the activities with animals are left out for the demo and the held-out set.
GCOMPRIS_ACTIVITIES = ("categorization", "details", "explore_monuments", "explore_world_music", "lang")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


# ---------------------------------------------------------------- data

def download(work: Path) -> list[Path]:
    """Fetches and unpacks the Debian packages; returns the picture files in a fixed order."""
    for package in PACKAGES:
        if (work / "packages" / package).is_dir():
            continue
        (work / "debs").mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=work / "debs", check=True)
        deb = next((work / "debs").glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", deb, work / "packages" / package], check=True)
        for activity in GCOMPRIS_ACTIVITIES if package == "gcompris-qt-data" else ():
            unpack_webp(next((work / "packages" / package).rglob(f"rcc/{activity}.rcc")))
    pictures = [p for p in (work / "packages").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and p.is_file()
                and not p.is_symlink() and not any(part in str(p) for part in EXCLUDED)]
    return sorted(pictures)


def unpack_webp(resource: Path) -> None:
    """Writes every WebP picture inside a Qt resource file beside it; Qt stores them as they are, and RIFF headers tell the length."""
    blob = resource.read_bytes()
    for match in re.finditer(rb"RIFF(....)WEBP", blob, re.DOTALL):
        end = match.start() + 8 + int.from_bytes(match[1], "little")
        resource.with_name(f"{resource.stem}_{match.start():08d}.webp").write_bytes(blob[match.start():end])


def looks_drawn(crop: np.ndarray) -> bool:
    """Whether a uint8 crop (H, W, 3) is a diagram, a gradient or empty: too many equal neighbours, or too little difference between them."""
    steps = np.abs(np.diff(crop.astype(np.int16), axis=1))
    return (steps == 0).all(-1).mean() > 0.35 or steps.mean() < 2.5


def crops_of(job: tuple[Path, int]) -> list[np.ndarray]:
    """Square crops of one picture at all scales from SIZE to its full side, as uint8 (SIZE, SIZE, 3)."""
    path, seed = job
    random = np.random.default_rng(seed)
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        image.load()
    except OSError:
        return []
    image = image.convert("RGBA")
    if np.asarray(image.getchannel("A")).mean() < 250:
        return stamps_of(image, random)
    image = image.convert("RGB")
    side = min(image.size)
    if side < 0.85 * SIZE:
        return []
    count = int(np.clip(math.prod(image.size) / SIZE**2, 8, 60))
    crops = []
    for _ in range(count):
        s = min(side, int(round(math.exp(random.uniform(math.log(min(SIZE, side)), math.log(side))))))
        x, y = random.integers(0, image.width - s + 1), random.integers(0, image.height - s + 1)
        crop = np.asarray(image.resize((SIZE, SIZE), Image.LANCZOS, box=(x, y, x + s, y + s), reducing_gap=3))
        if not looks_drawn(crop):
            crops.append(crop)
    return crops


def stamps_of(image: Image.Image, random: np.random.Generator) -> list[np.ndarray]:
    """A photograph cut out on transparency, pasted twice on a soft two-colour gradient."""
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 120:
        return []
    image = image.crop(box)
    if looks_drawn(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS))):
        return []
    crops = []
    for _ in range(2):
        scale = SIZE * random.uniform(0.7, 1.0) / max(image.size)
        stamp = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
        ramp = np.linspace(0, 1, SIZE)[:, None, None]
        top, bottom = random.uniform(40, 235, (2, 3))
        ground = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (SIZE, SIZE, 3)) + random.normal(0, random.uniform(0, 6), (SIZE, SIZE, 3))
        canvas = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        canvas.paste(stamp, tuple(int(random.integers(0, SIZE - side + 1)) for side in stamp.size), stamp)
        crops.append(np.asarray(canvas))
    return crops


def prepare_data(work: Path) -> None:
    """Writes crops.npy, uint8 (M, SIZE, SIZE, 3), in random order; the last 4 % of the files are kept apart in holdout.npy."""
    if (work / "crops.npy").exists():
        return
    pictures = download(work)
    np.random.default_rng(0).shuffle(pictures)
    with Pool() as pool:
        per_file = list(tqdm(pool.imap(crops_of, [(p, i) for i, p in enumerate(pictures)], chunksize=4), total=len(pictures), desc="crops"))
    per_file = [crops for crops in per_file if crops]
    split = int(len(per_file) * 0.96)
    train = np.stack([crop for crops in per_file[:split] for crop in crops])
    np.random.default_rng(1).shuffle(train)
    np.save(work / "holdout.npy", np.stack([crop for crops in per_file[split:] for crop in crops[:3]]))
    np.save(work / "crops.npy", train)
    print(f"{len(train)} crops of {split} files for training, {len(per_file) - split} files held out")


@torch.no_grad()
def draw_neighbours(work: Path, device: torch.device, count: int = 3) -> None:
    """Writes neighbours.png: beside each demo and held-out photograph the training crops most like it, to see that none shows the same scene.

    Likeness is the cosine of the classifier's pooled features, centred on the crops' mean.
    """
    classifier, features = load_classifier("efficientnet_lite0").to(device), []
    classifier.network._fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].cpu()))

    def features_of(pictures: np.ndarray) -> torch.Tensor:
        features.clear()
        for start in tqdm(range(0, len(pictures), 64), desc="features"):
            classifier(torch.from_numpy(pictures[start:start + 64]).to(device).permute(0, 3, 1, 2).float() / 255)
        return torch.cat(features)

    crops = np.load(work / "crops.npy")
    photographs = np.stack([read_image(path, SIZE) for folder in ("images", "heldout") for path in sorted((DEMO / folder).iterdir())])
    known, asked = features_of(crops), features_of(photographs)
    known, asked = (F.normalize(f - known.mean(0)) for f in (known, asked))
    nearest = (asked @ known.T).topk(count).indices
    write_image(image_grid([[photograph, *crops[indices]] for photograph, indices in zip(photographs, nearest.numpy())]), work / "neighbours.png")


# ---------------------------------------------------------------- training loop shared by both networks

class Clock:
    """Minutes of training done so far, over several runs; gives the learning rate and says when to stop and to save."""

    def __init__(self, minutes: float, done_seconds: float = 0.0):
        self.total, self.done, self.last = minutes * 60, done_seconds, None
        self.saved = done_seconds

    def tick(self) -> bool:
        now = time.monotonic()
        if self.last is not None:
            self.done += min(now - self.last, 10)  # a pause, as of a laptop that sleeps, is no training
        self.last = now
        return self.done < self.total

    def learning_rate(self, peak: float, step: int, warmup: int = 200) -> float:
        return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done / self.total)))

    def time_to_save(self) -> bool:
        if self.done - self.saved < 60:
            return False
        self.saved = self.done
        return True


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


# ---------------------------------------------------------------- autoencoder

FACTOR, WIDTHS = 4, (16, 32, 64)
LATENT_CHANNELS = 16
LATENT_LOGVAR = -7.0                            # of the posterior, so that `latent_dist.sample()` adds noise of exp(-3.5) = 0.03:
LATENT_NOISE = math.exp(LATENT_LOGVAR / 2)      # nearly deterministic latents, of deviation one
DECODER_NOISE = 0.12                            # up to this deviation: what a UNet hands to the decoder is never quite a latent of the encoder


def build_autoencoder() -> AutoencoderKL:
    """Factor 4, 16 latent channels, 0.67 M parameters."""
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=1,
                        sample_size=SIZE, mid_block_add_attention=False)
    zero_last_convolutions(vae)
    return vae


def zero_last_convolutions(network: torch.nn.Module) -> None:
    """Every residual block starts as the identity, so that training begins with the linear path."""
    for module in network.modules():
        if type(module).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)


def principal_components(crops: np.ndarray, sample: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """The first principal components of patches of 4 x 4 pixels: kernel (latent channels, 48, 1, 1) and bias, for latents of deviation one.

    The kernel is orthogonal, so that noise of a given size in the latent is noise of one size in the picture, whatever its direction. An
    encoder that is trained instead spreads its variance over fine detail, and most of what the UNet then has to tell from noise looks like
    noise: at t = 201 the best linear filter left 0.42 of the noise's power there, and leaves 0.20 here.
    """
    patches = F.pixel_unshuffle(as_input(torch.from_numpy(np.array(crops[:sample]))), FACTOR).movedim(1, 0).flatten(1)  # (48, many)
    mean = patches.mean(1, keepdim=True)
    _, directions = torch.linalg.eigh((patches - mean) @ (patches - mean).T)
    kernel = directions.flip(1)[:, :LATENT_CHANNELS].T
    kernel = kernel / (kernel @ (patches - mean)).std()
    return kernel[..., None, None].contiguous(), -(kernel @ mean).squeeze(1)


class LinearAutoencoder(torch.nn.Module):
    """The autoencoder's own convolutions, without its residual branches, normalisation and activations.

    The encoder is the principal components, exactly; the decoder is trained, and passes 28 dB in one minute, where the whole autoencoder,
    started from scratch, was at 21 dB after fifteen. Before each output convolution it has (width - 2) / 2 channels, because `transplant` writes each twice.
    """

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        a, b, c = WIDTHS
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(3, a, 3, padding=1), torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.Conv2d(a, a, 3, stride=2), torch.nn.Conv2d(a, b, 1),
            torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.Conv2d(b, b, 3, stride=2), torch.nn.Conv2d(b, c // 2 - 1, 1),
            torch.nn.Conv2d(c // 2 - 1, LATENT_CHANNELS, 3, padding=1))
        self.decoder = torch.nn.Sequential(
            torch.nn.Conv2d(LATENT_CHANNELS, c, 3, padding=1), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(c, c, 3, padding=1),
            torch.nn.Conv2d(c, b, 1), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(b, b, 3, padding=1),
            torch.nn.Conv2d(b, a // 2 - 1, 1), torch.nn.Conv2d(a // 2 - 1, 3, 3, padding=1))
        for parameter in self.parameters():
            torch.nn.init.orthogonal_(parameter) if parameter.dim() == 4 else torch.nn.init.zeros_(parameter)
        self.set_encoder(kernel, bias)

    @torch.no_grad()
    def set_encoder(self, kernel: torch.Tensor, bias: torch.Tensor) -> None:
        """Two convolutions of stride 2 gather the 2 x 2 and then the 4 x 4 pixels of a patch as channels; the second one projects."""
        colours, first, pass_first, second, pass_second, out = (layer for layer in self.encoder if isinstance(layer, torch.nn.Conv2d))
        for layer in (colours, first, pass_first, second, pass_second, out):
            layer.requires_grad_(False).weight.zero_()
        for colour, y, x in itertools.product(range(3), range(2), range(2)):
            colours.weight[colour, colour, 1, 1] = 1
            gathered = 4 * colour + 2 * y + x
            first.weight[gathered, colour, y, x] = 1
            pass_first.weight[gathered, gathered] = 1
            for row, column in itertools.product(range(2), range(2)):
                second.weight[:LATENT_CHANNELS, gathered, row, column] = kernel[:, 16 * colour + 4 * (2 * row + y) + 2 * column + x, 0, 0]
        second.bias[:LATENT_CHANNELS] = bias
        for channel in range(LATENT_CHANNELS):
            pass_second.weight[channel, channel] = 1
            out.weight[channel, channel, 1, 1] = 1


@torch.no_grad()
def transplant(linear: LinearAutoencoder, vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Makes the autoencoder compute what the linear one does, on images like x.

    What stands between its last block and its output convolution is SiLU(GroupNorm(.)). Given v and -v, the activation is undone by
    silu(v) - silu(-v) = v; and a pair of constant channels makes the normalisation's deviation almost a constant. The larger they are the
    better that holds, and the more they drown the rest in training; so they are large in the encoder, which is not trained.
    """
    def copy_convolution(target: torch.nn.Conv2d, source: torch.nn.Conv2d) -> None:
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)

    def bypass(shortcut: torch.nn.Conv2d, norm: torch.nn.GroupNorm, out: torch.nn.Conv2d, source: torch.nn.Conv2d, source_out: torch.nn.Conv2d,
               v: torch.Tensor, ratio: float) -> None:
        width, power = 2 * v.shape[1] + 2, v.square().sum(1).mean()
        constant = ratio * power.sqrt()
        zero = torch.zeros_like(source.weight[:2])
        shortcut.weight.copy_(torch.cat([source.weight, -source.weight, zero]))
        shortcut.bias.copy_(torch.cat([source.bias, -source.bias, torch.stack([constant, -constant])]))
        norm.weight.fill_((2 * (constant.square() + power) / width).sqrt().item())
        out.weight.zero_()
        out.weight[: len(source_out.weight)] = torch.cat([source_out.weight, -source_out.weight, torch.zeros_like(source_out.weight[:, :2])], 1)
        out.bias.zero_()
        out.bias[: len(source_out.bias)] = source_out.bias

    encoder, decoder = vae.encoder, vae.decoder
    copy_convolution(encoder.conv_in, linear.encoder[0])
    copy_convolution(encoder.down_blocks[0].downsamplers[0].conv, linear.encoder[2])
    copy_convolution(encoder.down_blocks[1].resnets[0].conv_shortcut, linear.encoder[3])
    copy_convolution(encoder.down_blocks[1].downsamplers[0].conv, linear.encoder[5])
    bypass(encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out, *linear.encoder[6:], linear.encoder[:7](x), ratio=30)
    copy_convolution(decoder.conv_in, linear.decoder[0])
    copy_convolution(decoder.up_blocks[0].upsamplers[0].conv, linear.decoder[2])
    copy_convolution(decoder.up_blocks[1].resnets[0].conv_shortcut, linear.decoder[3])
    copy_convolution(decoder.up_blocks[1].upsamplers[0].conv, linear.decoder[5])
    bypass(decoder.up_blocks[2].resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, *linear.decoder[6:], linear.decoder[:7](linear.encoder(x)), ratio=3)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        convolution.weight.copy_(torch.eye(len(convolution.weight))[:, :, None, None])
        convolution.bias.zero_()
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = LATENT_LOGVAR


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit (B, H, W, 3) to (B, 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, 1).float() / 127.5 - 1


def random_crops(crops: np.ndarray, chosen: np.ndarray, side: int, random: np.random.Generator, device: torch.device) -> torch.Tensor:
    """Random windows of the chosen crops, half of them mirrored: (B, 3, side, side) in [-1, 1]."""
    x = np.empty((len(chosen), side, side, 3), np.uint8)
    for k, i in enumerate(chosen):
        top, left = random.integers(0, SIZE - side + 1, 2)
        x[k] = crops[i, top:top + side, left:left + side][:, :: 1 if random.random() < 0.5 else -1]
    return as_input(torch.from_numpy(x).to(device))


@torch.no_grad()
def holdout_psnr(autoencoder: Callable, holdout: np.ndarray, device: torch.device, count: int = 24) -> float:
    """Mean PSNR in dB over the first `count` held-out crops."""
    x = as_input(torch.from_numpy(holdout[:count]).to(device))
    errors = [(autoencoder(part).clamp(-1, 1) - part).square().mean((1, 2, 3)) for part in x.split(8)]
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


class Encoder:
    """What the autoencoder's encoder computes, without the detour through its network: latents (B, 16, H / 4, W / 4) of deviation one.

    It is kept in encoder.pt: were it computed anew from other crops, decoder and UNet would have to be trained anew.
    """

    def __init__(self, work: Path, crops: np.ndarray, device: torch.device):
        if not (work / "encoder.pt").exists():
            save_atomically(dict(zip(("kernel", "bias"), principal_components(crops))), work / "encoder.pt")
        state = torch.load(work / "encoder.pt", map_location=device, weights_only=True)
        self.kernel, self.bias = state["kernel"], state["bias"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pixel_unshuffle(x, FACTOR), self.kernel, self.bias)


def train_autoencoder(work: Path, minutes: float, device: torch.device, linear_minutes: float = 4) -> None:
    """The encoder is given; of the decoder first the linear one and then, started from it, the whole."""
    torch.manual_seed(0)
    crops, holdout = np.load(work / "crops.npy", mmap_mode="r"), np.load(work / "holdout.npy")
    encode, vae = Encoder(work, crops, device), build_autoencoder().to(device)
    if not (work / "autoencoder.pt").exists():
        linear = LinearAutoencoder(encode.kernel.cpu(), encode.bias.cpu()).to(device)
        fit(linear, encode, linear.decoder, crops, holdout, work / "linear.pt", linear_minutes, device, batch=16, side=64, peak=3e-3)
        random = np.random.default_rng(0)
        transplant(linear, vae, random_crops(crops, random.integers(0, len(crops), 64), 96, random, device))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    fit(vae, encode, lambda z: vae.decoder(vae.post_quant_conv(z)), crops, holdout, work / "autoencoder.pt", minutes, device, batch=4, side=96, peak=5e-4, compiled=True)


def fit(network: torch.nn.Module, encode: Callable, decode: Callable, crops: np.ndarray, holdout: np.ndarray, path: Path, minutes: float,
        device: torch.device, batch: int, side: int, peak: float, compiled: bool = False) -> None:
    """Trains a decoder for so many minutes in all, resuming from `path`.

    The loss is the log of each crop's squared error, which is its PSNR: dark and smooth pictures count as much as busy ones.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    step, clock = 0, Clock(minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], Clock(minutes, state["seconds"])
    random = np.random.default_rng(step + 1)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        z = encode(x)
        noise = DECODER_NOISE * torch.rand(len(z), 1, 1, 1, device=device) * torch.randn_like(z)
        return ((decode(z + noise) - x).square().mean((1, 2, 3)) + 3e-4).log().mean()

    if compiled:  # 2.8 times as fast on two CPU cores, where small channels leave the network bound by memory
        loss_of = torch.compile(loss_of)

    def save() -> None:
        save_atomically({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": clock.done}, path)

    def report() -> None:
        with open(path.with_suffix(".log"), "a") as log:
            print(f"step {step} {clock.done / 60:.1f} min held-out PSNR {holdout_psnr(lambda x: decode(encode(x)), holdout, device):.2f} dB", file=log)

    report()
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.learning_rate(peak, step)
        loss = loss_of(random_crops(crops, random.integers(0, len(crops), batch), side, random, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if clock.time_to_save():
            save()
            report()
    save()
    report()


# ---------------------------------------------------------------- captions and text

def build_tokenizer(work: Path) -> CLIPTokenizer:
    """A CLIP-style byte-pair tokenizer whose vocabulary is learned from the class names."""
    folder = work / "tokenizer"
    if not folder.exists():
        bpe = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        bpe.decoder = decoders.BPEDecoder(suffix="</w>")
        bpe.train_from_iterator(IMAGENET_CLASSES, trainers.BpeTrainer(
            vocab_size=2700, special_tokens=[BOS, EOS], end_of_word_suffix="</w>",
            initial_alphabet=[chr(c) for c in range(33, 127)]))
        learned = json.loads(bpe.to_str())["model"]
        vocab = dict(learned["vocab"])
        for c in map(chr, range(33, 127)):  # CLIP's tokenizer needs every character with and without the end-of-word mark
            vocab.setdefault(c, len(vocab)), vocab.setdefault(c + "</w>", len(vocab))
        folder.mkdir(parents=True)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS, model_max_length=24)


@torch.no_grad()
def caption_crops(work: Path, device: torch.device) -> None:
    """Writes captions.npy: the class that EfficientNet-Lite0 gives a crop where it is surer than 0.2, else -1 (the empty prompt)."""
    if (work / "captions.npy").exists():
        return
    classifier = load_classifier("efficientnet_lite0").to(device)
    crops = np.load(work / "crops.npy", mmap_mode="r")
    labels = []
    for start in tqdm(range(0, len(crops), 64), desc="captions"):
        x = torch.from_numpy(crops[start:start + 64].copy()).to(device).permute(0, 3, 1, 2).float() / 255
        confidence, label = classifier(x).softmax(1).max(1)
        labels.append(torch.where(confidence > 0.2, label, -1).cpu().numpy())
    labels = np.concatenate(labels)
    np.save(work / "captions.npy", labels)
    print(f"{(labels >= 0).sum()} of {len(labels)} crops captioned, {len(np.unique(labels)) - 1} classes")


# ---------------------------------------------------------------- UNet and text encoder

def build_unet() -> UNet2DConditionModel:
    """Attention grids of 28, 14 and 7 at 224 pixels, as Stable Diffusion's; 11 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128, 192), layers_per_block=1, attention_head_dim=(2, 2, 4, 6),
        cross_attention_dim=128, norm_num_groups=8, use_linear_projection=True)
    zero_last_convolutions(unet)
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's: scaled linear, 0.00085 to 0.012, 1000 steps, epsilon prediction."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def train_unet(work: Path, minutes: float, device: torch.device, batch: int = 4, peak: float = 4e-4, ema_decay: float = 0.999) -> None:
    """Learns the noise in the latents; 80 % of the samples at t < 300, because the attack lives at t <= 250."""
    torch.manual_seed(0)
    tokenizer, scheduler = build_tokenizer(work), noise_schedule()
    caption_crops(work, device)
    crops, labels = np.load(work / "crops.npy", mmap_mode="r"), np.load(work / "captions.npy")
    encode = Encoder(work, crops, device)
    held_out = encode(as_input(torch.from_numpy(np.load(work / "holdout.npy")[:24]).to(device)))
    prompts = tokenizer([*IMAGENET_CLASSES, ""], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids.to(device)

    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).to(device).train()
    average = copy.deepcopy(networks).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    path, step, clock = work / "unet.pt", 0, Clock(minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        networks.load_state_dict(state["networks"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], Clock(minutes, state["seconds"])
    random = np.random.default_rng(step + 1)
    torch.manual_seed(step + 1)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def save() -> None:
        save_atomically({"networks": networks.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                         "step": step, "seconds": clock.done}, path)

    while clock.tick():
        chosen = random.integers(0, len(crops), batch)
        z = encode(random_crops(crops, chosen, SIZE, random, device))
        z = z + LATENT_NOISE * torch.randn_like(z)  # the attack encodes with a sample, not with the mean
        t = torch.where(torch.rand(batch) < 0.8, torch.randint(0, 300, (batch,)), torch.randint(0, 1000, (batch,))).to(device)
        caption = labels[chosen]
        caption = np.where((caption < 0) | (random.random(batch) < 0.15), len(IMAGENET_CLASSES), caption)
        noise = torch.randn_like(z)
        for group in optimizer.param_groups:
            group["lr"] = clock.learning_rate(peak, step)
        text = networks["text_encoder"](prompts[caption])[0]
        loss = F.mse_loss(networks["unet"](add_noise(z, noise, t, alphas_cumprod), t, text).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 5 == 0:
            decay = min(ema_decay, step / (step + 50)) ** 5
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in networks.parameters()], 1 - decay)
        if clock.time_to_save():
            save()
        if step % 250 == 0:
            errors = {t: noise_error(average, held_out, prompts[-1:], t, alphas_cumprod) for t in (51, 201, 401)}
            with open(work / "unet.log", "a") as log:
                print(f"step {step} {clock.done / 60:.1f} min held-out noise error " + ", ".join(f"{error:.3f} at t = {t}" for t, error in errors.items()), file=log)
    save()


def add_noise(z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise


@torch.no_grad()
def noise_error(networks: torch.nn.ModuleDict, z: torch.Tensor, prompt: torch.Tensor, t: int, alphas_cumprod: torch.Tensor) -> float:
    """Mean squared error of the predicted noise, which is also its share of the noise's power (1.0)."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(t)).to(z)
    steps = torch.full((len(z),), t, device=z.device)
    text = networks["text_encoder"](prompt)[0].expand(len(z), -1, -1)
    return F.mse_loss(networks["unet"](add_noise(z, noise, steps, alphas_cumprod), steps, text).sample, noise).item()


# ---------------------------------------------------------------- export

def export(work: Path, target: Path) -> None:
    """Writes the pipeline in diffusers format, weights in fp16 safetensors."""
    device = torch.device("cpu")
    tokenizer = build_tokenizer(work)
    state = torch.load(work / "unet.pt", map_location=device, weights_only=True)
    vae = build_autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", map_location=device, weights_only=True)["network"])
    vae.register_to_config(scaling_factor=1.0)
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    networks.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(vae=vae, text_encoder=networks["text_encoder"], tokenizer=tokenizer, unet=networks["unet"],
                                       scheduler=noise_schedule(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    print(f"wrote {target.name}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**20:.1f} MiB, "
          f"{state['step']} UNet steps in {state['seconds'] / 60:.0f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="data,autoencoder,unet,export", help="comma-separated, in this order (default: all)")
    parser.add_argument("--work_dir", type=Path, default=DEMO.parent / "tiny_diffusion_training", help="crops and checkpoints (default: tiny_diffusion_training beside demo)")
    parser.add_argument("--autoencoder_minutes", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--unet_minutes", type=float, default=120, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    work, device = arguments.work_dir, torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    stages = {"data": lambda: prepare_data(work),
              "autoencoder": lambda: train_autoencoder(work, arguments.autoencoder_minutes, device),
              "unet": lambda: train_unet(work, arguments.unet_minutes, device),
              "neighbours": lambda: draw_neighbours(work, device),
              "export": lambda: export(work, DEMO / "tiny_diffusion")}
    for stage in arguments.stages.split(","):
        stages[stage]()


if __name__ == "__main__":
    main()
