"""How visible a change is (SSIM, PSNR, LPIPS), and how real pictures look (Fréchet and kernel distance)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from classifiers.registry import REGISTRY, load_classifier
from data.contrast import change_where_smooth
from data.images import Pictures, to_tensor
from evaluation.stats import Estimate, jackknife, mean_over_images


@dataclass(frozen=True)
class Quality:
    """One figure of the adversarial images and of the reconstructions, both against the clean images; by
    image where it has one.
    """

    adversarial: Estimate
    reconstructed: Estimate | None
    by_image: np.ndarray | None = None  # (B,), of the adversarial images
    note: str | None = None
    features: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # of the clean and the adversarial images, (B, d), where a distance is between sets
    )


def visibility(clean: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """How far 8-bit pictures `(B, H, W, 3)` are from the clean ones, by image `(B,)`.

    SSIM (Wang et al., 2004) and PSNR; of the difference, L1 as the mean over pixels and channels and Linf,
    both in 8-bit levels, and L2 as the Euclidean norm with values in [0, 1]; and `change_where_smooth`, NaN
    for a picture that is smooth nowhere.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = to_tensor(clean), to_tensor(other)
    difference = (b - a).double().flatten(1)
    return {
        "SSIM": structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
        .numpy()
        .reshape(-1),
        "PSNR dB": peak_signal_noise_ratio(
            b.double(), a.double(), data_range=1.0, reduction="none", dim=(1, 2, 3)
        ).numpy(),
        "L1 (levels)": 255 * torch.linalg.vector_norm(difference, 1, 1).numpy() / difference.shape[1],
        "L2": torch.linalg.vector_norm(difference, 2, 1).numpy(),
        "Linf (levels)": 255 * torch.linalg.vector_norm(difference, math.inf, 1).numpy(),
        "where smooth (levels)": change_where_smooth(a, b).double().numpy(),
    }


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit images `(H, W, 3)`; infinite when they are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(
        peak_signal_noise_ratio(to_tensor(other).double(), to_tensor(clean).double(), data_range=1.0)
    )


def lpips(clean: np.ndarray, other: np.ndarray, device: torch.device) -> np.ndarray:
    """LPIPS (Zhang et al., 2018) with AlexNet by image, `(B,)`; torchmetrics takes the network from
    torchvision, which downloads its weights.

    Raises:
        ImportError, OSError: torchvision or the weights are unavailable.
    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    return np.concatenate(
        [
            learned_perceptual_image_patch_similarity(
                to_tensor(other[k]).to(device),
                to_tensor(clean[k]).to(device),
                net_type="alex",
                reduction="none",
                normalize=True,
            )
            .cpu()
            .numpy()
            .reshape(-1)
            for k in range(len(clean))
        ]
    )


class ClassifierFeatures(torch.nn.Module):
    """What goes into a classifier's last linear layer: images `(B, 3, H, W)` in [0, 1] to `(B,
    num_features)`.
    """

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier, self.features = classifier, None
        last = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, inputs: setattr(self, "features", inputs[0]))
        self.num_features = last.in_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.classifier(images)
        return self.features


def feature_network(surrogates: Sequence[str]) -> tuple[str, torch.nn.Module, int]:
    """Inception v3 where its weights are available, else an embedded classifier, and no surrogate if there is
    another: name, network on images in [0, 1], dimension.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, OSError):
        name = ([name for name in REGISTRY if name not in surrogates] or list(REGISTRY))[-1]
        network = ClassifierFeatures(load_classifier(name))
        return name, network, network.num_features
    return "Inception v3", torch.nn.Sequential(ToBytes(), network), 2048


class ToBytes(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 255).round().byte()


@torch.no_grad()
def features_of(
    network: torch.nn.Module, images: np.ndarray, device: torch.device, batch: int = 16
) -> torch.Tensor:
    """Features `(B, d)` in float64 of 8-bit pictures `(B, H, W, 3)`."""
    return torch.cat(
        [
            network(to_tensor(images[k : k + batch]).to(device)).double().cpu()
            for k in range(0, len(images), batch)
        ]
    )


class Given(torch.nn.Module):
    """Stands where torchmetrics expects a feature network, for features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(clean: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features `(B, d)` (Heusel et al., 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if (
        2 * len(clean) < clean.shape[1]
    ):  # rotated into the span of all features, which changes no distance, it is far quicker
        basis, _ = torch.linalg.qr(torch.cat([clean, other]).T)
        clean, other = clean @ basis, other @ basis
    # of several processes only the first evaluates, so there is nothing to synchronise with
    metric = FrechetInceptionDistance(feature=Given(clean.shape[1]), sync_on_compute=False).set_dtype(
        torch.float64
    )
    metric.update(clean, real=True)
    metric.update(other, real=False)
    return float(metric.compute())


def kernel_distance(clean: torch.Tensor, other: torch.Tensor) -> Estimate:
    """Unbiased squared MMD of two sets of features `(B, d)` with the cubic kernel of KID (Binkowski et al.,
    2018).

    Its interval is the jackknife's over pairs of images; the subsets that KID is usually given with need
    thousands.
    """
    from torchmetrics.image.kid import poly_mmd

    return jackknife(len(clean), lambda kept: float(poly_mmd(clean[kept], other[kept])))


def evaluate_quality(
    pictures: Pictures, surrogates: Sequence[str], device: torch.device
) -> dict[str, Quality]:
    """All figures of visibility and realism; each of the attack beside that of the reconstruction alone."""
    sides = [pictures.adversarial] + ([] if pictures.reconstructed is None else [pictures.reconstructed])
    by_image = [visibility(pictures.clean, side) for side in sides]
    try:
        for figures, side in zip(by_image, sides):
            figures["LPIPS"] = lpips(pictures.clean, side, device)
    except (ImportError, OSError):
        pass  # its row is absent, and README says where its weights come from
    quality = {
        name: Quality(
            *[mean_over_images(figures[name][~np.isnan(figures[name])]) for figures in by_image],
            *[None] * (2 - len(sides)),
            by_image=by_image[0][name],
        )
        for name in by_image[0]
    }
    if len(pictures.clean) >= 2:
        quality |= realism(pictures.clean, sides, surrogates, device)
    return quality


def realism(
    clean: np.ndarray, sides: Sequence[np.ndarray], surrogates: Sequence[str], device: torch.device
) -> dict[str, Quality]:
    """Kernel and Frechet distance of one or two sets of pictures to the clean ones."""
    name, network, dimension = feature_network(surrogates)
    inception = name == "Inception v3"
    real, *others = (features_of(network.to(device), images, device) for images in (clean, *sides))
    note = (
        None
        if len(clean) > dimension
        else f"biased with {len(clean)} images and {dimension} features: not comparable with published "
        f"figures"
    )
    absent = [None] * (2 - len(sides))
    kernel = [kernel_distance(real, other) for other in others]
    frechet = [Estimate(frechet_distance(real, other), math.nan, math.nan) for other in others]
    return {
        "KID" if inception else f"kernel distance, {name}": Quality(
            *kernel,
            *absent,
            note="can be below 0, since both sets show the same scenes",
            features=(real, others[0]),
        ),
        "FID" if inception else f"Frechet distance, {name}": Quality(*frechet, *absent, note=note),
    }
