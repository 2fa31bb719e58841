"""How visible a change is (SSIM, PSNR, LPIPS, and what perceptual.py has), and how real pictures
look (Fréchet and kernel distance).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.common.progress import progress
from diffattack.data.contrast import change_where_smooth
from diffattack.data.images import to_tensor
from diffattack.evaluation.frechet import distance_to, frechet_distance, read_reference
from diffattack.evaluation.kernel import KernelDistance, blocks_of
from diffattack.evaluation.perceptual import perceptual, perceptual_is_at_hand
from diffattack.evaluation.stats import Estimate, mean_over_images, means_over_images

INCEPTION = "Inception v3"
INFINITE = ("PSNR dB",)  # of pictures that are equal


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


def lpips_is_at_hand() -> bool:
    """Whether torchvision's AlexNet is here with its weights, which LPIPS needs."""
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError:
        return False
    return is_at_hand(AlexNet_Weights.DEFAULT.url)


@functools.lru_cache(1)
def lpips_network(device: torch.device) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    measure = LearnedPerceptualImagePatchSimilarity(
        net_type="alex", reduction="none", normalize=True, sync_on_compute=False
    )
    return measure.to(device)


def lpips(clean: np.ndarray, other: np.ndarray, device: torch.device) -> np.ndarray:
    """LPIPS (Zhang et al., 2018) with AlexNet by image, `(B,)`; torchmetrics takes the network from
    torchvision.

    Raises:
        FileNotFoundError: torchvision or its weights are not there.
    """
    if not lpips_is_at_hand():
        raise FileNotFoundError("AlexNet's weights are not in torch.hub's cache")
    measure = lpips_network(device)
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


@dataclass(frozen=True)
class FeatureNetwork:
    """What pictures' features are taken from, by its name; loaded when it is first needed."""

    name: str

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    @functools.cached_property
    def network(self) -> torch.nn.Module:
        """From images in [0, 1] to features."""
        if not self.is_inception:
            return ClassifierFeatures(load_classifier(self.name))
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        return torch.nn.Sequential(ToBytes(), network)

    def loaded(self, device: torch.device) -> torch.nn.Module:
        return self.network.to(device)

    @property
    def dimension(self) -> int:
        return 2048 if self.is_inception else self.network.num_features


def feature_network(surrogates: Sequence[str]) -> FeatureNetwork:
    """Inception v3 where torch-fidelity and its weights are at hand, else an embedded classifier, and no
    surrogate if there is another.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError:
        URL_INCEPTION_V3 = None
    if URL_INCEPTION_V3 is None or not is_at_hand(URL_INCEPTION_V3):
        networks = {split_name(name)[0] for name in surrogates}
        return FeatureNetwork(([name for name in REGISTRY if name not in networks] or list(REGISTRY))[-1])
    return FeatureNetwork(INCEPTION)


def check_reference(path: Path | None, surrogates: Sequence[str]) -> None:
    """Raises InputError where `--fid_reference` cannot be used with these surrogates."""
    if path is not None:
        network = feature_network(surrogates)
        read_reference(path, network.name, network.dimension)


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


def measures_at_hand() -> frozenset[str]:
    """The groups of measures of visibility that can be had here, each by one measure that it always has."""
    found = {"SSIM"}
    if perceptual_is_at_hand():
        found.add("GMSD")
    if lpips_is_at_hand():
        found.add("LPIPS")
    return frozenset(found)


def measures(clean: np.ndarray, other: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """All measures of how far 8-bit pictures `(B, H, W, 3)` are from the clean ones, by image `(B,)`."""
    found = visibility(clean, other)
    at_hand = measures_at_hand()
    if "GMSD" in at_hand:
        found |= perceptual(clean, other)
    if "LPIPS" in at_hand:  # else its row is absent, and docs/usage.md says how to get its weights
        found["LPIPS"] = lpips(clean, other, device)
    return found


def quality_of(
    by_image: Sequence[Mapping[str, np.ndarray]],
    features: Sequence[torch.Tensor],
    network: FeatureNetwork,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """All figures of visibility and realism; each of the attack beside that of the reconstruction alone.

    Args:
        by_image: measures by name, `(B,)`, of the adversarial pictures, and of the reconstructed, if any.
        features: of the clean pictures and of both, `(B, d)`.
    """
    summed = [means_of(figures) for figures in by_image]
    absent = [None] * (2 - len(by_image))
    quality = {
        name: Quality(*[means[name] for means in summed], *absent, by_image=values)
        for name, values in by_image[0].items()
    }
    if len(features[0]) >= 2:
        quality |= realism(features[0], features[1:], network, fid_reference)
    return quality


def means_of(figures: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Means over images by name; those with a value for all of them are resampled together, and NaN is left
    out.
    """
    whole = {name: values for name, values in figures.items() if not np.isnan(values).any()}
    means = dict(zip(whole, means_over_images(np.stack(list(whole.values()))) if whole else ()))
    return {
        name: means[name] if name in means else mean_over_images(values[~np.isnan(values)])
        for name, values in figures.items()
    }


def realism(
    clean: torch.Tensor,
    sides: Sequence[torch.Tensor],
    network: FeatureNetwork,
    fid_reference: Path | None = None,
) -> dict[str, Quality]:
    """Kernel and Frechet distance of the features `(B, d)` of one or two sets of pictures to those of the
    clean ones, and Frechet distance to the statistics in a file.
    """
    count, dimension = clean.shape
    bias = (
        None
        if count > dimension
        else f"biased with {count} images and {dimension} features: not comparable with published figures"
    )
    absent, named = [None] * (2 - len(sides)), "" if network.is_inception else f", {network.name}"
    with progress(total=blocks_of(count, len(sides)), desc="kernel distance", unit="block") as bar:
        of_clean = KernelDistance(clean, bar.update)
        kernel = [of_clean.to(other) for other in sides]
    with progress(total=len(sides) * (1 + (fid_reference is not None)), desc="Frechet distance") as bar:
        frechet = []
        for other in sides:
            frechet.append(Estimate(frechet_distance(clean, other), math.nan, math.nan))
            bar.update()
        distances = {
            f"kernel distance{named}" if named else "KID": Quality(
                *kernel,
                *absent,
                note="can be below 0, since both sets show the same scenes",
                features=(clean, sides[0]),
            ),
            f"Frechet distance{named}" if named else "FID": Quality(*frechet, *absent, note=bias),
        }
        if fid_reference is not None:
            reference = read_reference(fid_reference, network.name, dimension)
            of_clean, *to_file = (
                Estimate(distance_to(reference, features), math.nan, math.nan) for features in (clean, *sides)
            )
            title = f"{'Frechet distance' if named else 'FID'} to {fid_reference.name}{named}"
            note = "; ".join(filter(None, [f"{of_clean} for the clean images", bias]))
            distances[title] = Quality(*to_file, *absent, note=note)
    return distances
