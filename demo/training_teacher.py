"""Stage `teacher` of demo/train_tiny_diffusion.py: what a classifier sees in each crop, from which attention
is taught.

An hour of learning to denoise pictures that are hardly noisy teaches a UNet nothing about where to look: its
attention stays uniform. So it
is shown: which places of a picture look alike to a classifier (its features, for self-attention) and which of
them speak for a class (its class activation map, Zhou et al., 2016, for cross-attention).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from training_common import save_array

from diffattack.classifiers.registry import load_classifier

TEACHER = "efficientnet_lite2"
FEATURES = {28: 6, 14: 14, 7: 20}  # the last block of the teacher on each grid
CLASSES = 5  # a crop is captioned with one of so many, drawn by the teacher's own probabilities
SURE = 0.15  # below this probability of its first class a crop has no caption


@torch.no_grad()
def observe(work: Path, device: torch.device) -> None:
    """Writes features_28.npy, features_14.npy, features_7.npy `(M, H, W, channels)`, classes.npy and
    probabilities.npy `(M, CLASSES)`, and class_maps.npy `(M, CLASSES, 7, 7)`, which is at most 1 and 0 where
    a place speaks against the class."""
    if (work / "class_maps.npy").exists():
        return
    teacher = load_classifier(TEACHER).to(device).eval()
    network, seen = teacher.network, {}
    for grid, block in FEATURES.items():
        network._blocks[block].register_forward_hook(
            lambda module, inputs, output, grid=grid: seen.__setitem__(grid, output)
        )
    network._bn1.register_forward_hook(
        lambda module, inputs, output: seen.__setitem__("head", network._swish(output))
    )
    crops, results = np.load(work / "crops.npy", mmap_mode="r"), {}
    for start in tqdm(range(0, len(crops), 32), desc=f"what {TEACHER} sees"):
        x = torch.from_numpy(crops[start : start + 32].copy()).to(device).permute(0, 3, 1, 2).float() / 255
        logits = network((x - teacher.mean) / teacher.std)  # at 224 pixels, for the UNet's own grids
        probabilities, classes = logits.softmax(1).topk(CLASSES)
        maps = torch.einsum("bchw,bkc->bkhw", seen["head"], network._fc.weight[classes]).relu()
        batch = {
            "classes": classes.int(),
            "probabilities": probabilities,
            "class_maps": (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-6)).half(),
        }
        batch |= {f"features_{grid}": seen[grid].movedim(1, -1).half() for grid in FEATURES}
        for name, array in batch.items():
            results.setdefault(name, []).append(array.cpu().numpy())
    for name in sorted(
        results, key=lambda name: name == "class_maps"
    ):  # whose presence says that all are there
        save_array(work / f"{name}.npy", np.concatenate(results[name]))


def similarity(features: dict[int, torch.Tensor], grid: int) -> torch.Tensor:
    """How alike the places of a picture look, `(B, grid^2, grid^2)` in [-1, 1]: the cosine of the features,
    centred over the picture.

    On the grids of 28 and 14 it is the mean of what features of that grid and the coarser ones say, which
    know more of objects than of texture.
    """
    cosines = []
    for side, values in features.items():
        if side > grid and grid != 4:
            continue
        values = values.movedim(-1, 1).float()
        if grid == 4:
            if side != 7:
                continue
            values = F.adaptive_avg_pool2d(values, 4)
        elif side < grid:
            values = F.interpolate(values, (grid, grid), mode="bilinear")
        values = values.flatten(2)
        values = F.normalize(values - values.mean(2, keepdim=True), dim=1)
        cosines.append(values.transpose(1, 2) @ values)
    return torch.stack(cosines).mean(0)


def self_attention_target(features: dict[int, torch.Tensor], grid: int, temperature: float) -> torch.Tensor:
    """Maps `(B, grid^2, grid^2)` whose rows sum to 1: softmax of the similarity over `temperature`.

    A place is as like itself as the place most like it, no more: otherwise a sharp softmax is nearly the
    identity, which groups nothing.
    """
    logits = similarity(features, grid) / temperature
    diagonal = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = logits.masked_fill(diagonal, -torch.inf)
    return torch.where(diagonal, others.amax(-1, keepdim=True), logits).softmax(-1)


def cross_attention_target(
    class_maps: torch.Tensor, grid: int, floor: float = 0.002, height: float = 0.03
) -> torch.Tensor:
    """Attention `(B, grid^2)` to each token of the class: a little everywhere, and up to 0.03 more where the
    class is seen.

    Stable Diffusion 2 was reported to give 0.003 to 0.046 (most of a row goes to the first token). With much
    more the variance of these maps would be as large a loss as the attack's.
    """
    maps = (
        F.interpolate(class_maps[:, None].float(), (grid, grid), mode="bilinear")
        if grid >= 7
        else F.adaptive_avg_pool2d(class_maps[:, None].float(), grid)
    )
    return floor + height * maps.flatten(1)
