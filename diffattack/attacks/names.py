"""Attacks by name: `diffattack`, `torchattack:DIFGSM(eps=0.03,steps=10)`, `FILE.py:FUNCTION`.

    parse_attack("torchattack:DIFGSM(eps=8/255)").arguments      # {"eps": 0.0313...}

Arguments are read as literals and never evaluated.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffattack.data.layout import shortened

FORMS = (
    "diffattack, torchattack:NAME, torchattack:NAME(eps=8/255,steps=10), FILE.py:FUNCTION or "
    "FILE.py:FUNCTION(ARGUMENTS)"
)
OURS = "diffattack"


@dataclass(frozen=True)
class AttackName:
    """An attack as a command line names it."""

    text: str
    source: str  # diffattack, torchattack, or the path of a file
    function: str = ""  # or the class in torchattack
    arguments: tuple[tuple[str, object], ...] = ()

    @property
    def folder(self) -> str:
        """A folder's name of its own that says which it is; where signs are lost, with a digest."""
        source = Path(self.source).name if self.source.endswith(".py") else self.source
        told = f"{source}:{self.text[len(self.source) + 1 :]}" if self.function else source
        name = shortened(re.sub(r"[^\w.+=-]+", "_", told).strip("_"), 80)
        is_plain = re.fullmatch(r"[\w:]+", self.text)
        return name if is_plain else f"{name}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_attack(text: str) -> AttackName:
    """The attack of that name, of which nothing is loaded yet.

    Raises:
        argparse.ArgumentTypeError: it has none of the FORMS, or an argument is no literal.
    """
    text = text.strip()
    if text == OURS:
        return AttackName(text, OURS)
    match = re.fullmatch(r"(torchattack|.+\.py):([A-Za-z_]\w*)\s*(?:\((.*)\))?", text, re.DOTALL)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no attack; expected {FORMS}")
    source, function, arguments = match.groups()
    return AttackName(text, source, function, literals(text, arguments or ""))


def literals(text: str, arguments: str) -> tuple[tuple[str, object], ...]:
    """Names and values of "eps=8/255,steps=10"."""
    try:
        call = ast.parse(f"attack({arguments}\n)", mode="eval").body
        names = [keyword.arg for keyword in call.keywords]
        if not isinstance(call.func, ast.Name) or call.args or len({*names} - {None}) < len(names):
            raise ValueError
        return tuple((keyword.arg, literal(keyword.value)) for keyword in call.keywords)
    # of nonsense, of what is no call, of a null byte, of very deep brackets, of a division by zero
    except (SyntaxError, AttributeError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: expected arguments by name, each once, with literals, as (eps=8/255,steps=10)"
        ) from None


def literal(node: ast.expr) -> object:
    """A literal of Python, or a fraction of two numbers such as 8/255; ValueError for a number that is not
    finite.
    """
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        value = ast.literal_eval(node.left) / ast.literal_eval(node.right)
    else:
        value = ast.literal_eval(node)
    hash(value)  # lists and dictionaries could be changed by whoever gets them
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def attack_name(text: str) -> str:
    """What a flag says of one attack, looked at as far as can be without loading it."""
    return parse_attack(text).text


def attack_names(text: str) -> tuple[str, ...]:
    """What a flag lists, separated by commas; none of an empty text."""
    attacks, part = [], ""
    for piece in text.split(","):
        part = f"{part},{piece}" if part else piece
        with suppress(argparse.ArgumentTypeError):  # it goes on behind the comma
            attacks.append(parse_attack(part))
            part = ""
    if part.strip():
        parse_attack(part)  # which says what is wrong with it
    different = {(one.source, one.function, one.arguments) for one in attacks}
    if attacks and not 2 <= len(attacks) == len(different):
        raise argparse.ArgumentTypeError("expected at least two attacks, none of them twice")
    return tuple(one.text for one in attacks)
