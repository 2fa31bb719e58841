"""What compare.py compares: its flags, and what `main.py` would be called with for each mode or attack."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from diffattack.attacks.library import OURS, attack_names, parse_attack
from diffattack.common.distributed import this_process
from diffattack.common.errors import InputError
from diffattack.common.flags import flag
from diffattack.evaluation.comparison import Sweep, parse_sweep
from diffattack.evaluation.human_study import KEY, read_study
from diffattack.options import DEFAULTS, FOR_ALL, AttackOptions, Options, flags_of_ours
from diffattack.runner.folder import counted, figures_of
from diffattack.runner.setup import Experiment
from timestep_weights import SCHEDULES, STUDY_MODES, WEIGHT_MODES


def parse_modes(text: str) -> list[tuple[str, str]]:
    """Modes with their schedules from "uniform,fixed:increasing"; `fixed` alone takes the schedule
    `learned`.
    """
    modes = []
    for part in text.split(","):
        mode, _, schedule = part.strip().partition(":")
        if mode not in WEIGHT_MODES or (schedule and (mode != "fixed" or schedule not in SCHEDULES)):
            raise argparse.ArgumentTypeError(
                f"unknown mode {part.strip()!r}; expected some of {', '.join(WEIGHT_MODES)}, or fixed:NAME "
                f"with one of {', '.join(SCHEDULES)}"
            )
        modes.append((mode, schedule or "learned"))
    if len(modes) < 2 or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError("expected at least two modes, none of them twice")
    return modes


def name_of(mode: str, schedule: str) -> str:
    return f"{mode}:{schedule}" if mode == "fixed" and schedule != "learned" else mode


DEFAULT_MODES = ",".join(STUDY_MODES)


def paths(text: str) -> tuple[Path, ...]:
    """Files that a flag lists, separated by commas."""
    return tuple(Path(part.strip()) for part in text.split(",") if part.strip())


@dataclass
class CompareOptions(Options):
    """The flags of main.py, and those of a comparison."""

    title = "comparison"
    common = (*Options.common, "modes", "attacks", "sweep", "published", "page", "judged")

    modes: list[tuple[str, str]] | str = flag(
        DEFAULT_MODES,
        f"weight modes, separated by commas: {', '.join(WEIGHT_MODES)}; fixed:NAME names a schedule",
        "MODES",
        parse=parse_modes,
    )
    attacks: tuple[str, ...] = flag(
        (),
        "instead of modes: attacks as --attack takes them, separated by commas, such as "
        "diffattack,torchattack:PGD,torchattack:DIFGSM(steps=20)",
        "ATTACKS",
        parse=attack_names,
    )
    sweep: Sweep | None = flag(
        None,
        "every mode or attack at several values of a flag that takes a number, or at several budgets, such "
        "as structure_share=0,0.1,0.3 or budget=psnr=40,36.5,33, compared at equal visibility",
        "FLAG=A,B,...",
        parse=functools.partial(parse_sweep, AttackOptions),
    )
    published: bool = flag(False, "print what papers report for the same surrogates below, not run here")
    page: bool = flag(
        False,
        "write judging.html, where a person chooses between two attacks' pictures without their names",
    )
    judged: tuple[Path, ...] = flag(
        (), "choices that judging.html saved, separated by commas", "FILES", parse=paths
    )

    def __post_init__(self) -> None:
        self.given_attack_through = self.attack_through  # whose default depends on the attack
        super().__post_init__()


@dataclass(frozen=True)
class Entry:
    """A mode or attack before it is loaded, in a sweep at one of its values."""

    name: str
    value: float | None
    options: Options  # what `main.py` would be called with


# what a comparison decides itself, or leaves to one run
OF_MAIN = ("attack", "weight_mode", "weight_schedule", "check", "is_test", "overwrite", "batch_size")


def check_options(options: CompareOptions) -> None:
    """Raises InputError for flags of main.py that a comparison does not take, and for those of a comparison
    that do not go together.
    """
    for name in OF_MAIN:
        if getattr(options, name) != Options.__dataclass_fields__[name].default:
            raise InputError(f"--{name} is for main.py; a comparison takes --modes or --attacks")
    if this_process().world_size > 1:
        raise InputError("accelerate launch is for main.py; a comparison takes --processes and --shard")
    if options.attacks and options.modes != parse_modes(DEFAULT_MODES):
        raise InputError("--modes are of one attack, --attacks compares several; give one of them")
    sweep = options.sweep
    if sweep and sweep.flag == "self_attn_loss_weight" and options.structure_share is not None:
        raise InputError("--structure_share replaces --self_attn_loss_weight, so that a sweep of it is idle")
    if sweep and options.attacks and sweep.flag not in FOR_ALL:
        raise InputError(
            f"--sweep {sweep.flag} is of {OURS} alone; with --attacks sweep what all of them know, such as "
            f"budget=psnr=40,36.5,33"
        )
    if sweep and (options.page or options.judged):
        raise InputError("--page and --judged are of one comparison; leave --sweep out")
    if options.judged:  # before hours of attacks, rather than after
        read_study(options.judged, options.save_dir / KEY)


def comparison_folders(experiment: Experiment, options: CompareOptions) -> dict[Path, dict]:
    """The folder of a comparison, and in a sweep those of its values, with what run.json holds there."""
    configuration = {
        "comparison": "sweep" if options.sweep else "attacks" if options.attacks else "modes",
        "images": [str(item.path.relative_to(options.images_root)) for item in experiment.items],
        "labels": [counted(item.labels, options.label_base) for item in experiment.items],
    }
    values = options.sweep.values if options.sweep else ()
    inside = [options.save_dir / options.sweep.folder(value) for value in values]
    return dict.fromkeys((options.save_dir, *inside), configuration)


def reports_in(folder: Path) -> Iterator[Path]:
    """Those there are of what a comparison writes."""
    endings = ("json", "md", "tex", "csv", "html")
    names = [f"{kind}.{ending}" for kind in ("comparison", "sweep") for ending in endings]
    yield from (folder / name for name in (*names, "judging.html", KEY) if (folder / name).exists())
    yield from figures_of(folder, ("success_against_visibility", "sweep"))


def entries(options: CompareOptions) -> list[Entry]:
    """All that is compared; of modes that are the same attack, the first alone."""
    shared = Options(**{declared.name: getattr(options, declared.name) for declared in fields(Options)})
    compared, sweep = [], options.sweep
    for value in sweep.values if sweep else (None,):
        folder = options.save_dir / (sweep.folder(value) if sweep else "")
        swept = {sweep.flag: sweep.option(value)} if sweep else {}
        for name in options.attacks:
            # what only ours knows is left at its default for the others
            idle = {} if name == OURS else {flag: getattr(DEFAULTS, flag) for flag in flags_of_ours()}
            settings = {"attack_through": options.given_attack_through} | idle | swept
            place = folder / parse_attack(name).folder
            compared.append(Entry(name, value, replace(shared, attack=name, save_dir=place, **settings)))
        for weight_mode, schedule in () if options.attacks else options.modes:
            name = name_of(weight_mode, schedule)
            settings = {"weight_mode": weight_mode, "weight_schedule": schedule} | swept
            place = folder / name.replace(":", "_")
            compared.append(Entry(name, value, replace(shared, save_dir=place, **settings)))
            if sweep and sweep.modes_are_one(value):
                break
    for entry in compared:
        entry.options.verify()
    return compared
