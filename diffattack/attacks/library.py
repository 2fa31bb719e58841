"""Attacks on pixels: torchattack's, and functions of the user's own.

    attack = load_attack(parse_attack("torchattack:DIFGSM(steps=20)"), classes=1000)
    attack(images, labels, classifier, radius=0.03)         # (B, 3, H, W) in [0, 1], (B,) -> (B, 3, H, W)

torchattack (github.com/spencerwooo/torchattack) has the attacks of the literature, each with its paper in its
docstring. Those that need the names of a certain network's layers, or the weights of a trained generator,
cannot be had of any classifier and are refused.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from diffattack.attacks.limited import CleanPictures
from diffattack.attacks.names import AttackName
from diffattack.classifiers.checks import shown
from diffattack.classifiers.loading import load_function
from diffattack.common.errors import InputError, one_line
from diffattack.diffusion.composition import Composition

NEED_LAYERS = ("feature_layer_cfg", "hook_cfg")  # parameters that name layers
OURS_TO_GIVE = {
    "model": "--model_name",
    "normalize": "the classifier, which has its own",
    "device": "--device",
    "targeted": "--target_label",
    "num_classes": "--model_name",
    "clip_min": "what a picture is, from 0",
    "clip_max": "what a picture is, up to 1",
}
REFUSED = {
    "SSP": "needs the weights of VGG-16, which torchattack would download as pickles",
    "GeoDA": "works out a basis for minutes before each image",
}
# Attacks that mix a picture with others of its batch, and how many others each gets.
MIXES, OTHERS = ("Admix", "L2T"), 3
SIDES = {"L2T": 224, "SSA": 224}  # for which alone an attack of the library is written
RADIUS = "eps"  # the field's name of it
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
USERS_RADIUS = 8 / 255  # where the search begins for a function of the user's that has no default


class TorchAttack:
    """One of torchattack's attacks with its arguments.

    `radius` is where the search for a budget begins; None where the attack has none, or was given one.
    """

    def __init__(self, name: AttackName, classes: int, side: int | None = None):
        kind = library_class(name)
        needed, flag = SIDES.get(name.function, side), f"--attack {name.text}"
        if side != needed:
            raise InputError(f"{flag} is written for images of {needed} pixels; give --res {needed}")
        parameters = inspect.signature(kind).parameters
        check_arguments(name, parameters, f"torchattack:{name.function}")
        self.kind, self.name, self.arguments = kind, name, dict(name.arguments)
        is_free = RADIUS in parameters and RADIUS not in self.arguments
        self.radius = parameters[RADIUS].default if is_free else None
        self.others = OTHERS if name.function in MIXES else 0
        self.takes_targets = "targeted" in parameters
        try:
            kind(model=torch.nn.Identity(), normalize=None, device=torch.device("cpu"), **self.arguments)
        except Exception as error:  # a package that it needs, or arguments that do not go together
            raise InputError(f"{flag} cannot be made ({one_line(error)})") from None
        if counts_all_classes(parameters):
            self.arguments["num_classes"] = max(2, classes)

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        classifier: torch.nn.Module,
        radius: float | None = None,
        targets: torch.Tensor | None = None,
        composition: Composition | None = None,
    ) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1] and labels `(B,)` to adversarial images.

        Args:
            targets: `(B,)`, what the classifier is to see; None for anything but the labels.
            radius: `eps`, in the attack's own norm; None for its default or what it was given.
            composition: that limits the change at each place.
        """
        arguments = self.arguments | ({} if radius is None else {RADIUS: radius})
        if targets is not None:
            labels, arguments["targeted"] = targets, True
        attack = self.kind(model=classifier, normalize=None, device=images.device, **arguments)
        with cuda_means(images.device):
            if composition is None:
                return attack(images.clone(), labels).detach()
            clean = CleanPictures.of(composition)
            result = attack(clean, labels).detach()
        was_limited = clean.sums and torch.equal(result, clean.sums[-1])
        return result if was_limited else composition(result)


class UsersAttack:
    """A function of the user's, `attack(images, labels, classifier)`: images `(1, 3, H, W)` in [0, 1], labels
    `(1,)`, and a classifier from such images to logits; it returns the adversarial images. With a parameter
    `eps` it is searched for a budget; a parameter `targets` gets those of a targeted attack, `(1,)`, or None.
    """

    others = 0

    def __init__(self, name: AttackName):
        self.name, self.arguments = name, dict(name.arguments)
        flag = f"--attack {name.text}"
        try:
            self.function, self.place = load_function(name.source, name.function)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise InputError(f"{flag} cannot be loaded ({type(error).__name__}: {one_line(error)})") from None
        parameters = inspect.signature(self.function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        positional = [key for key, parameter in parameters.items() if parameter.kind in POSITIONAL]
        if len(positional) < 3 and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise InputError(
                f"{flag}: it takes {len(positional)} arguments; expected images, labels and classifier"
            )
        own = {k: p for k, p in parameters.items() if k not in positional[:3]}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            check_arguments(name, own, flag)
        eps = own.get(RADIUS)
        self.radius = None
        if eps is not None and RADIUS not in self.arguments:
            self.radius = float(eps.default) if isinstance(eps.default, (int, float)) else USERS_RADIUS
        self.takes_targets = "targets" in own

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        classifier: torch.nn.Module,
        radius: float | None = None,
        targets: torch.Tensor | None = None,
        composition: Composition | None = None,
    ) -> torch.Tensor:
        """As of TorchAttack; it asks about pictures, and so of a classifier behind the limit."""
        if composition is not None:
            classifier = BehindLimit(classifier, composition)
        arguments = self.arguments | ({} if radius is None else {RADIUS: radius})
        if targets is not None:
            arguments["targets"] = targets
        with self.place.entered():
            result = self.function(images.clone(), labels, classifier, **arguments)
        if not isinstance(result, torch.Tensor) or result.shape != images.shape:
            raise TypeError(f"it returned {shown(result)}; expected {tuple(images.shape)} in [0, 1]")
        result = result.detach().to(images)
        return result if composition is None else composition(result)


class BehindLimit(torch.nn.Module):
    """`classifier(clean + J tanh((x - clean) / J))`. What is done to a picture beside that, such as resizing
    it, comes between the two: `classifier.logits(resized(classifier.picture(x)))`.
    """

    def __init__(self, classifier: torch.nn.Module, picture: Composition):
        super().__init__()
        self.logits, self.picture = classifier, picture

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(self.picture(images))


def load_attack(name: AttackName, classes: int, side: int | None = None) -> TorchAttack | UsersAttack:
    """The attack of that name on pixels.

    Args:
        classes: how many the classifier has.
        side: of the pictures, where it is known.
    Raises:
        InputError: there is no such attack, it cannot be had of any classifier, or an argument is none that
            it takes.
    """
    return TorchAttack(name, classes, side) if name.source == "torchattack" else UsersAttack(name)


def library_class(name: AttackName) -> type:
    try:
        import torchattack
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"--attack {name.text} needs torchattack, which cannot be imported ({one_line(error)}); "
            f"pip install -r requirements.txt"
        ) from None
    registry, function = torchattack.ATTACK_REGISTRY, name.function
    reason = refusal(registry[function]) if function in registry else "is no attack of torchattack"
    if reason:
        known = ", ".join(sorted(key for key in registry if refusal(registry[key]) is None))
        raise InputError(f"--attack {name.text}: {function} {reason}; expected one of {known}")
    return registry[function]


def refusal(kind: type) -> str | None:
    """Why an attack of torchattack cannot be had of any classifier, None if it can."""
    if kind.is_category("GENERATIVE"):
        return "needs the weights of a trained generator, which torchattack would download as pickles"
    if kind.__name__ == "MuMoDIG" and importlib.util.find_spec("kornia") is None:
        return "needs the package kornia"
    if any(parameter in NEED_LAYERS for parameter in inspect.signature(kind).parameters):
        return "needs the names of a certain network's layers"
    return REFUSED.get(kind.__name__)


def check_arguments(name: AttackName, parameters: Mapping[str, inspect.Parameter], what: str) -> None:
    """Raises InputError for an argument that is unknown, ours to give to an attack of the library, or of
    another kind than its default.
    """
    for key, value in name.arguments:
        wrong = f"--attack {name.text[:80]}: {key}"
        is_ours = key in OURS_TO_GIVE and (key != "num_classes" or counts_all_classes(parameters))
        if name.source == "torchattack" and is_ours:
            raise InputError(f"{wrong} comes from {OURS_TO_GIVE[key]}; leave it out")
        if key not in parameters:
            takes = ", ".join(other for other in parameters if other not in OURS_TO_GIVE) or "none"
            raise InputError(f"{wrong} is no argument of {what}, which takes {takes}")
        default = parameters[key].default
        if default is not inspect.Parameter.empty and not is_like(key, value, default):
            raise InputError(f"{wrong} is {value!r}; expected one like its default {default!r}")


def counts_all_classes(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether `num_classes` is that of the classifier, and not that of the classes that are looked at."""
    return "num_classes" in parameters and parameters["num_classes"].default == 1000


def is_like(key: str, value: object, default: object) -> bool:
    """Whether an argument is of the kind of its default."""
    if isinstance(default, bool) or not isinstance(default, (int, float, type(None))):
        return isinstance(value, type(default))
    if default is None and value is None:
        return True
    kinds = int if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return key not in (RADIUS, "steps", "alpha") or 0 < value < float("inf")


def cuda_means(device: torch.device) -> AbstractContextManager:
    """Inside, `tensor.cuda()` goes to the device of the run: some attacks of the library say it whatever the
    device of their pictures is (L2T), and fail where there is no GPU.
    """
    if device.type == "cuda":
        return nullcontext()
    return mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(device))
