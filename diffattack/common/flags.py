"""How a dataclass declares flags, and what is made of them: a parser and a table.

@dataclass
class Options:
    title = "machine"                                            # of a group of flags
    device: str = flag("auto", "cuda, mps or cpu", "DEVICE")     # --device DEVICE

options = parse_options(Options, "What the program does.", ["--device", "cpu"])
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from diffattack.common.errors import InputError


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes, and how a message names them."""

    holds: Callable[[float], bool]
    name: str


COUNT = Range(lambda number: number >= 1, "at least 1")
NOT_NEGATIVE = Range(lambda number: math.isfinite(number) and number >= 0, "a finite number, not below 0")
POSITIVE = Range(lambda number: math.isfinite(number) and number > 0, "a finite number above 0")
SHARE = Range(lambda number: 0 < number < 1, "a number above 0 and below 1")
SIDE = Range(lambda number: number % 32 == 0 and number >= 96, "a multiple of 32, at least 96, such as 224")


def flag(
    default: Any,
    help: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    *,
    choices: Sequence | None = None,
    range: Range | None = None,
    identifies_run: bool = True,
) -> Any:
    """A dataclass field that is a flag; one whose default is False needs no value.

    Args:
        default, help, metavar, choices: as argparse takes them.
        parse: makes the value of text; by default the type of `default`.
        range: what numbers it takes.
        identifies_run: whether a run can go on with the same value alone, because what an image's files hold
            depends on it.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "metavar": metavar,
            "parse": parse or type(default),
            "choices": choices,
            "range": range,
            "identifies_run": identifies_run,
        },
    )


def count(help: str, metavar: str, identifies_run: bool = True) -> Any:
    """A flag that takes a whole number, at least 1, None by default."""
    return flag(None, help, metavar, parse=int, range=COUNT, identifies_run=identifies_run)


def number(help: str, metavar: str, range: Range = NOT_NEGATIVE) -> Any:
    """A flag that takes a number, None by default."""
    return flag(None, help, metavar, float, range=range)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def number_or_none(text: str) -> float | None:
    """A number, or none of it where a default has one."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, not {text!r}") from None


def iteration_numbers(text: str) -> tuple[int, ...]:
    """Numbers of iterations from 1, each once, in their order; none of an empty text."""
    try:
        numbers = tuple(sorted({int(number) for number in text.split(",") if text}))
    except ValueError:
        numbers = (0,)
    if numbers and numbers[0] < 1:
        raise argparse.ArgumentTypeError(
            f"expected numbers of iterations from 1, separated by commas, not {text!r}"
        )
    return numbers


# ---------------------------------------------------------------- the parser and the table


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (python {self.prog} --help all lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def groups(kind: type) -> list[tuple[str, list[Field]]]:
    """The titles of the groups of flags, and the flags of each, in the order of their declaration."""
    declared = {declared.name: declared for declared in fields(kind)}
    return [
        (group.title, [declared[name] for name in inspect.get_annotations(group)])
        for group in reversed(kind.__mro__)
        if "title" in vars(group)
    ]


def as_text(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


AnyOptions = TypeVar("AnyOptions")


def parse_options(
    kind: type[AnyOptions], description: str, argv: Sequence[str] | None = None, **defaults: Any
) -> AnyOptions:
    """The options of a command line, each value of them verified.

    Args:
        kind: Options, or a dataclass that adds flags to it; it can `fill_in_defaults` and `verify`. Its
            `presets` are, by a flag's name and value, defaults of other flags; its `common` flags are those
            that `--help` lists, of which `--help all` has all.
        description: what `--help` begins with.
        argv: without the program's name; None for the process's own.
        defaults: other than those declared.
    Raises:
        InputError: a flag is unknown, or a value is none that it takes.
    """
    for name, presets in kind.presets.items():
        chooser = ArgumentParser(add_help=False, allow_abbrev=False)
        chooser.add_argument(f"--{name}")
        chosen = getattr(chooser.parse_known_args(argv)[0], name)
        defaults |= presets.get(chosen, {})
    arguments = sys.argv[1:] if argv is None else list(argv)
    has_all = arguments[:2] in (["--help", "all"], ["-h", "all"])
    parser = ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("-h", "--help", action="help", help="these flags; --help all: all of them")
    for title, flags in groups(kind):
        group = parser.add_argument_group(title)
        for declared in flags:
            settings = {key: declared.metadata[key] for key in ("help", "metavar", "choices")}
            if not has_all and declared.name not in kind.common:
                settings["help"] = argparse.SUPPRESS
            default = defaults.get(declared.name, declared.default)
            if declared.default is False:
                settings |= {
                    "type": boolean,
                    "nargs": "?",
                    "const": True,
                    "metavar": "BOOL",
                    "default": False,
                }
            else:
                settings |= {
                    "type": declared.metadata["parse"],
                    "default": as_text(default) if isinstance(default, (tuple, float)) else default,
                }
            group.add_argument(f"--{declared.name}", **settings)
    options = kind(**vars(parser.parse_args(argv)))
    options.fill_in_defaults()
    options.verify()
    return options


def check_values(options: Any) -> None:
    """Raises InputError for a value that its declaration does not allow."""
    for declared in fields(options):
        value, allowed = getattr(options, declared.name), declared.metadata["range"]
        if value is not None and allowed and not allowed.holds(value):
            raise InputError(f"--{declared.name} is {value}; expected {allowed.name}")
        choices = declared.metadata["choices"]
        if value is not None and choices and value not in choices:
            raise InputError(
                f"--{declared.name} is {value!r}; expected one of {', '.join(map(str, choices))}"
            )


def flag_table(kind: type) -> str:
    """The flags as a table in Markdown."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for title, flags in groups(kind):
        lines.append(f"| **{title}** | | |")
        for declared in flags:
            default = "" if declared.default in (None, False) else f"`{as_text(declared.default)}`"
            text = declared.metadata["help"].replace("|", r"\|")
            lines.append(f"| `--{declared.name}` | {default} | {text} |")
    return "\n".join(lines)
