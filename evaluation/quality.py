"""How visible a change is (SSIM, PSNR, LPIPS, and what `evaluation.perceptual` has), and how real pictures
look (Fréchet and kernel distance).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from classifiers.defences import split_name
from classifiers.registry import REGISTRY, load_classifier
from common.errors import note, one_line
from data.contrast import change_where_smooth
from data.images import Pictures, to_tensor
from evaluation.frechet import distance_to, read_reference
from evaluation.perceptual import perceptual
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


def is_at_hand(url: str) -> bool:
    """Whether what torch.hub would download from there is in its cache: a run does not download what it was
    not asked for, and does not wait for a network that is not there.
    """
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


def lpips(clean: np.ndarray, other: np.ndarray, device: torch.device) -> np.ndarray:
    """LPIPS (Zhang et al., 2018) with AlexNet by image, `(B,)`; torchmetrics takes the network from
    torchvision.

    Raises:
        ImportError, OSError: torchvision or its weights are not there.
    """
    from torchvision.models import AlexNet_Weights

    if not is_at_hand(AlexNet_Weights.DEFAULT.url):
        raise FileNotFoundError("AlexNet's weights are not in torch.hub's cache")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    measure = LearnedPerceptualImagePatchSimilarity(
        net_type="alex", reduction="none", normalize=True, sync_on_compute=False
    ).to(device)
    pairs = ([to_tensor(side[k]).to(device) for side in (other, clean)] for k in range(len(clean)))
    with torch.no_grad():
        return np.array([float(measure(*pair)) for pair in pairs])


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
    """Inception v3 where torch-fidelity and its weights are at hand, else an embedded classifier, and no
    surrogate if there is another: name, network on images in [0, 1], dimension.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError:
        URL_INCEPTION_V3 = None
    if URL_INCEPTION_V3 is None or not is_at_hand(URL_INCEPTION_V3):
        networks = {split_name(name)[0] for name in surrogates}
        name = ([name for name in REGISTRY if name not in networks] or list(REGISTRY))[-1]
        network = ClassifierFeatures(load_classifier(name))
        return name, network, network.num_features
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    return "Inception v3", torch.nn.Sequential(ToBytes(), network), 2048


def check_reference(path: Path | None, surrogates: Sequence[str]) -> None:
    """Raises InputError where `--fid_reference` cannot be used with these surrogates."""
    if path is not None:
        name, _, dimension = feature_network(surrogates)
        read_reference(path, name, dimension)


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
    pictures: Pictures,
    surrogates: Sequence[str],
    device: torch.device,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """All figures of visibility and realism; each of the attack beside that of the reconstruction alone."""
    sides = [pictures.adversarial] + ([] if pictures.reconstructed is None else [pictures.reconstructed])
    by_image = [visibility(pictures.clean, side) for side in sides]
    try:
        for figures, side in zip(by_image, sides):
            figures |= perceptual(pictures.clean, side)
    except ImportError as error:
        note(f"without piq there are no MS-SSIM, FSIMc, HaarPSI, GMSD and CIEDE2000: {one_line(error)}")
    try:
        for figures, side in zip(by_image, sides):
            figures["LPIPS"] = lpips(pictures.clean, side, device)
    except (ImportError, OSError):
        pass  # its row is absent, and docs/usage.md says how to get its weights
    quality = {
        name: Quality(
            *[mean_over_images(figures[name][~np.isnan(figures[name])]) for figures in by_image],
            *[None] * (2 - len(sides)),
            by_image=by_image[0][name],
        )
        for name in by_image[0]
    }
    if len(pictures.clean) >= 2:
        quality |= realism(pictures.clean, sides, surrogates, device, fid_reference)
    return quality


def realism(
    clean: np.ndarray,
    sides: Sequence[np.ndarray],
    surrogates: Sequence[str],
    device: torch.device,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """Kernel and Frechet distance of one or two sets of pictures to the clean ones, and Frechet distance to
    the statistics in a file.
    """
    name, network, dimension = feature_network(surrogates)
    inception = name == "Inception v3"
    real, *others = (features_of(network.to(device), images, device) for images in (clean, *sides))
    bias = (
        None
        if len(clean) > dimension
        else f"biased with {len(clean)} images and {dimension} features: not comparable with published "
        f"figures"
    )
    absent = [None] * (2 - len(sides))
    kernel = [kernel_distance(real, other) for other in others]
    frechet = [Estimate(frechet_distance(real, other), math.nan, math.nan) for other in others]
    distances = {
        "KID" if inception else f"kernel distance, {name}": Quality(
            *kernel,
            *absent,
            note="can be below 0, since both sets show the same scenes",
            features=(real, others[0]),
        ),
        "FID" if inception else f"Frechet distance, {name}": Quality(*frechet, *absent, note=bias),
    }
    if fid_reference is not None:
        reference = read_reference(fid_reference, name, dimension)
        of_clean, *to_file = (
            Estimate(distance_to(reference, features), math.nan, math.nan) for features in (real, *others)
        )
        file = fid_reference.name
        distances[f"FID to {file}" if inception else f"Frechet distance to {file}, {name}"] = Quality(
            *to_file, *absent, note="; ".join(filter(None, [f"{of_clean} for the clean images", bias]))
        )
    return distances
