"""Compares weight modes on the same images, and says of every difference whether it is more than chance.

    python compare.py                                       # all four modes on the demo photographs
    python compare.py --modes uniform,fixed,fixed:increasing --images_root PHOTOS --label_path LABELS.txt

Inversion and null-text optimisation do not depend on the weights; they are done once an image and shared by
all modes. Each mode's folder inside --save_dir is as `main.py` writes it. A comparison that was interrupted
goes on with what is missing. The first mode is the one that the others are compared with.
"""

from __future__ import annotations

import environment  # isort: skip  # noqa: F401

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from comparison import (
    STUDY_SHARES,
    WeightsOfMode,
    advice,
    as_dict,
    csv_text,
    figure_rows,
    figures_of,
    latex,
    layer_rows,
    markdown,
    sentence,
    share_rows,
    shares_of,
    weight_rows,
)
from dataset import Item, labels_and_targets
from diff_latent_attack import DiffAttack, NonFiniteLossError
from evaluate import Evaluation, evaluate, table
from figures import plot_success_against_visibility
from images import read_image, to_tensor
from models import load_networks, make_attack, resolve_device, resolve_dtype, set_up
from options import InputError, check_numbers, class_names_of, fill_in_defaults, make_parser, read_items
from records import ANALYSIS, Run, record_path
from runner import attack_images, count_processes, restore_weights
from runs import (
    check_folder,
    check_save_dir,
    claim_folder,
    configuration_of,
    failure_path,
    make_folder,
    missing_of,
    provenance,
    read_failures,
    read_finished,
    read_pictures,
    read_rows,
    run_program,
    write_failure,
    write_texts,
)
from timestep_weights import SCHEDULES, WEIGHT_MODES, effective_timesteps
from utils import draw_comparison, draw_folders, save_figure
from workers import run_in_processes

# ---------------------------------------------------------------- run


def parse_modes(text: str) -> list[tuple[str, str]]:
    """Modes with their schedules from "uniform,fixed:increasing"; `fixed` alone takes the schedule
    `learned`.
    """
    modes = []
    for part in text.split(","):
        mode, _, schedule = part.strip().partition(":")
        if mode not in WEIGHT_MODES:
            raise argparse.ArgumentTypeError(
                f"unknown mode {mode!r}; expected some of {', '.join(WEIGHT_MODES)}"
            )
        if schedule and (mode != "fixed" or schedule not in SCHEDULES):
            raise argparse.ArgumentTypeError(
                f"{part.strip()!r}: a schedule goes with fixed alone, as fixed:NAME with NAME one of "
                f"{', '.join(SCHEDULES)}"
            )
        modes.append((mode, schedule or "learned"))
    if len(modes) < 2 or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError("expected at least two modes, none of them twice")
    return modes


def name_of(mode: str, schedule: str) -> str:
    return f"{mode}:{schedule}" if mode == "fixed" and schedule != "learned" else mode


def run(arguments: argparse.Namespace) -> int:
    """Checks, attacks in every mode, compares and writes; returns the exit code."""
    check_numbers(arguments)
    class_names = class_names_of(arguments)
    items = read_items(arguments, class_names)
    if (arguments.weight_mode, arguments.weight_schedule) != ("uniform", "learned"):
        raise InputError(
            "--weight_mode and --weight_schedule are for main.py; a comparison takes --modes, such as "
            "uniform,fixed:increasing"
        )
    if (
        arguments.shard != "0/1"
        or "WORLD_SIZE" in os.environ
        or arguments.overwrite
        or arguments.is_test
        or (arguments.batch_size or 1) != 1
    ):
        raise InputError(
            "--shard, --overwrite, --is_test, --batch_size and accelerate launch are for main.py; a "
            "comparison shares out its images by --processes alone"
        )
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    check_save_dir(arguments.save_dir)
    names = [name_of(*mode) for mode in arguments.modes]
    of_mode = [arguments_of_mode(arguments, mode, name) for mode, name in zip(arguments.modes, names)]
    configurations = [configuration_of(settings, dtype, items) for settings in of_mode]
    for settings, configuration in zip(of_mode, configurations):
        check_folder(settings.save_dir, configuration)
    torch.manual_seed(arguments.seed)
    set_up(device)
    pipeline, classifiers = load_networks(arguments, device, dtype, class_names)
    attacks = [make_attack(settings, pipeline, classifiers, class_names) for settings in of_mode]
    starts = [attack.controller.weights().tolist() for attack in attacks]
    for settings, configuration in zip(of_mode, configurations):
        make_folder(settings.save_dir)
        claim_folder(settings.save_dir, configuration)

    work = items[: arguments.limit]
    for settings, attack in zip(of_mode, attacks):
        done = [item.index for item in work if record_path(settings.save_dir, item.index).exists()]
        if done:
            restore_weights(attack, settings.save_dir, max(done))
    with tqdm(total=len(work), desc="images", unit="image") as bar:
        share_out(work, attacks, of_mode, device, dtype, class_names, bar)
        for item in work:
            attack_in_all_modes(item, attacks, of_mode)
            show_progress(bar, work, of_mode)
    return report(arguments, names, of_mode, attacks, starts, work, device)


def arguments_of_mode(arguments: argparse.Namespace, mode: tuple[str, str], name: str) -> argparse.Namespace:
    """What `main.py` would be called with for one mode."""
    settings = copy.copy(arguments)
    settings.weight_mode, settings.weight_schedule = mode
    settings.save_dir = arguments.save_dir / name.replace(":", "_")
    del settings.modes
    return settings


def share_out(
    items: list[Item],
    attacks: Sequence[DiffAttack],
    of_mode: Sequence[argparse.Namespace],
    device: torch.device,
    dtype: torch.dtype,
    class_names: Sequence[str],
    bar: tqdm,
) -> None:
    """Attacks the images in several processes, in the modes that allow it; mode learnable, which takes one
    image after the other, is left to the caller.
    """
    for settings, attack in zip(of_mode, attacks):
        settings.processes = (
            1 if settings.weight_mode == "learnable" else count_processes(settings, attack, len(items), 1)
        )
    shared = [settings for settings in of_mode if settings.processes > 1]
    for settings in shared:
        for item in missing_of(items, settings.save_dir):
            failure_path(settings.save_dir, item.index).unlink(missing_ok=True)  # of an earlier run
    if any(missing_of(items, settings.save_dir) for settings in shared):
        processes = shared[0].processes
        killed = run_in_processes(
            attack_part,
            [(shared, items[k::processes], device, dtype, class_names) for k in range(processes)],
            lambda: show_progress(bar, items, shared),
        )
        if killed:
            tqdm.write(
                f"{len(killed)} of {processes} processes were killed; going on with their images in this one",
                file=sys.stderr,
            )


def show_progress(bar: tqdm, items: Sequence[Item], of_mode: Sequence[argparse.Namespace]) -> None:
    done = sum(all(record_path(of.save_dir, item.index).exists() for of in of_mode) for item in items)
    bar.update(done - bar.n)


def attack_part(
    of_mode: Sequence[argparse.Namespace],
    items: Sequence[Item],
    device: torch.device,
    dtype: torch.dtype,
    class_names: Sequence[str],
) -> None:
    """What one of several processes does: attacks its images in the modes given."""
    torch.manual_seed(of_mode[0].seed)
    set_up(device)
    networks = load_networks(of_mode[0], device, dtype, class_names)
    attacks = [make_attack(settings, *networks, class_names) for settings in of_mode]
    for item in items:
        attack_in_all_modes(item, attacks, of_mode)


def attack_in_all_modes(item: Item, attacks: Sequence, of_mode: Sequence[argparse.Namespace]) -> None:
    """Attacks one image in each mode that has no record of it, from one inversion."""
    index, path = item.index, item.path
    missing = [
        k
        for k, settings in enumerate(of_mode)
        if not record_path(settings.save_dir, index).exists()
        and not (settings.processes > 1 and failure_path(settings.save_dir, index).exists())
    ]  # one of the processes has tried
    if not missing:
        return
    try:
        clean = read_image(path, of_mode[0].res)
    except OSError as error:
        for k in missing:
            write_failure(of_mode[k].save_dir, index, path, error)
        return
    started = time.perf_counter()
    inversion = attacks[0].invert(to_tensor(clean), *map(torch.tensor, labels_and_targets([item])))
    seconds = time.perf_counter() - started
    for k in missing:
        failure_path(of_mode[k].save_dir, index).unlink(missing_ok=True)
        state = attacks[k].controller.state()
        try:
            attack_images(attacks[k], [item], [clean], of_mode[k], inversion, seconds)
        except NonFiniteLossError as error:
            attacks[k].controller.load_state(state)
            write_failure(of_mode[k].save_dir, index, path, error)


def report(
    arguments: argparse.Namespace,
    names: Sequence[str],
    of_mode: Sequence[argparse.Namespace],
    attacks: Sequence,
    starts: Sequence[list[float]],
    items: Sequence[Item],
    device: torch.device,
) -> int:
    """Compares what is in the folders, writes comparison.md, .tex, .json and .csv, and prints the table;
    returns the exit code.
    """
    failures = [
        f"{name}: {failure}"
        for name, settings in zip(names, of_mode)
        for failure in read_failures(settings.save_dir, [item.index for item in items])
    ]
    compared = [
        item
        for item in items
        if all(record_path(settings.save_dir, item.index).exists() for settings in of_mode)
    ]
    common = [item.index for item in compared]
    if not common:
        print("\n".join(["no image was attacked in every mode, so there is nothing to compare", *failures]))
        return 1
    rows = [read_rows(settings.save_dir, common) for settings in of_mode]
    surrogates = dict(zip(arguments.model_name, attacks[0].classifiers))
    evaluations = [
        evaluate(
            read_pictures(settings.save_dir, compared, settings.res),
            surrogates,
            arguments.transfer_models,
            device,
        )
        for settings in of_mode
    ]
    figures = figures_of(evaluations, [np.array([row["seconds"] for row in of]) for of in rows])
    sentences = [sentence(k, names, figures, len(common)) for k in range(1, len(names))]
    weights = [
        WeightsOfMode(
            start, attack.controller.weights().tolist(), effective_timesteps(attack.controller.weights())
        )
        for start, attack in zip(starts, attacks)
    ]
    runs = [read_finished(settings.save_dir, common) for settings in of_mode]
    layers, shares = runs[0].records[0].layers, shares_of(runs[0].layer_losses)

    sections = [
        ("Figures", figure_rows(names, figures)),
        ("Weights", weight_rows(names, weights)),
        ("Shares of the self-attention loss by timestep, %", share_rows(shares)),
        ("Shares of the self-attention loss by layer, %", layer_rows(layers, shares)),
    ]
    remarks = [
        f"{len(common)} images; in brackets 95 % intervals; below each figure its difference to {names[0]} "
        f"on the same images, and p, corrected by Holm over the table",
        *sentences,
        *advice(names, weights),
        f"the study that this tool extends reports {STUDY_SHARES} by timestep at the first layer alone",
        *dict.fromkeys(
            f"warning: {warning}" for evaluation in evaluations for warning in evaluation.warnings
        ),
        *(f"left out: {failure}" for failure in failures),
    ]
    results = {
        "modes": names,
        "images": [row["file"] for row in rows[0]],
        "figures": [as_dict(figure, names) for figure in figures],
        "sentences": sentences,
        "weights": {name: {**vars(w), "collapsed": w.collapsed} for name, w in zip(names, weights)},
        "layers": layers,
        "shares": {
            name: {
                "mean": value.mean(0).tolist(),
                "standard_deviation": value.std(0).tolist(),
                "by_image": value.tolist(),
            }
            for name, value in shares.items()
        },
        "evaluations": {name: evaluation.as_dict() for name, evaluation in zip(names, evaluations)},
        "not_attacked": failures,
        **provenance(arguments, device),
    }
    contents = {
        "comparison.md": markdown(sections, remarks),
        "comparison.tex": latex(sections[0][1], remarks[0]),
        "comparison.json": json.dumps(results, indent=2),
        "comparison.csv": csv_text(names, rows, evaluations, arguments.label_base),
    }
    write_texts(arguments.save_dir, contents)
    print(
        "\n"
        + "\n\n".join("\n".join([title, *table(of)]) for title, of in sections)
        + "\n\n"
        + "\n".join(remarks)
    )
    if arguments.figures != "none":
        draw(names, runs, evaluations, arguments.save_dir, each_image=arguments.figures == "all")
        print(f"\nfigures in {arguments.save_dir / ANALYSIS}, and in that folder of each mode")
    return 1 if failures else 0


def draw(
    names: Sequence[str],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    folder: Path,
    each_image: bool,
) -> None:
    """The figures of each mode in its own folder, and those that compare the modes in that of the
    comparison.
    """
    draw_folders(runs, each_image, anew=False)
    draw_comparison(dict(zip(names, runs)), folder)
    measure = "LPIPS" if "LPIPS" in evaluations[0].quality else "SSIM"

    def ends(estimate):
        return (estimate.value, estimate.low, estimate.high)

    points = {
        name: {
            measure: ends(e.quality[measure].adversarial),
            e.classifiers[0].name: ends(e.classifiers[0].success),
            **({"transfer, mean": ends(e.transfer_success)} if e.transfer_success else {}),
        }
        for name, e in zip(names, evaluations)
    }
    save_figure(
        plot_success_against_visibility(points, measure), folder / ANALYSIS / "success_against_visibility"
    )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__.split("\n\n")[0])
    parser.set_defaults(save_dir=Path("comparison"))
    parser.add_argument(
        "--modes",
        type=parse_modes,
        default=",".join(WEIGHT_MODES),
        metavar="MODES",
        help="weight modes, separated by commas; fixed:NAME names a schedule",
    )
    return run_program("compare.py", lambda: run(fill_in_defaults(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
