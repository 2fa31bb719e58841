"""How a dataclass declares flags, and what is made of them: a parser and a table.

@dataclass
class Options:
    title = "machine"                                            # of a group of flags
    device: str = flag("auto", "cuda, mps or cpu", "DEVICE")     # --device DEVICE

options = parse_options(Options, "What the program does.", ["--device", "cpu"])
"""

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from functools import partial
from typing import Any, NamedTuple

from diffattack.common.errors import InputError


class Range(NamedTuple):
    """The values that a flag takes, and how a message names them."""

    holds: Callable[[Any], bool]
    name: str


COUNT = Range(lambda number: number >= 1, "at least 1")
NOT_NEGATIVE = Range(lambda number: math.isfinite(number) and number >= 0, "a finite number, not below 0")
POSITIVE = Range(lambda number: math.isfinite(number) and number > 0, "a finite number above 0")
SHARE = Range(lambda number: 0 < number < 1, "a number above 0 and below 1")
SIGMA = Range(lambda number: 0 <= number <= 16, "a number of pixels, 0 to 16")
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
        default, help, metavar: as argparse takes them.
        parse: makes the value of text; by default the type of `default`, or str.
        choices, range: what values it takes.
        identifies_run: whether a run can go on with the same value alone, because what an image's files hold
            depends on it.
    """
    if choices:
        names = list(map(str, choices))
        metavar, range = f"{{{','.join(names)}}}", Range(choices.__contains__, f"one of {', '.join(names)}")
    if default is False:
        metavar, parse = "BOOL", boolean
    parse = parse or (str if default is None else type(default))
    metadata = {"help": help, "metavar": metavar, "parse": parse, "range": range}
    return field(default=default, metadata=metadata | {"identifies_run": identifies_run})


count = partial(flag, None, parse=int, range=COUNT)
number = partial(flag, None, parse=float, range=NOT_NEGATIVE)


# what makes values of text raises ValueError, which argparse says with the function's name


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text.lower() in ("true", "yes", "1")


def names(text: str) -> tuple[str, ...]:
    """Those with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def iteration_numbers(text: str) -> tuple[int, ...]:
    """Numbers of iterations from 1, each once, in their order; none of an empty text."""
    numbers = {int(number) for number in names(text)}
    if min(numbers, default=1) < 1:
        raise ValueError
    return tuple(sorted(numbers))


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


def as_text(value: Any) -> Any:
    """A default as one would type it."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def parse_options(kind: type, description: str, argv: Sequence[str] | None = None, **defaults: Any) -> Any:
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
    arguments = sys.argv[1:] if argv is None else list(argv)
    has_all = arguments[:2] in (["--help", "all"], ["-h", "all"])
    parser = ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("-h", "--help", action="help", help="these flags; --help all: all of them")
    for title, flags in groups(kind):
        group = parser.add_argument_group(title)
        for declared in flags:
            metadata, settings = declared.metadata, {"default": as_text(declared.default)}
            if declared.default is False:
                settings |= {"nargs": "?", "const": True}
            is_shown = has_all or declared.name in kind.common
            settings["help"] = metadata["help"] if is_shown else argparse.SUPPRESS
            group.add_argument(
                f"--{declared.name}", type=metadata["parse"], metavar=metadata["metavar"], **settings
            )
    parser.set_defaults(**defaults)
    chosen = parser.parse_known_args(arguments)[0]
    for name, presets in kind.presets.items():
        parser.set_defaults(**presets.get(getattr(chosen, name), {}))
    options = kind(**vars(parser.parse_args(arguments)))
    check_values(options)
    options.fill_in_defaults()
    options.verify()
    return options


def check_values(options: Any) -> None:
    """Raises InputError for a value that its declaration does not allow."""
    for declared in fields(options):
        value, allowed = getattr(options, declared.name), declared.metadata["range"]
        if value is not None and allowed and not allowed.holds(value):
            raise InputError(f"--{declared.name} is {value!r}; expected {allowed.name}")


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
