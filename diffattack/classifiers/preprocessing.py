"""What a classifier does to an image before its network sees it, as torch computes it, differentiably."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from diffattack.common.errors import ClassifierError

# Pillow's numbers, timm's names
MODES = {
    0: "nearest-exact",
    2: "bilinear",
    3: "bicubic",
    "nearest": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}


class Preprocessed(torch.nn.Module):
    """A network with its resizing, cropping and normalisation in front, all of it differentiable.

    Args:
        network: maps normalised images to logits.
        resize: `(height, width)` that images are resized to with antialiasing, or the length of their shorter
            side; None leaves them as they are.
        mean, std: per-channel normalisation `(x - mean) / std` of images in [0, 1], one number or three.
        crop: `(height, width)` that is then cut out of the middle, or None.
        mode: of `torch.nn.functional.interpolate`.
        like_pillow: whether what overshoots [0, 1] along rows is cut off before columns are resized.
        channels_last: whether the network is given this layout on a CPU, where it is quicker. On CUDA it is
            not: there each depthwise convolution of EfficientNet-Lite in it took 0.6 ms on an H100.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        resize: int | tuple[int, int] | None,
        mean: float | tuple[float, ...],
        std: float | tuple[float, ...],
        crop: tuple[int, int] | None = None,
        mode: str = "bicubic",
        like_pillow: bool = False,
        channels_last: bool = False,
    ):
        super().__init__()
        self.like_pillow, self.channels_last = like_pillow, channels_last
        self.network, self.resize, self.crop, self.mode = network, resize, crop, mode
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to logits `(B, classes)`."""
        images = self.preprocess(images)
        if self.channels_last and images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to what the network takes."""
        height, width = images.shape[-2:]
        size = self.resize
        if isinstance(size, int):
            size = (
                (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
            )
        if size is not None and (height, width) != tuple(size):
            # as 8-bit pictures are, in Pillow also between its two passes, of which the first is along rows
            for passed in ((height, size[1]), size) if self.like_pillow else (size,):
                antialias = self.mode != "nearest-exact"
                images = F.interpolate(images, tuple(passed), mode=self.mode, antialias=antialias).clamp(0, 1)
        if self.crop is not None:
            top, left = (round((whole - part) / 2) for whole, part in zip(images.shape[-2:], self.crop))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (images - self.mean) / self.std


# ---------------------------------------------------------------- as other libraries describe it


def from_timm(network: torch.nn.Module, config: dict) -> Preprocessed:
    """A network with the preprocessing of a timm data configuration."""
    height, width = config["input_size"][-2:]
    whole = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    if config["interpolation"] not in MODES or config.get("crop_mode", "center") not in ("center", "squash"):
        raise ClassifierError(
            f"resizing by {config['interpolation']!r} with crop mode {config.get('crop_mode')!r} is not "
            f"known here; give the classifier as a program FILE.pt2"
        )
    resize = whole[0] if height == width and config.get("crop_mode") != "squash" else whole
    return Preprocessed(
        network,
        resize,
        tuple(config["mean"]),
        tuple(config["std"]),
        (height, width),
        MODES[config["interpolation"]],
        like_pillow=True,
    )


def from_processor(network: torch.nn.Module, processor: object, name: str) -> Preprocessed:
    """A network with the preprocessing of an image processor of transformers.

    Raises:
        ClassifierError: the processor does something else to a picture than to resize, crop and normalise it.
    """
    config = processor.to_dict()
    # Lanczos, which torch lacks, is nearest to bicubic
    size, crop, resize, mode = (
        config.get("size") or {},
        None,
        None,
        MODES.get(config.get("resample"), "bicubic"),
    )
    if config.get("do_center_crop"):
        crop = (config["crop_size"]["height"], config["crop_size"]["width"])
    if config.get("do_resize"):
        resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        if "crop_pct" in config and isinstance(resize, int):  # ConvNeXT's: larger inputs are not cropped
            resize, crop = (
                (int(resize / config["crop_pct"]), (resize, resize))
                if resize < 384
                else ((resize, resize), None)
            )
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale") else 255
    mean, std = (
        np.array(config[key], np.float64) if config.get("do_normalize") else default
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    classifier = Preprocessed(
        network,
        resize,
        tuple(np.atleast_1d(mean / scale).tolist()),
        tuple(np.atleast_1d(std / scale).tolist()),
        crop,
        mode,
        like_pillow=True,
    )
    side = resize if resize is not None else (224, 224)
    # of a size that nothing resizes
    pixels = np.random.default_rng(0).integers(
        0, 256, (*((side, side) if isinstance(side, int) else side), 3), np.uint8
    )
    expected = torch.as_tensor(np.asarray(processor(pixels, return_tensors="np")["pixel_values"]))
    found = classifier.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    if expected.shape != found.shape or not torch.allclose(expected, found, atol=1e-3):
        raise ClassifierError(
            f"the image processor of 'hf:{name}' does something that is not known here; export the "
            f"classifier with its preprocessing as a program FILE.pt2"
        )
    return classifier
