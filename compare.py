"""Compares weight modes, or attacks, on the same images, and says of every difference whether it is more than
chance.

    python compare.py                                       # all four modes on the demo photographs
    python compare.py --modes uniform,fixed,fixed:increasing --images_root PHOTOS --label_path LABELS.txt
    python compare.py --modes uniform,fixed,minimax --sweep structure_share=0,0.1,0.3,1
    python compare.py --attacks diffattack,torchattack:PGD,torchattack:DIFGSM --budget psnr=33

Inversion and null-text optimisation do not depend on the weights; they are done once an image and shared by
all modes. The folder of each mode or attack inside --save_dir is as `main.py` writes it; in a sweep it lies
inside that of its value. A comparison that was interrupted goes on with what is missing. The first mode is
the one that the others are compared with.
"""

from __future__ import annotations

import diffattack.common.environment  # isort: skip  # noqa: F401

import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.common.commands import run_program
from diffattack.common.flags import parse_options
from diffattack.runner.checked import Checked
from diffattack.runner.clean_check import look_at_clean_images
from diffattack.runner.compared import CompareOptions, Mode, check_options, check_reports, entries
from diffattack.runner.comparing import report
from diffattack.runner.folder import check_folder, claim_folder, drop_unusable, make_folder
from diffattack.runner.modes import attack_in_modes
from diffattack.runner.own_files import check_nothing_is_in_the_way
from diffattack.runner.processes import get_ready
from diffattack.runner.runner import Job, restore_weights
from diffattack.runner.task import check_shards, load_attacks, load_judges, read_task


def run(options: CompareOptions) -> int:
    """Checks, attacks in every mode, compares and writes; returns the exit code."""
    check_options(options)
    task = read_task(options)
    compared = entries(options)
    each = [entry.options for entry in compared]
    # each mode has as many processes as it may have
    part, parts = check_shards(replace(options, processes=1), [one.weight_mode for one in each])
    for one in each:
        check_folder(one.save_dir, task.configuration(one))
        check_nothing_is_in_the_way(task.layout(one), one)
    check_reports(options)
    selected = task.items[: options.limit]
    items = [item for item in selected if item.index % parts == part]
    get_ready([(one, task.layout(one)) for one in each], task.device, items)
    attacks = load_attacks(task, each)
    configurations = [task.configuration(one) for one in each]  # which now say what the classifiers are
    for one, configuration in zip(each, configurations):
        check_folder(one.save_dir, configuration)
    if not any(task.layout(one).finished() for one in each):
        ours = (attack for attack in attacks if isinstance(attack, DiffAttack))
        look_at_clean_images(task, next(ours, attacks[0]), selected)
    modes, judges = [], load_judges(task, attacks[0])
    for entry, attack, configuration in zip(compared, attacks, configurations):
        layout = task.layout(entry.options)
        make_folder(layout.folder, *layout.places)
        identity = claim_folder(layout.folder, configuration)
        checked = Checked(layout, task.masks)
        drop_unusable(layout, items, identity, checked)
        job = Job(attack, entry.options, identity, layout, task.masks, judges)
        modes.append(Mode(entry.name, entry.value, job))
        done = layout.finished([item.index for item in items])
        if done:
            restore_weights(attack, layout, max(done))
    with tqdm(total=len(items), desc="images", unit="image") as bar:
        attack_in_modes(task, items, [mode.job for mode in modes], bar)
    return report(task, options, modes, selected)


def main(argv: list[str] | None = None) -> int:
    return run_program(
        "compare.py",
        lambda: run(
            parse_options(CompareOptions, __doc__.split("\n\n")[0], argv, save_dir=Path("comparison"))
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
