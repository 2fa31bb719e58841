"""Judges the written pictures of images that have not been judged yet, by all classifiers and measures, and
adds up what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffattack.classifiers.defences import needs_diffusion, split_name
from diffattack.common.device import set_up
from diffattack.common.parallel import processes_for, run_in_processes, share_cores
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import Pictures, read_image
from diffattack.data.layout import Layout
from diffattack.evaluation.judges import Judged, Judges, joined, judge, read_judged, write_judged
from diffattack.evaluation.metrics import feature_network, names_of_measures
from diffattack.evaluation.predictions import PREDICTION
from diffattack.evaluation.results import Evaluation, evaluation_of, results_of
from diffattack.options import Options
from diffattack.runner.folder import WRITTEN, diffusion_digest, file_digest
from diffattack.runner.setup import Experiment

CHUNK = 16  # images that are judged together
BYTES_EACH = 1_500_000_000  # of a process that judges


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
        """Of what is judged: the pictures, and their labels and target."""
        return json.dumps([[file_digest(path) for path in self.pictures(item)], item.labels, item.target])

    def judged(self, item: Item, judges: Judges) -> Judged | None:
        """What these judges have found; None where they have not looked at these pictures."""
        return read_judged(self.file(item), judges, self.key(item))


def judges_of(experiment: Experiment, options: Options) -> Judges:
    """All that judges a run with these options."""
    uses_diffusion = needs_diffusion(options.model_name + options.judges)
    return Judges(
        options.model_name,
        options.judges,
        experiment.class_names,
        experiment.device,
        feature_network(options.model_name),
        experiment.classifier,
        experiment.identities,
        diffusion_digest(options) if uses_diffusion and options.pretrained_diffusion_path else "",
        options.judge_draws,
        options.classifier_head,
        names_of_measures(options.res, experiment.device),
    )


def unjudged(files: PictureFiles, items: Sequence[Item], judges: Judges) -> list[Item]:
    with tqdm(items, desc="looked at", unit="image", delay=1, leave=False) as bar:
        return [item for item in bar if files.judged(item, judges) is None]


def judge_images(
    files: PictureFiles,
    items: Sequence[Item],
    judges: Judges,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Judges the images that these judges have not; `done` is told of how many are."""
    for start in range(0, len(items), CHUNK):
        chunk = [item for item in items[start : start + CHUNK] if files.judged(item, judges) is None]
        judged = judge(judges, files.read(chunk)) if chunk else None
        for k, item in enumerate(chunk):
            write_judged(files.file(item), judged.of_image(k), judges, files.key(item))
        done(len(items[start : start + CHUNK]))


def judge_all(
    experiment: Experiment, options: Options, files: PictureFiles, items: Sequence[Item], judges: Judges
) -> int:
    """Judges what has not been judged, in several processes where there are to be. Returns how many images
    there were.
    """
    left = unjudged(files, items, judges)
    by_memory = processes_for(len(left), BYTES_EACH) if judges.device.type == "cpu" else 1
    processes = min(options.processes or by_memory, -(-len(left) // CHUNK))
    chunks = [left[start : start + CHUNK] for start in range(0, len(left), CHUNK)]
    with tqdm(total=len(left), desc="judged", unit="image", delay=1, leave=False) as bar:
        if processes > 1:  # what they are is known before others load them
            for name in judges.names:
                experiment.identity(split_name(name)[0])
        arguments = (experiment, options, files, processes)
        for chunk in run_in_processes(processes, chunks, bar.update, judge_of, arguments):
            judge_images(files, chunk, judges, bar.update)
    return len(left)


def judge_of(
    experiment: Experiment, options: Options, files: PictureFiles, processes: int
) -> Callable[[Sequence[Item]], int]:
    """What one of several processes does with images; it returns how many there were."""
    set_up(experiment.device)
    share_cores(processes)
    judges = judges_of(experiment, options)

    def judge_some(items: Sequence[Item]) -> int:
        judge_images(files, items, judges)
        return len(items)

    return judge_some


def add_up(
    files: PictureFiles, items: Sequence[Item], judges: Judges
) -> tuple[Evaluation, Callable[[int, int], dict]]:
    """The evaluation of images that have been judged, and a function that gives what results.json has of the
    k-th of them.
    """
    with tqdm(items, desc="added up", unit="image", delay=1, leave=False) as bar:
        each = (files.judged(item, judges) for item in bar)
        judged = joined(each, len(items))
    labels, targets = labels_and_targets(items)
    return evaluation_of(judged, judges, labels, targets), partial(row_of, judged, judges, labels, targets)


def row_of(
    judged: Judged, judges: Judges, labels: np.ndarray, targets: np.ndarray, base: int, k: int
) -> dict:
    """What classifiers and measures find of the k-th image, for results.json; labels count from `base`."""
    results = results_of(judged.of_image(k), judges, labels[k : k + 1], targets[k : k + 1])
    row = {"predictions": {one.name: one.described(judges.class_names, base) for one in results}}
    keys = ("quality", "quality_of_reconstruction")
    for key, values in zip(keys, judged.visibility[k].tolist()):
        row[key] = dict(zip(judged.measures.tolist(), values))
    for one in results:
        draws = [one.described(judges.class_names, base, draw) for draw in range(1, 1 + one.draws)]
        if draws:
            row.setdefault("draws", {})[one.name] = {
                side: {key: [each[side].get(key) for each in draws] for key in PREDICTION.names}
                for side in draws[0]
            }
    return row
