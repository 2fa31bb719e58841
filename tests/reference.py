"""The attack written a second time, slowly and plainly, straight from the method: the reference for numbers
and for speed.

Nothing is cached, skipped or shared: both branches of the guidance and both runs (unperturbed and perturbed,
in one batch, as in the original tool) are computed in every iteration, inversion goes as far as it can,
images come one at a time, and attention is written out with its own processor.
"""

import numpy as np
import torch
import torch.nn.functional as F

BASE = {
    "uniform": None,
    "increasing": [0.05, 0.08, 0.13, 0.24, 0.50],
    "learned": [0.064, 0.103, 0.158, 0.269, 0.406],
}


class PlainAttention:
    """Attention of the whole batch, head by head; keeps every map it computes in a list."""

    def __init__(self, name, store):
        self.name, self.store = name, store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        width = q.shape[-1] // attn.heads
        heads, maps = [], []
        for h in range(attn.heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / width**0.5
            maps.append(torch.softmax(scores, dim=-1))
            heads.append(torch.einsum("bqk,bkd->bqd", maps[-1], v[..., part]))
        self.store.append((self.name, torch.stack(maps, dim=1)))  # (batch, heads, queries, keys)
        return attn.to_out[1](attn.to_out[0](torch.cat(heads, dim=-1)))


def alpha_bar(scheduler, t):
    return float(scheduler.alphas_cumprod[t]) if t >= 0 else float(scheduler.final_alpha_cumprod)


def predicted_noise(scheduler, x, output, t):
    """From the model's output, which is epsilon or v."""
    a = alpha_bar(scheduler, t)
    return (
        a**0.5 * output + (1 - a) ** 0.5 * x if scheduler.config.prediction_type == "v_prediction" else output
    )


def move(scheduler, x, output, t, start, end):
    """From the noise level of timestep `start` to that of `end`, with what the model said at timestep t."""
    eps = predicted_noise(scheduler, x, output, t)
    x0 = (x - (1 - alpha_bar(scheduler, start)) ** 0.5 * eps) / alpha_bar(scheduler, start) ** 0.5
    return alpha_bar(scheduler, end) ** 0.5 * x0 + (1 - alpha_bar(scheduler, end)) ** 0.5 * eps


def embed(pipeline, prompt):
    tokens = pipeline.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids.to(pipeline.text_encoder.device))[0]


def both_branches(pipeline, latents, t, null, text, guidance):
    u, c = pipeline.unet(
        torch.cat([latents, latents]), torch.tensor(t), torch.cat([null, text])
    ).sample.chunk(2)
    return u + guidance * (c - u)


def encode(pipeline, image):
    with torch.no_grad():
        encoded = pipeline.vae.encode(image * 2 - 1)
    if not hasattr(encoded, "latent_dist"):  # an autoencoder without a posterior
        return pipeline.vae.config.scaling_factor * encoded.latent
    posterior = encoded.latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(8888)).to(
        posterior.mean
    )
    return pipeline.vae.config.scaling_factor * (posterior.mean + torch.exp(posterior.logvar / 2) * noise)


def invert(pipeline, scheduler, latents, null):
    """z_0, z_1, ... z_T."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    trajectory = [latents]
    for t in sorted(scheduler.timesteps.tolist()):
        with torch.no_grad():
            output = pipeline.unet(trajectory[-1], torch.tensor(t), null).sample
        trajectory.append(move(scheduler, trajectory[-1], output, t, t - stride, t))
    return trajectory


def invert_as_diffattack(pipeline, scheduler, latents, null):
    """The original's: z_0 is taken for the latent at the last timestep, and each step goes one further."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    trajectory = [latents]
    for t in sorted(scheduler.timesteps.tolist())[:-1]:
        with torch.no_grad():
            output = pipeline.unet(trajectory[-1], torch.tensor(t), null).sample
        trajectory.append(move(scheduler, trajectory[-1], output, t, t, t + stride))
    return trajectory


class Minimax:
    """Weights that grow with their losses, by products of numbers."""

    def __init__(self, n, step=0.1, pull=1.0):
        self.weights, self.step, self.pull = [1 / n] * n, step, pull

    def move(self, relative):
        power = 1 / (1 + self.step * self.pull)
        grown = [(w * np.exp(self.step * loss)) ** power for w, loss in zip(self.weights, relative)]
        self.weights = [w / sum(grown) for w in grown]


class Uncertainty:
    """Weights exp(-s), normalised, with s moved by descent on exp(-s) L + s."""

    def __init__(self, n, step=0.1):
        self.s, self.step = [0.0] * n, step

    @property
    def weights(self):
        return [np.exp(-s) / sum(np.exp(-np.array(self.s))) for s in self.s]

    def move(self, relative):
        gradients = [1 - np.exp(-s) * loss for s, loss in zip(self.s, relative)]
        self.s = [s - self.step * min(1, max(-1, g)) for s, g in zip(self.s, gradients)]


def null_text(pipeline, scheduler, trajectory, timesteps, text, null, guidance):
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    n = len(timesteps)
    latents, embedding = trajectory[n], null.clone().requires_grad_()
    optimizer = torch.optim.AdamW([embedding], lr=0.1)
    result = []
    for i, t in enumerate(timesteps):
        for _ in range(10 + 2 * i):
            optimizer.zero_grad()
            landed = move(
                scheduler,
                latents,
                both_branches(pipeline, latents, t, embedding, text, guidance),
                t,
                t,
                t - stride,
            )
            F.mse_loss(landed, trajectory[n - 1 - i]).backward()
            optimizer.step()
        result.append(embedding.detach().clone())
        with torch.no_grad():
            latents = move(
                scheduler,
                latents,
                both_branches(pipeline, latents, t, embedding, text, guidance),
                t,
                t,
                t - stride,
            )
    return result


def weights_of(schedule, n):
    """A schedule of five weights at n timesteps, by linear interpolation, normalised."""
    positions = [i / (n - 1) * 4 for i in range(n)]
    weights = [
        schedule[int(p)] + (p - int(p)) * (schedule[min(int(p) + 1, 4)] - schedule[int(p)]) for p in positions
    ]
    return [w / sum(weights) for w in weights]


def run_both(pipeline, scheduler, timesteps, unperturbed, perturbed, nulls, text, guidance, store):
    """Both latents through all timesteps and the decoder.

    Returns the images (2, 3, H, W), the unperturbed one first, and by timestep the maps of the conditional
    half, (2, heads, queries, keys) each.
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    latents, maps = torch.cat([unperturbed, perturbed]), []
    for null, t in zip(nulls, timesteps):
        store.clear()
        output = both_branches(
            pipeline, latents, t, torch.cat([null, null]), torch.cat([text, text]), guidance
        )
        latents = move(scheduler, latents, output, t, t, t - stride)
        maps.append([(name, m[2:]) for name, m in store])
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1), maps


def optimise(
    pipeline,
    scheduler,
    classifier,
    start,
    label,
    own_tokens,
    text,
    nulls,
    timesteps,
    grid,
    weights=None,
    iterations=30,
    guidance=2.5,
    attack_weight=10.0,
    cross_weight=10000.0,
    self_weight=100.0,
    visited=None,
    learning=None,
    adaptive=None,
    share=None,
):
    """The latent attack from `start`; returns the latent and the loss of every iteration by term, in total,
    and by timestep.

    With an optimiser as `learning`, `weights` is the network that it trains on the same loss; `adaptive` is
    Minimax or Uncertainty; `share` is what the structure term's gradient is to be of the attack's.
    """
    n, store = len(timesteps), []
    processors = pipeline.unet.attn_processors
    pipeline.unet.set_attn_processor({name: PlainAttention(name, store) for name in processors})
    latents = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([latents], lr=0.01)
    history = []
    if share is not None:
        self_weight = 0.0
    for iteration in range(1, iterations + 1):
        if visited is not None:
            visited.append(latents.detach().clone())
        images, maps = run_both(pipeline, scheduler, timesteps, start, latents, nulls, text, guidance, store)
        ce = F.cross_entropy(classifier(images[1:]), torch.tensor([label], device=images.device))
        by_timestep = [
            sum(F.mse_loss(m[1], m[0].detach()) for name, m in step if "attn1" in name) for step in maps
        ]
        if adaptive is not None:
            weights = adaptive.weights
        current = weights if learning is None else weights()
        structure = (
            sum(by_timestep) if weights is None else sum(n * w * li for w, li in zip(current, by_timestep))
        )
        cross = torch.stack(
            [
                m[1].mean(0)
                for step in maps
                for name, m in step
                if "attn2" in name and not name.startswith("mid") and m.shape[2] == grid**2
            ]
        ).mean(0)
        variance = cross[:, own_tokens].var()
        if share is not None and iteration in (2, 3, 5, 8, 13, 21, iterations):
            (of_attack,) = torch.autograd.grad(attack_weight * ce, latents, retain_graph=True)
            (of_structure,) = torch.autograd.grad(structure, latents, retain_graph=True)
            self_weight = share * (of_attack.norm() / of_structure.norm()).item()
        total = -attack_weight * ce + self_weight * structure + cross_weight * variance
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if learning is not None:
            learning.step()
            learning.zero_grad()
        history.append([v.item() for v in (ce, structure, variance, total, *by_timestep)])
        if adaptive is not None:
            values = history[-1][4:]
            adaptive.move([v * n / sum(values) if sum(values) else 1.0 for v in values])
    pipeline.unet.set_attn_processor(processors)
    return latents.detach(), np.array(history)


def denoise(pipeline, scheduler, timesteps, start, latents, nulls, text, guidance):
    """The image (1, 3, H, W) of the optimised latent."""
    with torch.no_grad():
        images, _ = run_both(pipeline, scheduler, timesteps, start, latents, nulls, text, guidance, [])
    return images[1:]


def attack(
    pipeline,
    scheduler,
    classifier,
    image,
    label,
    caption,
    weights=None,
    start_step=15,
    guidance=2.5,
    visited=None,
    inversion=None,
    **options,
):
    """Attacks one image (1, 3, H, W); returns the adversarial image and the losses of every iteration, as
    `optimise` does.

    `weights` are N numbers that sum to 1, or None for the original DiffAttack. A list given as `visited`
    receives the null embeddings and then the latent of each iteration.
    """
    timesteps = scheduler.timesteps[start_step:].tolist()
    text, null = embed(pipeline, caption), embed(pipeline, "")
    own_tokens = slice(1, len(pipeline.tokenizer(caption).input_ids) - 1)
    trajectory = (inversion or invert)(pipeline, scheduler, encode(pipeline, image), null)
    nulls = null_text(pipeline, scheduler, trajectory, timesteps, text, null, guidance)
    if visited is not None:
        visited.append(nulls)
    start = trajectory[len(timesteps)]
    latents, history = optimise(
        pipeline,
        scheduler,
        classifier,
        start,
        label,
        own_tokens,
        text,
        nulls,
        timesteps,
        image.shape[-1] // 32,
        weights,
        guidance=guidance,
        visited=visited,
        **options,
    )
    return denoise(pipeline, scheduler, timesteps, start, latents, nulls, text, guidance), history
