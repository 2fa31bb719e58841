"""What `--is_test` does: judges the pictures of an output folder, of this tool or of the original, without an
attack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from natsort import natsorted

from diffattack.common.device import resolve_device, resolve_dtype
from diffattack.common.environment import mend_torchvision
from diffattack.common.errors import InputError
from diffattack.common.progress import progress
from diffattack.data.dataset import TARGET_COLUMN, Item
from diffattack.data.labels import Labels, check_target
from diffattack.data.layout import SUBFOLDERS, Layout
from diffattack.data.opened import opened
from diffattack.data.records import json_digest, read_configuration
from diffattack.evaluation.clean_check import check_labels
from diffattack.options import Options
from diffattack.runner.folder import (
    check_folder,
    check_save_dir,
    claim,
    counted,
    provenance,
)
from diffattack.runner.judge import PictureFiles, add_up, judge_all, judges_of
from diffattack.runner.report import write_reports
from diffattack.runner.setup import Experiment, class_names_of, clean_accuracies

NAMES = ("evaluation.json", "evaluation.csv", "evaluation.txt")


def judge_folder(options: Options) -> int:
    """Judges an output folder, of this tool or of the original, and writes evaluation.json, .csv and
    .txt; returns the exit code.
    """
    mend_torchvision()
    pairs = list_pairs(options.images_root)
    class_names = class_names_of(options)
    items = label_pairs(options, [clean for clean, _ in pairs], class_names)
    device = resolve_device(options.device)
    check_save_dir(options.save_dir)
    layout = Layout(options.save_dir / "judged", len(items))
    configuration = {
        "judged": str(options.images_root.resolve()),
        "images": [item.path.name for item in items],
        "labels": [counted(item.labels, options.label_base) for item in items],
    }
    own = (options.save_dir / name for name in NAMES)
    check_folder(layout.folder, configuration, (path for path in own if path.exists()))
    size = common_side(pairs)
    # which the original tool does not write
    extra = [clean.with_name(clean.name.replace("originImage", "reconstruction")) for clean, _ in pairs]
    if all(path.is_file() for path in extra):
        pairs = [(*pair, path) for pair, path in zip(pairs, extra)]
    options = replace(options, res=size)
    experiment = Experiment(options, class_names, items, device, resolve_dtype(options.dtype, device), {})
    judges = judges_of(experiment, options)
    for name in judges.names:  # what is wrong with one is told before hours of judging by the others
        judges[name]
    if options.label_path is not None:
        surrogates = [judges[name] for name in judges.surrogates]
        check_labels(clean_accuracies(experiment, items, surrogates), options.trust_labels)
    claim(layout.folder, configuration)
    for place in layout.places:
        place.mkdir(exist_ok=True)
    files = PictureFiles(layout, size, dict(enumerate(pairs)))
    judge_all(experiment, options, files, items, judges)
    evaluation, row_of_image = add_up(files, items, judges)

    def rows() -> Iterator[dict]:
        for k, item in enumerate(items):
            found = row_of_image(options.label_base, k)
            first = found["predictions"][judges.names[0]]
            yield {
                "file": item.path.name,
                "label": counted(item.labels, options.label_base),
                "class": ", ".join(class_names[label] for label in item.labels),
                **{side: first[side] for side in ("before", "after")},
                **found,
            }

    results = evaluation.as_dict() | provenance(options, device)
    text = "\n".join(evaluation.lines())
    write_reports(options.save_dir, NAMES, results, rows, text, evaluation)
    print("\n" + text)
    return 0


def common_side(pairs: Sequence[tuple[Path, Path]]) -> int:
    """The side of all pictures, which are squares of one size."""
    size = side_of(pairs[0][0])
    with progress(pairs, desc="looked at", unit="image") as bar:
        for path in (path for pair in bar for path in pair):
            if side_of(path) != size:
                raise InputError(
                    f"--images_root: {path.name} has another size than {pairs[0][0].name}; expected squares "
                    f"of {size} pixels"
                )
    return size


def list_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Clean and adversarial files of an output folder, `*originImage*` with `*adv_image*`, in natural
    order.
    """
    if not folder.is_dir():
        raise InputError(
            f"--images_root: there is no folder {str(folder)!r}; give the output folder of an attack"
        )
    clean, adversarial = (
        natsorted(
            # also in the subfolders of a run of many images
            (path for pattern in ("", SUBFOLDERS) for path in folder.glob(f"{pattern}*{kind}*.png")),
            key=lambda path: path.name,
        )
        for kind in ("originImage", "adv_image")
    )
    written = set(clean) | set(adversarial)
    for paths, kind, partner in (
        (clean, "originImage", "adv_image"),
        (adversarial, "adv_image", "originImage"),
    ):
        for path in paths:
            if path.with_name(path.name.replace(kind, partner)) not in written:
                raise InputError(
                    f"--images_root: {path.name} has no partner {path.name.replace(kind, partner)} in "
                    f"{str(folder)!r}"
                )
    if not clean:
        raise InputError(
            f"--images_root: no *originImage*.png in {str(folder)!r}; give the output folder of an attack"
        )
    return [(path, path.with_name(path.name.replace("originImage", "adv_image"))) for path in clean]


def label_pairs(options: Options, clean: Sequence[Path], class_names: Sequence[str]) -> list[Item]:
    """The clean files of an output folder with their labels: from a text file in the order of the images, or
    else from the folder's own run.json.
    """
    known = options.images_root / "run.json"
    if options.label_path is None and known.is_file():
        return items_of_run(options, clean, class_names)
    if options.label_path is None:
        raise InputError(
            "--label_path is missing; give the text file of labels that the images were attacked with"
        )
    if isinstance(options.target_label, str):
        raise InputError(
            f"--target_label {TARGET_COLUMN} names a column, and the files of an output folder have other "
            f"names than the CSV; give a label"
        )
    labels = Labels(options.label_path, class_names, options.label_base).of_images_in_order(clean)
    target = (
        None
        if options.target_label is None
        else check_target(options.target_label, class_names, options.label_base)
    )
    return [Item(k, path, classes, target) for k, (path, classes) in enumerate(zip(clean, labels))]


def items_of_run(options: Options, clean: Sequence[Path], class_names: Sequence[str]) -> list[Item]:
    """The clean files of a run of this tool, with the labels and targets that it had."""
    try:
        configuration = read_configuration(options.images_root)
        named = configuration["contents"].get("the class names")
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
    if named is not None and named != json_digest(class_names):
        raise InputError(
            f"--images_root: the run in {str(options.images_root)!r} was of other classes than these "
            f"{len(class_names)}; give the --captions that it had"
        )
    return items


def side_of(path: Path) -> int:
    try:
        with opened(path) as image:
            width, height = image.size
    except OSError as error:
        raise InputError(f"--images_root: {error}") from None
    if width != height:
        raise InputError(f"--images_root: {path.name} is {width} x {height} pixels; expected a square")
    return width
