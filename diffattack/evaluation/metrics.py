"""How visible a change is: SSIM, PSNR, LPIPS, and measures that follow an eye more closely than SSIM does;
and how real pictures look: Frechet and kernel distance of two sets of pictures, in the features of a network.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from diffattack.classifiers.defences import split_name
from diffattack.classifiers.registry import REGISTRY, load_classifier
from diffattack.data.contrast import change_where_smooth
from diffattack.data.images import to_tensor
from diffattack.evaluation.budget import ssim
from diffattack.evaluation.seeing import named_measures
from diffattack.evaluation.statistics import Estimate, frechet_distance, kernel_distance, means_over_images

INCEPTION = "Inception v3"
SMALLEST_MS_SSIM = (11 - 1) * 2 ** (5 - 1) + 1  # pixels: the window of 11 at the coarsest of 5 scales


@dataclass(frozen=True)
class Quality:
    """One figure of the adversarial images and of the reconstructions, both against the clean images; by
    image where it has one.
    """

    adversarial: Estimate
    reconstructed: Estimate | None = None
    by_image: np.ndarray | None = None  # (B,), of the adversarial images
    note: str | None = None


def visibility(clean: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far an 8-bit picture `(H, W, 3)` is from the clean one.

    SSIM (Wang et al., 2004) and PSNR; of the difference, L1 as the mean over pixels and channels and Linf,
    both in 8-bit levels, and L2 as the Euclidean norm with values in [0, 1]; and `change_where_smooth`, NaN
    for a picture that is smooth nowhere.
    """
    a, b = to_tensor(clean), to_tensor(other)
    difference = (b - a).double()
    return {
        "SSIM": float(ssim(a, b)),
        "PSNR dB": psnr(clean, other),
        "L1 (levels)": 255 * float(difference.abs().mean()),
        "L2": float(difference.norm()),
        "Linf (levels)": 255 * float(difference.abs().max()),
        "where smooth (levels)": float(change_where_smooth(a, b)),
    }


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit images `(H, W, 3)`; infinite when they are equal."""
    return -10 * float((to_tensor(other).double() - to_tensor(clean).double()).square().mean().log10())


def perceptual(clean: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Measures of an 8-bit picture `(H, W, 3)` beside the clean one.

    MS-SSIM (Wang et al., 2003), which is left out where a side is below 161 pixels, as its window does not
    fit into the coarsest of its five scales; FSIMc (Zhang et al., 2011), the form of FSIM that sees colours,
    too; HaarPSI (Reisenhofer et al., 2018): 1 for equal pictures. GMSD (Xue et al., 2014), a deviation, and
    CIEDE2000 (Sharma et al., 2005), the mean over pixels of the difference of colours in CIELAB: 0 for equal
    ones.
    """
    import piq

    a, b = to_tensor(clean), to_tensor(other)
    large = min(clean.shape[:2]) >= SMALLEST_MS_SSIM
    return {
        **({"MS-SSIM": float(piq.multi_scale_ssim(b, a, data_range=1.0))} if large else {}),
        "FSIMc": float(piq.fsim(b, a, data_range=1.0, chromatic=True)),
        # in float32 its logit is off by 2e-6 at 1; black on black it is infinite
        "HaarPSI": float(piq.haarpsi(b.double(), a.double(), data_range=1.0).clamp(max=1)),
        "GMSD": float(piq.gmsd(b, a, data_range=1.0)),
        "CIEDE2000": colour_difference(clean, other),
    }


def colour_difference(clean: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pixels of two 8-bit sRGB pictures `(H, W, 3)` of CIEDE2000."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(deltaE_ciede2000(rgb2lab(clean), rgb2lab(other)).mean())


def is_at_hand(url: str) -> bool:
    """Whether what torch.hub would download from there is in its cache: a run does not download what it was
    not asked for, and does not wait for a network that is not there.
    """
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


@functools.lru_cache(1)
def lpips_network(device: torch.device) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    settings = {"net_type": "alex", "reduction": "none", "normalize": True, "sync_on_compute": False}
    return LearnedPerceptualImagePatchSimilarity(**settings).to(device)


@torch.no_grad()
def lpips(clean: np.ndarray, other: np.ndarray, device: torch.device) -> dict[str, float]:
    """LPIPS (Zhang et al., 2018) with torchvision's AlexNet; none without its weights, of which
    docs/models.md says how to get them.
    """
    from torchvision.models import AlexNet_Weights

    if not is_at_hand(AlexNet_Weights.DEFAULT.url):
        return {}
    pair = (to_tensor(picture).to(device) for picture in (other, clean))
    return {"LPIPS": float(lpips_network(device)(*pair))}


def measures(
    clean: np.ndarray, other: np.ndarray, device: torch.device, seeing: tuple[str, ...] = ()
) -> dict[str, float]:
    """All measures of how far an 8-bit picture `(H, W, 3)` is from the clean one, with these models of
    seeing.
    """
    asked = {name: measure(clean, other) for name, measure in named_measures(seeing).items()}
    return visibility(clean, other) | perceptual(clean, other) | lpips(clean, other, device) | asked


@functools.cache
def names_of_measures(size: int, device: torch.device, seeing: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Of those that can be had here for pictures of so many pixels a side."""
    black = np.zeros((size, size, 3), np.uint8)
    return tuple(measures(black, black, device, seeing))


def means_of(
    sides: Sequence[Mapping[str, np.ndarray]], counted: np.ndarray | None = None, note: str | None = None
) -> dict[str, Quality]:
    """Means by name of figures by image `(B,)`, of the adversarial pictures, and of the reconstructed, if
    any, over the images that are counted, all unless told.
    """
    means = [
        means_over_images({n: v if counted is None else v[counted] for n, v in side.items()})
        for side in sides
    ]
    return {
        name: Quality(*(side[name] for side in means), by_image=values, note=note)
        for name, values in sides[0].items()
    }


# ---------------------------------------------------------------- features


def last_features(classifier: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What goes into a classifier's last linear layer: images `(B, 3, H, W)` in [0, 1] to `(B, d)`."""
    *_, last = (module for module in classifier.modules() if isinstance(module, torch.nn.Linear))
    inputs: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))

    def features(images: torch.Tensor) -> torch.Tensor:
        classifier(images)
        return inputs.pop()

    return features


def feature_network(surrogates: Sequence[str]) -> str:
    """The name of the network whose features are taken: Inception v3 where torch-fidelity and its weights are
    at hand, else an embedded classifier, and no surrogate if there is another.
    """
    with contextlib.suppress(ImportError):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        if is_at_hand(URL_INCEPTION_V3):
            return INCEPTION
    networks = {split_name(name)[0] for name in surrogates}
    return ([name for name in REGISTRY if name not in networks] or list(REGISTRY))[-1]


@functools.lru_cache(1)
def load_feature_network(name: str, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """From images `(B, 3, H, W)` in [0, 1] to features `(B, d)`."""
    if name != INCEPTION:
        return last_features(load_classifier(name).to(device))
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).to(device)
    return lambda images: network((images * 255).round().byte())


@torch.no_grad()
def features_of(name: str, images: np.ndarray, device: torch.device, batch: int = 16) -> torch.Tensor:
    """Features `(B, d)` in float64 of 8-bit pictures `(B, H, W, 3)`, by a network's name."""
    network, starts = load_feature_network(name, device), range(0, len(images), batch)
    return torch.cat([network(to_tensor(images[k : k + batch]).to(device)).double().cpu() for k in starts])


def realism(features: np.ndarray, network: str) -> dict[str, Quality]:
    """Kernel and Frechet distance of the features `(B, sides, d)` of the adversarial pictures, and of the
    reconstructed if any, to those of the clean ones.
    """
    (count, _, dimension), (clean, *sides) = features.shape, np.moveaxis(features, 1, 0)
    names = [f"kernel distance, {network}", f"Frechet distance, {network}"]
    biased = f"biased with {count} images and {dimension} features: not comparable with published figures"
    notes = "can be below 0, since both sets show the same scenes", None if count > dimension else biased
    return {
        name: Quality(*(Estimate(distance(clean, side)) for side in sides), note=note)
        for name, note, distance in zip(
            ["KID", "FID"] if network == INCEPTION else names, notes, (kernel_distance, frechet_distance)
        )
    }


def quality_of(
    names: Sequence[str], visible: np.ndarray, features: np.ndarray, network: str
) -> dict[str, Quality]:
    """All figures of visibility, of the images that were changed, and of realism, of all; each of the attack
    beside that of the reconstruction alone.

    Args:
        visible: measures by these names, `(B, sides - 1, measures)`, of the adversarial pictures, and of the
            reconstructed, if any.
        features: of the clean pictures and of both, `(B, sides, d)`, by this network.
    """
    by_image = [dict(zip(names, side.T)) for side in np.moveaxis(visible, 1, 0)]
    changed = ~np.isinf(by_image[0]["PSNR dB"])  # others say nothing of how visible a change is
    note = None if changed.all() else f"of the {changed.sum()} of {len(changed)} images that were changed"
    quality = means_of(by_image, changed, note)
    return quality | (realism(features, network) if len(features) >= 2 else {})
