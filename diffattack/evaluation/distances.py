"""How real pictures look: Frechet and kernel distance of two sets of pictures, in the features of a network.
Features are gone through in blocks: they may lie in a file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.data.images import to_tensor
from diffattack.evaluation.metrics import Quality, is_at_hand, means_of
from diffattack.evaluation.statistics import Estimate

INCEPTION = "Inception v3"
ROWS = 1024  # features that are looked at together


# ---------------------------------------------------------------- features


class ClassifierFeatures(torch.nn.Module):
    """What goes into a classifier's last linear layer: images `(B, 3, H, W)` in [0, 1] to `(B, d)`."""

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier, self.features = classifier, None
        last = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, inputs: setattr(self, "features", inputs[0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.classifier(images)
        return self.features


class ToBytes(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 255).round().byte()


def feature_network(surrogates: Sequence[str]) -> str:
    """The name of the network whose features are taken: Inception v3 where torch-fidelity and its weights are
    at hand, else an embedded classifier, and no surrogate if there is another.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError:
        URL_INCEPTION_V3 = None
    if URL_INCEPTION_V3 is not None and is_at_hand(URL_INCEPTION_V3):
        return INCEPTION
    networks = {split_name(name)[0] for name in surrogates}
    return ([name for name in REGISTRY if name not in networks] or list(REGISTRY))[-1]


@functools.lru_cache(1)
def load_feature_network(name: str, device: torch.device) -> torch.nn.Module:
    """From images `(B, 3, H, W)` in [0, 1] to features `(B, d)`."""
    if name != INCEPTION:
        return ClassifierFeatures(load_classifier(name)).to(device)
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    return torch.nn.Sequential(ToBytes(), network).to(device)


@torch.no_grad()
def features_of(name: str, images: np.ndarray, device: torch.device, batch: int = 16) -> torch.Tensor:
    """Features `(B, d)` in float64 of 8-bit pictures `(B, H, W, 3)`, by a network's name."""
    network, starts = load_feature_network(name, device), range(0, len(images), batch)
    return torch.cat([network(to_tensor(images[k : k + batch]).to(device)).double().cpu() for k in starts])


# ---------------------------------------------------------------- distances


def frechet_distance(clean: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features `(B, d)` (Heusel et al., 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if 2 * len(clean) < clean.shape[1]:
        # in the span of all features, where distances are the same, it is far quicker
        clean, other = clean.double(), other.double()
        basis, _ = torch.linalg.qr(torch.cat([clean, other]).T)
        clean, other = clean @ basis, other @ basis
    given = torch.nn.Identity()  # stands where torchmetrics expects a network: features are there already
    given.num_features = clean.shape[1]
    # of several processes only one evaluates, so there is nothing to synchronise with
    metric = FrechetInceptionDistance(given, sync_on_compute=False).set_dtype(torch.float64)
    for features, real in ((clean, True), (other, False)):
        for start in range(0, len(features), ROWS):
            metric.update(features[start : start + ROWS].double(), real=real)
    return float(metric.compute())


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(x . y / d + 1)^3` of features `(A, d)` and `(B, d)`: `(A, B)`."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(clean: torch.Tensor, other: torch.Tensor) -> float:
    """Of two sets of as many features `(B, d)`, B at least 2: the unbiased squared MMD with the cubic kernel
    of KID (Binkowski et al., "Demystifying MMD GANs", ICLR 2018), over all pairs of pictures, where KID is
    usually a mean over random subsets.
    """
    count, distance = len(clean), 0.0
    starts = range(0, count, ROWS)
    for row in tqdm(starts, desc="kernel distance", unit="block", delay=1, leave=False):
        a, b = (features[row : row + ROWS].double() for features in (clean, other))
        for column in starts:
            x, y = (features[column : column + ROWS].double() for features in (clean, other))
            within = kernel(a, x) + kernel(b, y)
            if row == column:  # no picture is paired with itself
                within.fill_diagonal_(0)
            distance += float(within.sum() / (count * (count - 1)) - 2 * kernel(a, y).sum() / count**2)
    return distance


def realism(clean: torch.Tensor, sides: Sequence[torch.Tensor], network: str) -> dict[str, Quality]:
    """Kernel and Frechet distance of the features `(B, d)` of the adversarial pictures, and of the
    reconstructed if any, to those of the clean ones.
    """
    count, dimension = clean.shape
    bias = (
        None
        if count > dimension
        else f"biased with {count} images and {dimension} features: not comparable with published figures"
    )
    of_kernel, of_frechet = f"kernel distance, {network}", f"Frechet distance, {network}"
    if network == INCEPTION:
        of_kernel, of_frechet = "KID", "FID"
    return {
        of_kernel: Quality(
            *(Estimate(kernel_distance(clean, side)) for side in sides),
            note="can be below 0, since both sets show the same scenes",
        ),
        of_frechet: Quality(*(Estimate(frechet_distance(clean, side)) for side in sides), note=bias),
    }


def quality_of(
    by_image: Sequence[Mapping[str, np.ndarray]], features: Sequence[torch.Tensor], network: str
) -> dict[str, Quality]:
    """All figures of visibility, of the images that were changed, and of realism, of all; each of the attack
    beside that of the reconstruction alone.

    Args:
        by_image: measures by name, `(B,)`, of the adversarial pictures, and of the reconstructed, if any.
        features: of the clean pictures and of both, `(B, d)`, by this network.
    """
    changed = ~np.isinf(by_image[0]["PSNR dB"])  # others say nothing of how visible a change is
    note = None if changed.all() else f"of the {changed.sum()} of {len(changed)} images that were changed"
    means = [means_of({n: values[changed] for n, values in figures.items()}) for figures in by_image]
    quality = {
        name: Quality(*(side[name] for side in means), by_image=values, note=note)
        for name, values in by_image[0].items()
    }
    return quality | (realism(features[0], features[1:], network) if len(features[0]) >= 2 else {})
