"""What `--is_test` does: judges the pictures of an output folder, of this tool or of the original, without an
attack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from natsort import natsorted
from PIL import Image
from tqdm import tqdm

from diffattack.common.device import resolve_device, resolve_dtype
from diffattack.common.errors import InputError, note
from diffattack.data.classes import ClassFinder
from diffattack.data.dataset import TARGET_COLUMN, Item, labels_of
from diffattack.data.labels import read_labels
from diffattack.data.layout import SUBFOLDERS, Layout
from diffattack.data.records import json_digest, read_configuration
from diffattack.evaluation.warnings import check_labels
from diffattack.options import Options
from diffattack.runner.folder import check_folder, check_save_dir, claim, counted, provenance
from diffattack.runner.jobs import Job, judges_of
from diffattack.runner.judge import add_up, judge_all
from diffattack.runner.report import write_reports
from diffattack.runner.setup import Experiment, class_names_of, clean_accuracies

NAMES = ("evaluation.json", "evaluation.csv", "evaluation.txt")


def judge_folder(options: Options) -> int:
    """Judges an output folder, of this tool or of the original, and writes evaluation.json, .csv and
    .txt; returns the exit code.
    """
    pairs = list_pairs(options.images_root)
    class_names = class_names_of(options)
    items = label_pairs(options, [clean for clean, *_ in pairs], class_names)
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
    options = replace(options, res=side_of([path for pair in pairs for path in pair]))
    experiment = Experiment(options, class_names, items, device, resolve_dtype(options.dtype, device), {})
    judges = judges_of(experiment, options)
    for name in judges.names:  # what is wrong with one is told before hours of judging by the others
        judges.classifier(name)
    if options.label_path is not None:
        surrogates = [judges.classifier(name) for name in judges.surrogates]
        check_labels(clean_accuracies(experiment, items, surrogates), options.trust_labels)
    claim(layout.folder, configuration)
    for place in layout.places:
        place.mkdir(exist_ok=True)
    job = Job(options, layout, judges, paths=dict(enumerate(pairs)))
    judge_all(experiment, job, items)
    evaluation, row_of_image = add_up(job, items)

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


def list_pairs(folder: Path) -> list[tuple[Path, ...]]:
    """Clean and adversarial files of an output folder, `*originImage*` with `*adv_image*`, in natural order;
    and `*reconstruction*`, where each image has one, which the original tool does not write.
    """
    # also in the subfolders of a run of many images
    there = [path for pattern in ("", SUBFOLDERS) for path in folder.glob(f"{pattern}*.png")]
    clean = natsorted((p for p in there if "originImage" in p.name), key=lambda path: path.name)
    sides = [
        [path.with_name(path.name.replace("originImage", kind)) for path in clean]
        for kind in ("adv_image", "reconstruction")
    ]
    alone = sorted({path for path in there if "adv_image" in path.name}.symmetric_difference(sides[0]))
    if alone or not clean:
        missing = f"{alone[0].name} or its originImage" if alone else "*originImage*.png"
        raise InputError(
            f"--images_root: {missing} is missing in {str(folder)!r}; give the output folder of an attack"
        )
    has_all = all(path.is_file() for path in sides[1])
    return list(zip(clean, *(sides if has_all else sides[:1])))


def side_of(paths: Sequence[Path]) -> int:
    """The side of all pictures, which are squares of one size."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in tqdm(paths, desc="looked at", unit="image", delay=1, leave=False):
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, path)
        except OSError as error:
            raise InputError(f"--images_root: {path.name} cannot be read: {error}") from None
    (width, height), path = list(sizes.items())[-1]
    if len(sizes) > 1 or width != height:
        raise InputError(
            f"--images_root: {path.name} is {width} x {height} pixels; expected squares of one size"
        )
    return width


def label_pairs(options: Options, clean: Sequence[Path], class_names: Sequence[str]) -> list[Item]:
    """The clean files of an output folder with their labels: from a text file in the order of the images, or
    else from the folder's own run.json.
    """
    base, target = options.label_base, options.target_label
    if options.label_path is None and (options.images_root / "run.json").is_file():
        return items_of_run(options, clean, class_names)
    if options.label_path is None:
        raise InputError(
            "--label_path is missing; give the text file of labels that the images were attacked with"
        )
    if isinstance(target, str):
        raise InputError(
            f"--target_label {TARGET_COLUMN} names a column, and the files of an output folder have other "
            f"names than the CSV; give a label"
        )
    finder = ClassFinder(class_names, base)
    labels, _ = read_labels(options.label_path, clean, finder, None)
    target = None if target is None else finder.label(str(target), "--target_label")
    return [Item(k, path, classes, target) for k, (path, classes) in enumerate(zip(clean, labels))]


def items_of_run(options: Options, clean: Sequence[Path], class_names: Sequence[str]) -> list[Item]:
    """The clean files of a run of this tool, with the labels and targets that it had."""
    folder = options.images_root
    try:
        configuration = read_configuration(folder)
        named = configuration["contents"]["the class names"]
        indices = [int(path.name.split("_")[0]) for path in clean]
        items = [Item(k, clean[k], *labels_of(configuration, index)) for k, index in enumerate(indices)]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"--images_root: run.json does not tell the labels ({type(error).__name__}: {error}); give the "
            f"file of labels that the images were attacked with as --label_path"
        ) from None
    made_on = ",".join(configuration["model_name"])
    if made_on != ",".join(options.model_name):
        note(f"these pictures were made on {made_on}; judges beside it are named by --transfer_models")
    if named != json_digest(class_names):
        raise InputError(
            f"--images_root: the run in {str(folder)!r} was of other classes than these {len(class_names)}; "
            f"give the --captions that it had"
        )
    return items
