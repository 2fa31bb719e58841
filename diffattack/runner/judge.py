"""Judges the written pictures of images that have not been judged yet, by all classifiers and measures, and
adds up what was found; of a run, or of any output folder (`--is_test`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from natsort import natsorted

from diffattack.classifiers.defences import needs_diffusion, split_name
from diffattack.common.devices import resolve_device, resolve_dtype, set_up
from diffattack.common.environment import mend_torchvision
from diffattack.common.errors import InputError, note
from diffattack.common.progress import progress
from diffattack.common.workers import import_ahead, processes_for, run_in_processes, tell_parent
from diffattack.data.dataset import TARGET_COLUMN, Item, labels_and_targets
from diffattack.data.images import Pictures, read_image
from diffattack.data.labels import Labels, check_target
from diffattack.data.layout import SUBFOLDERS, Layout
from diffattack.data.opened import opened
from diffattack.data.records import json_digest, read_configuration
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.evaluation.judges import Columns, Judged, Judges, image_key, judge, read_judged, write_judged
from diffattack.evaluation.predictions import PREDICTION
from diffattack.evaluation.quality import feature_network, measures_at_hand
from diffattack.evaluation.results import Evaluation, evaluation_of, results_of
from diffattack.options import Options
from diffattack.runner.clean_check import check_labels, clean_accuracies
from diffattack.runner.folder import (
    WRITTEN,
    check_folder,
    check_save_dir,
    claim,
    counted,
    diffusion_digest,
    file_digest,
    provenance,
)
from diffattack.runner.report import write_reports
from diffattack.runner.setup import Experiment, class_names_of

CHUNK = 16  # images that are judged together
BYTES_EACH = 1_500_000_000  # of a process that judges
NEEDED = ("diffattack.common.mended", "diffattack.runner.judge", "torchmetrics.functional.image")


@dataclass(frozen=True)
class PictureFiles:
    """The written pictures of images, and where what is found of them is kept."""

    layout: Layout
    size: int  # pixels of a picture's side
    paths: Mapping[int, Sequence[Path]] | None = None  # by the image's index; None where the layout knows

    def pictures(self, item: Item) -> list[Path]:
        """Clean, adversarial, and reconstructed where that was written."""
        if self.paths is not None:
            return list(self.paths[item.index])
        paths = [self.layout.file(item.index, f"{kind}.png") for kind in WRITTEN]
        return paths if paths[2].is_file() else paths[:2]

    def read(self, items: Sequence[Item]) -> Pictures:
        """Raises OSError where a picture is damaged."""
        paths = [self.pictures(item) for item in items]
        clean, adversarial, *reconstructed = (
            np.stack([read_image(path, self.size) for path in side]) for side in zip(*paths)
        )
        labels, targets = labels_and_targets(items)
        return Pictures(clean, adversarial, labels, *(reconstructed or [None]), targets)

    def file(self, item: Item) -> Path:
        return self.layout.file(item.index, "judged.npz")

    def key(self, item: Item) -> str:
        return image_key([file_digest(path) for path in self.pictures(item)], item.labels, item.target)

    def judged(self, item: Item, judges: Judges) -> Judged | None:
        """What these judges have found; None where they have not looked at these pictures."""
        return read_judged(self.file(item), judges, self.key(item))


def judges_of(
    experiment: Experiment,
    options: Options,
    diffusion: LatentDiffusion | None = None,
    loaded: Mapping[str, torch.nn.Module] | None = None,
) -> Judges:
    """All that judges a run with these options.

    Args:
        diffusion: the diffusion model, if it is loaded.
        loaded: classifiers that are loaded, by name.
    """
    uses_diffusion = options.pretrained_diffusion_path and needs_diffusion(
        options.model_name + options.judges
    )

    @cache
    def model() -> LatentDiffusion | None:
        if diffusion is not None or not uses_diffusion:
            return diffusion
        return LatentDiffusion(experiment.load_pipeline(), experiment.class_names)

    def load(name: str) -> torch.nn.Module:
        of_defence = model() if needs_diffusion([name]) else diffusion
        return experiment.load_classifier(name, diffusion=of_defence, head=options.classifier_head)

    return Judges(
        options.model_name,
        options.judges,
        experiment.class_names,
        experiment.device,
        feature_network(options.model_name),
        load,
        experiment.identities,
        diffusion_digest(options) if uses_diffusion else "",
        options.judge_draws,
        options.classifier_head,
        measures_at_hand(),
        dict(loaded or {}),
    )


def unjudged(files: PictureFiles, items: Sequence[Item], judges: Judges) -> list[Item]:
    with progress(items, desc="looked at", unit="image") as bar:
        return [item for item in bar if files.judged(item, judges) is None]


def judge_images(
    files: PictureFiles,
    items: Sequence[Item],
    judges: Judges,
    elsewhere: PictureFiles | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Judges the images that these judges have not; `done` is told of how many are.

    Args:
        elsewhere: where the same clean pictures may have been judged, as of another attack.
    """
    for start in range(0, len(items), CHUNK):
        chunk = [item for item in items[start : start + CHUNK] if files.judged(item, judges) is None]
        same = [elsewhere and elsewhere.judged(item, judges) for item in chunk]
        if chunk:
            found = judge(judges, files.read(chunk), None if None in same else joined(same))
            for k, item in enumerate(chunk):
                write_judged(files.file(item), found.of_image(k), judges, files.key(item))
        done(len(items[start : start + CHUNK]))


def joined(each: Sequence[Judged]) -> Judged:
    columns = Columns(len(each))
    for judged in each:
        columns.add(judged)
    return columns.of_all()


def judge_all(
    experiment: Experiment,
    options: Options,
    files: PictureFiles,
    items: Sequence[Item],
    judges: Judges,
    elsewhere: PictureFiles | None = None,
) -> None:
    """Judges what has not been judged, in several processes where there are to be; what one leaves undone,
    because it was killed, is done here.
    """
    left = unjudged(files, items, judges)
    processes = options.processes or (
        processes_for(len(left), BYTES_EACH) if judges.device.type == "cpu" else 1
    )
    with progress(total=len(left), desc="judged", unit="image") as bar:
        if processes > 1 and len(left) > CHUNK:
            for name in judges.names:  # what they are is known before others load them
                experiment.identity(split_name(name)[0])
            import_ahead(NEEDED)
            parts = [(experiment, options, files, left[k::processes], elsewhere) for k in range(processes)]
            if run_in_processes(judge_part, parts, told=bar.update):
                note("a process that judged was killed, perhaps for want of memory; going on in this one")
            left = unjudged(files, left, judges)
        judge_images(files, left, judges, elsewhere, bar.update)


def judge_part(
    experiment: Experiment,
    options: Options,
    files: PictureFiles,
    items: Sequence[Item],
    elsewhere: PictureFiles | None,
) -> None:
    """What one of several processes does."""
    mend_torchvision()
    set_up(experiment.device)
    judge_images(files, items, judges_of(experiment, options), elsewhere, tell_parent)


def add_up(
    files: PictureFiles, items: Sequence[Item], judges: Judges
) -> tuple[Evaluation, Callable[[int, int], dict]]:
    """The evaluation of images that have been judged, and a function that gives what results.json has of the
    k-th of them.
    """
    columns = Columns(len(items), files.layout.folder)
    with progress(items, desc="added up", unit="image") as bar:
        for item in bar:
            columns.add(files.judged(item, judges))
    judged, (labels, targets) = columns.of_all(), labels_and_targets(items)
    return evaluation_of(judged, judges, labels, targets), partial(row_of, judged, judges, labels, targets)


def row_of(
    judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray, base: int, k: int
) -> dict:
    """What classifiers and measures find of the k-th image, for results.json; labels count from `base`."""
    one = (judged.of_image(k), judges, labels[k : k + 1], targets[k : k + 1])
    row = {"predictions": {r.name: r.described(0, judges.class_names, base) for r in results_of(*one)}}
    keys = ("quality", "quality_of_reconstruction")
    for key, values in zip(keys, judged.visibility[k].tolist()):
        finite = ((n, v if np.isfinite(v) else None) for n, v in zip(judged.measures.tolist(), values))
        row[key] = dict(finite)
    drawn = [results_of(*one, draw) for draw in range(1, judges.draws + 1) if judges.draws > 1]
    for each in zip(*drawn):
        described = [result.described(0, judges.class_names, base) for result in each]
        row.setdefault("draws", {})[each[0].name] = {
            side: {key: [one[side].get(key) for one in described] for key in PREDICTION.names}
            for side in described[0]
        }
    return row


# ---------------------------------------------------------------- --is_test


def judge_folder(options: Options) -> int:
    """Judges an output folder, of this tool or of the original, and writes evaluation.json, evaluation.txt
    and images.csv; returns the exit code.
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
    own = (options.save_dir / name for name in ("evaluation.json", "evaluation.txt", "images.csv"))
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
    names = ("evaluation.json", "evaluation.txt")
    write_reports(options.save_dir, names, results, rows, text, evaluation)
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
