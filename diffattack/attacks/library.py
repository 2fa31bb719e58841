"""Attacks by name: `diffattack`, `advad(steps=100)`, `torchattack:DIFGSM(steps=10)`, `FILE.py:FUNCTION`.

    parse_attack("torchattack:DIFGSM(eps=8/255)").arguments      # {"eps": 0.0313...}
    attack = load_attack(parse_attack("torchattack:DIFGSM(steps=20)"), classes=1000)
    attack(images, labels, classifier, radius=0.03)    # (B, 3, H, W) in [0, 1], (B,) -> (B, 3, H, W)

Arguments are read as literals and never evaluated. torchattack (github.com/spencerwooo/torchattack) has the
attacks of the literature, each with its paper in its docstring. Those that need the names of a certain
network's layers, or trained weights of their own, cannot attack any classifier and are refused.
"""

import argparse
import ast
import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffattack.attacks.limited import BehindLimit, CleanPictures
from diffattack.classifiers.checks import shown
from diffattack.classifiers.loading import load_function
from diffattack.common.errors import InputError, one_line
from diffattack.data.layout import shortened
from diffattack.diffusion.composition import Composition

FORMS = (
    "diffattack, advad, torchattack:NAME, torchattack:NAME(eps=8/255,steps=10), FILE.py:FUNCTION or "
    "FILE.py:FUNCTION(ARGUMENTS)"
)
OURS = "diffattack"
ADVAD = Path(__file__).with_name("advad.py")  # loaded as a file of the user's is
NEED_LAYERS = {"feature_layer_cfg", "hook_cfg"}  # parameters that name a network's layers
# which need VGG-16's weights, minutes before each image, and pictures of other images
NEED_MORE = ("SSP", "GeoDA", "Admix", "L2T")
GIVEN = ("model", "normalize", "device", "targeted", "clip_min", "clip_max")  # elsewhere, or always the same
SIDES = {"SSA": 224}  # for which alone an attack of the library is written
RADIUS = "eps"  # the field's name of it
USERS_RADIUS = 8 / 255  # where the search begins for a function of the user's that has no default


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class AttackName:
    """An attack as a command line names it."""

    text: str
    source: str  # diffattack, torchattack, or the path of a file
    function: str = ""  # or the class in torchattack
    arguments: dict[str, object] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """A folder's name of its own that says which it is; where signs are lost, with a digest."""
        if re.fullmatch(r"[\w:]+", self.text):
            return self.text.replace(":", "_")
        text = self.text.replace(self.source, Path(self.source).name, 1)
        name = shortened(re.sub(r"[^\w.+=-]+", "_", text).strip("_"), 80)
        return f"{name}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_attack(text: str) -> AttackName:
    """The attack of that name, of which nothing is loaded yet.

    Raises:
        argparse.ArgumentTypeError: it has none of the FORMS, or an argument is no literal.
    """
    text = text.strip()
    if text == OURS:
        return AttackName(text, OURS)
    whole = re.sub(r"^advad\b(?!\.)", f"{ADVAD}:advad", text)
    match = re.fullmatch(r"(torchattack|.+\.py):([A-Za-z_]\w*)\s*(?:\((.*)\))?", whole, re.DOTALL)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no attack; expected {FORMS}")
    source, function, arguments = match.groups()
    try:
        return AttackName(text, source, function, literals(arguments or ""))
    except Exception:  # the parser has many for nonsense
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: expected arguments by name with literals, as (eps=8/255,steps=10)"
        ) from None


def literals(arguments: str) -> dict[str, object]:
    """Names and values of "eps=8/255,steps=10"; any of several errors where that is not what it is."""
    call = ast.parse(f"attack({arguments}\n)", mode="eval").body
    if call.args:
        raise ValueError("an argument has no name")
    return {keyword.arg: literal(keyword.value) for keyword in call.keywords}


def literal(node: ast.expr) -> object:
    """A literal of Python, or a fraction of two numbers such as 8/255."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return ast.literal_eval(node.left) / ast.literal_eval(node.right)
    return ast.literal_eval(node)


def attack_name(text: str) -> str:
    """What a flag says of one attack, looked at as far as can be without loading it."""
    return parse_attack(text).text


def attack_names(text: str) -> tuple[str, ...]:
    """What a flag lists, separated by commas; none of an empty text."""
    texts = re.split(rf",\s*(?={OURS}\b|advad\b|torchattack:|[^,()]*\.py:)", text) if text.strip() else ()
    names = tuple(map(attack_name, texts))
    if names and not 2 <= len(names) == len(set(names)):
        raise argparse.ArgumentTypeError("expected at least two attacks, none of them twice")
    return names


# ---------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Method:
    """An attack on pixels with its arguments."""

    name: AttackName
    function: Callable[..., torch.Tensor]  # of images, labels, a classifier, a composition, and arguments
    arguments: dict[str, object]
    radius: float | None  # where the search for a budget begins; None where it has none, or was given one
    takes_targets: bool

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
            radius: `eps`, in the attack's own norm; None for its default or what it was given.
            targets: `(B,)`, what the classifier is to see; None for anything but the labels.
            composition: that limits the change at each place.
        """
        given = {name: value for name, value in ((RADIUS, radius), ("targets", targets)) if value is not None}
        return self.function(images.clone(), labels, classifier, composition, **self.arguments | given)


def load_attack(name: AttackName, classes: int, side: int | None = None) -> Method:
    """The attack of that name on pixels.

    Args:
        classes: how many the classifier has.
        side: of the pictures, where it is known.
    Raises:
        InputError: there is no such attack, it cannot attack any classifier, or an argument is none that it
            takes.
    """
    return torch_attack(name, classes, side) if name.source == "torchattack" else users_attack(name)


def torch_attack(name: AttackName, classes: int, side: int | None) -> Method:
    """One of torchattack's."""
    kind, arguments = library_class(name), dict(name.arguments)
    parameters, needed = inspect.signature(kind).parameters, SIDES.get(name.function, side)
    if side != needed:
        raise InputError(
            f"--attack {name.text[:80]} is written for images of {needed} pixels; give --res {needed}"
        )
    takes = {key: one.default for key, one in parameters.items() if key not in GIVEN}
    if not all(key in takes and is_like(value, takes[key]) for key, value in arguments.items()):
        told = ", ".join(f"{key}={default!r}" for key, default in takes.items())
        raise InputError(f"--attack {name.text[:80]}: expected arguments like its defaults, {told}")
    radius = takes.get(RADIUS) if RADIUS not in arguments else None
    if takes.get("num_classes") == 1000:  # of all classes, and not of those that are looked at
        arguments.setdefault("num_classes", max(2, classes))

    def attack(images, labels, classifier, composition, targets=None, **arguments) -> torch.Tensor:
        if targets is not None:
            labels, arguments["targeted"] = targets, True
        made = kind(model=classifier, normalize=None, device=images.device, **arguments)
        if composition is None:
            return made(images, labels).detach()
        clean = CleanPictures.of(composition)
        result = made(clean, labels).detach()
        was_limited = clean.sums and torch.equal(result, clean.sums[-1])
        return result if was_limited else composition(result)

    return Method(name, attack, arguments, radius, "targeted" in parameters)


def users_attack(name: AttackName) -> Method:
    """A function of the user's, `attack(images, labels, classifier)`: images `(1, 3, H, W)` in [0, 1], labels
    `(1,)`, and a classifier from such images to logits; it returns the adversarial images. With a parameter
    `eps` it is searched for a budget; a parameter `targets` gets those of a targeted attack, `(1,)`.
    """
    arguments = dict(name.arguments)
    try:
        function, beside = load_function(name.source, name.function)
        signature = inspect.signature(function)
        searched = {RADIUS: USERS_RADIUS} if RADIUS in signature.parameters else {}
        signature.bind("images", "labels", "classifier", **searched | arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InputError(
            f"--attack {name.text[:80]} cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            f"expected a function of images, labels and classifier, and its arguments"
        ) from None

    def attack(images, labels, classifier, composition, **arguments) -> torch.Tensor:
        if composition is not None:
            classifier = BehindLimit(classifier, composition)
        shape = images.shape
        with beside():
            result = function(images, labels, classifier, **arguments)
        if not isinstance(result, torch.Tensor) or result.shape != shape:
            raise TypeError(f"it returned {shown(result)}; expected {tuple(shape)} in [0, 1]")
        result = result.detach().to(images)
        return result if composition is None else composition(result)

    radius = None
    if searched and RADIUS not in arguments:
        default = signature.parameters[RADIUS].default
        radius = float(default) if isinstance(default, (int, float)) else USERS_RADIUS
    return Method(name, attack, arguments, radius, "targets" in signature.parameters)


def library_class(name: AttackName) -> type:
    import torchattack  # it takes torchvision, which the latent attack does without

    known = {key: kind for key, kind in torchattack.ATTACK_REGISTRY.items() if is_of_any_classifier(kind)}
    if name.function not in known:
        raise InputError(
            f"--attack {name.text[:80]}: {name.function} is no attack of torchattack that can attack any "
            f"classifier; expected one of {', '.join(sorted(known))}"
        )
    return known[name.function]


def is_of_any_classifier(kind: type) -> bool:
    """Whether an attack of torchattack needs neither the names of layers nor trained weights."""
    needs_more = kind.is_category("GENERATIVE") or kind.__name__ in NEED_MORE
    return not needs_more and not NEED_LAYERS & {*inspect.signature(kind).parameters}


def is_like(value: object, default: object) -> bool:
    """Whether an argument is of the kind of its default: any number where that is a fraction or None."""
    is_number = default is None or isinstance(default, float)
    return type(value) is type(default) or (is_number and type(value) in (int, float))
