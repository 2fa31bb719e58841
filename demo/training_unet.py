"""Stage `unet` of demo/train_tiny_diffusion.py: a UNet and a text encoder that learn the noise in the
latents, and where to look.

Three losses: the error of the predicted noise, and two that show the attention what the teacher sees
(training_teacher.py): the cross-entropy between every head's self-attention and the similarity of the
teacher's features, and the binary cross-entropy between the attention to the tokens of the class, averaged
over heads, and the class activation map.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from training_autoencoder import LATENT_CHANNELS, LATENT_DEVIATION, Encoder
from training_common import SIZE, Clock, as_input, save_atomically
from training_teacher import FEATURES, SURE, cross_attention_target, self_attention_target
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attentionControl import join_heads, split_heads
from diffattack.data.classes import IMAGENET_CLASSES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WIDTHS, HEADS, TEXT_WIDTH = (64, 96, 160, 160), (1, 2, 4, 4), 128
TEMPERATURE = 0.05  # of the self-attention that is taught: the smaller, the sharper
SELF_WEIGHT, CROSS_WEIGHT = 0.05, 1.0  # of the two losses on attention, beside the error of the noise


# ---------------------------------------------------------------- the networks


def build_tokenizer(work: Path) -> CLIPTokenizer:
    """A CLIP-style byte-pair tokenizer whose vocabulary is learned from the class names."""
    folder = work / "tokenizer"
    if not (folder / "merges.txt").exists():
        bpe = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        bpe.decoder = decoders.BPEDecoder(suffix="</w>")
        bpe.train_from_iterator(
            IMAGENET_CLASSES,
            trainers.BpeTrainer(
                vocab_size=2700,
                special_tokens=[BOS, EOS],
                end_of_word_suffix="</w>",
                initial_alphabet=[chr(c) for c in range(33, 127)],
            ),
        )
        learned = json.loads(bpe.to_str())["model"]
        vocab = dict(learned["vocab"])
        for c in map(
            chr, range(33, 127)
        ):  # CLIP's tokenizer needs every character with and without the end-of-word mark
            vocab.setdefault(c, len(vocab)), vocab.setdefault(c + "</w>", len(vocab))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
        (folder / "merges.partial").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        # last, so that its presence says that both are whole
        (folder / "merges.partial").replace(folder / "merges.txt")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=24,
    )


def build_unet() -> UNet2DConditionModel:
    """Attention on the grids of 28 (down), 14 and 7 (down and up) and 4 (middle) at 224 pixels.

    There is none on the grid of 28 on the way up: its two layers took 30 % of the time of the whole UNet.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=HEADS,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    for module in unet.modules():
        if type(module).__name__ == "ResnetBlock2D":  # starts as the identity, or as its shortcut
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
        if isinstance(module, Attention) and not module.is_cross_attention:
            # Queries and keys that start alike look at what is like themselves, which is most of what they
            # will learn.
            torch.nn.init.orthogonal_(module.to_q.weight)
            module.to_q.weight.data *= math.sqrt(0.5)
            module.to_k.weight.data.copy_(module.to_q.weight)
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's, scaled linear with 1000 steps and epsilon prediction, whose betas 0.00085 to 0.012
    are made smaller with the latents' variance, so that late timesteps have its ratio of noise to signal.
    """
    return DDIMScheduler(
        beta_start=0.00085 * LATENT_DEVIATION**2,
        beta_end=0.012 * LATENT_DEVIATION**2,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# ---------------------------------------------------------------- what is taught


class TaughtAttention:
    """Attention that keeps its logits: `logits` maps `(name, is_cross, side)` to `(B, heads, queries,
    keys)`.
    """

    def __init__(self, name: str, logits: dict):
        self.name, self.logits = name, logits

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = split_heads(attn, hidden_states, encoder_hidden_states)
        logits = query * attn.scale @ key.transpose(-1, -2)
        self.logits[self.name, encoder_hidden_states is not None, math.isqrt(logits.shape[2])] = logits
        return join_heads(attn, logits.softmax(-1) @ value)


def self_attention_loss(logits: dict, features: dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean over layers, heads and places of the cross-entropy between the target and the map, less the
    target's own entropy.
    """
    losses, targets = [], {}
    for (_, is_cross, side), values in logits.items():
        if is_cross:
            continue
        if side not in targets:
            target = self_attention_target(features, side, TEMPERATURE)
            targets[side] = target, torch.special.entr(target).sum(-1).mean()
        target, entropy = targets[side]
        losses.append(-(target[:, None] * values.log_softmax(-1)).sum(-1).mean() - entropy)
    return torch.stack(losses).mean()


def cross_attention_loss(logits: dict, class_maps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over layers, places and the tokens of the class, `(B, tokens)`, of the binary cross-entropy, less
    that of a perfect map.
    """
    losses = []
    for (_, is_cross, side), values in logits.items():
        if not is_cross:
            continue
        attention = values.softmax(-1).mean(1)  # (B, queries, tokens)
        target = cross_attention_target(class_maps, side)[:, :, None].expand_as(attention)
        of_class = tokens[:, None, :].expand_as(attention)
        attention, target = attention[of_class].clamp(1e-6, 1 - 1e-6), target[of_class]
        losses.append(F.binary_cross_entropy(attention, target) - F.binary_cross_entropy(target, target))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- training


@dataclass
class Batch:
    """Random crops, half of them mirrored, with what the teacher sees in them."""

    images: torch.Tensor  # (B, 3, SIZE, SIZE) in [-1, 1]
    features: dict[int, torch.Tensor]  # by grid, (B, grid, grid, channels)
    captions: torch.Tensor  # (B,), a class, or -1 for none
    class_maps: torch.Tensor  # (B, 7, 7) of that class


class Crops:
    """The training crops and what the stage `teacher` wrote of them."""

    def __init__(self, work: Path):
        self.pixels = np.load(work / "crops.npy", mmap_mode="r")
        self.features = {grid: np.load(work / f"features_{grid}.npy", mmap_mode="r") for grid in FEATURES}
        self.classes, self.probabilities, self.class_maps = (
            np.load(work / f"{name}.npy") for name in ("classes", "probabilities", "class_maps")
        )

    def draw(self, batch: int, random: np.random.Generator, device: torch.device) -> Batch:
        chosen = random.integers(0, len(self.pixels), batch)
        mirrored = random.random(batch) < 0.5
        probabilities = self.probabilities[chosen].astype(np.float64)
        pick = [random.choice(len(p), p=p / p.sum()) for p in probabilities]

        def turned(rows: np.ndarray) -> torch.Tensor:
            """The chosen rows `(B, H, W, ...)`, those of mirrored crops mirrored."""
            mirrored_rows = [row[:, ::-1] if m else row for row, m in zip(rows, mirrored)]
            return torch.from_numpy(np.stack(mirrored_rows)).to(device)

        return Batch(
            as_input(turned(self.pixels[chosen])),
            {grid: turned(features[chosen]) for grid, features in self.features.items()},
            torch.from_numpy(np.where(probabilities[:, 0] < SURE, -1, self.classes[chosen, pick])),
            turned(self.class_maps[chosen, pick]),
        )


class Training:
    """The networks, their running average and the optimiser, as unet.pt keeps them between runs."""

    def __init__(self, work: Path, minutes: float, device: torch.device, peak: float):
        torch.manual_seed(0)
        self.path, self.device, self.peak = work / "unet.pt", device, peak
        self.step, self.clock = 0, Clock(minutes)
        tokenizer = build_tokenizer(work)
        self.prompts = tokenizer(
            [*IMAGENET_CLASSES, ""],  # the last for a crop without a caption
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).to(device)
        networks = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
        self.networks = torch.nn.ModuleDict(networks).to(device).train()
        self.average = copy.deepcopy(self.networks).requires_grad_(False).eval()
        self.logits: dict = {}  # of the attention of the latest batch
        self.networks["unet"].set_attn_processor(
            {name: TaughtAttention(name, self.logits) for name in self.networks["unet"].attn_processors}
        )
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        self.alphas_cumprod = noise_schedule().alphas_cumprod.to(device)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            for name in ("networks", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.clock = state["step"], Clock(minutes, state["seconds"])

    def save(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("networks", "average", "optimizer")}
        save_atomically(state | {"step": self.step, "seconds": self.clock.done}, self.path)

    def losses(self, batch: Batch, z: torch.Tensor) -> torch.Tensor:
        """`(3,)`: the error of the noise in latents `z`, and of self- and cross-attention."""
        count, device = len(z), self.device
        captioned = (batch.captions >= 0) & (torch.rand(count) > 0.15)
        prompt = torch.where(captioned, batch.captions, len(IMAGENET_CLASSES)).to(device)
        late, any_time = torch.randint(0, 300, (count,)), torch.randint(0, 1000, (count,))
        t = torch.where(torch.rand(count) < 0.8, late, any_time).to(device)
        noise = torch.randn_like(z)
        text = self.networks["text_encoder"](self.prompts.input_ids[prompt])[0]
        noisy = add_noise(z, noise, t, self.alphas_cumprod)
        losses = [
            F.mse_loss(self.networks["unet"](noisy, t, text).sample, noise),
            self_attention_loss(self.logits, batch.features),
            torch.zeros((), device=device),
        ]
        if captioned.any():
            position = torch.arange(self.prompts.input_ids.shape[1], device=device)
            last = self.prompts.attention_mask[prompt][captioned].sum(1, keepdim=True) - 1
            logits = {key: values[captioned] for key, values in self.logits.items()}
            tokens = (position > 0) & (position < last)
            losses[2] = cross_attention_loss(logits, batch.class_maps[captioned], tokens)
        return torch.stack(losses)

    def update(self, loss: torch.Tensor, ema_decay: float = 0.999) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.clock.learning_rate(self.peak, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % 5 == 0:
            decay = min(ema_decay, self.step / (self.step + 50)) ** 5
            parameters = [p.detach() for p in self.networks.parameters()]
            torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - decay)


def train_unet(
    work: Path, minutes: float, device: torch.device, batch: int = 8, peak: float = 8e-4, every: int = 200
) -> None:
    """Trains for so many minutes in all, resuming from unet.pt; unet.log has the held-out figures.

    80 % of the samples are at t < 300, because the attack lives at t <= 250.
    """
    training, crops = Training(work, minutes, device, peak), Crops(work)
    encode = Encoder(work, crops.pixels, device)
    held_out = encode(as_input(torch.from_numpy(np.load(work / "holdout.npy")).to(device)))
    random = np.random.default_rng(training.step + 1)
    torch.manual_seed(training.step + 1)
    weights = torch.tensor([1.0, SELF_WEIGHT, CROSS_WEIGHT], device=device)
    running = torch.zeros(3)
    while training.clock.tick():
        drawn = crops.draw(batch, random, device)
        losses = training.losses(drawn, encode(drawn.images))
        training.update((weights * losses).sum())
        running += losses.detach().cpu() / every
        if training.clock.time_to_save():
            training.save()
        if training.step % every == 0:
            log_figures(work / "unet.log", training, held_out, running)
            running.zero_()
    training.save()


def log_figures(path: Path, training: Training, held_out: torch.Tensor, losses: torch.Tensor) -> None:
    prompt = training.prompts.input_ids[-1:]
    errors = [
        f"{noise_error(training.average, held_out, prompt, t, training.alphas_cumprod):.3f} at t = {t}"
        for t in (51, 201, 401)
    ]
    names = ("noise", "self-attention", "cross-attention")
    trained = [f"{name} {loss:.4f}" for name, loss in zip(names, losses.tolist())]
    with open(path, "a") as log:
        print(
            f"step {training.step} {training.clock.done / 60:.1f} min held-out noise error "
            f"{', '.join(errors)}; training losses {', '.join(trained)}",
            file=log,
        )


def add_noise(
    z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise


@torch.no_grad()
def noise_error(
    networks: torch.nn.ModuleDict, z: torch.Tensor, prompt: torch.Tensor, t: int, alphas_cumprod: torch.Tensor
) -> float:
    """Mean squared error of the predicted noise, which is also its share of the noise's power (1.0)."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(t)).to(z)
    steps = torch.full((len(z),), t, device=z.device)
    text = networks["text_encoder"](prompt)[0].expand(len(z), -1, -1)
    return F.mse_loss(
        networks["unet"](add_noise(z, noise, steps, alphas_cumprod), steps, text).sample, noise
    ).item()
