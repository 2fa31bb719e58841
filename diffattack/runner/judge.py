"""Judges the written pictures of images that have not been judged yet, by all classifiers and measures, and
adds up what was found.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from diffattack.classifiers.defences import split_name
from diffattack.common.device import set_up
from diffattack.common.parallel import processes_for, run_in_processes, share_cores
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.evaluation.judges import Judged, Judges, joined, judge, write_judged
from diffattack.evaluation.predictions import PREDICTION
from diffattack.evaluation.results import Evaluation, evaluation_of, results_of
from diffattack.runner.jobs import Job, judges_of
from diffattack.runner.setup import Experiment

CHUNK = 16  # images that are judged together
BYTES_EACH = 1_500_000_000  # of a process that judges


def unjudged(job: Job, items: Sequence[Item]) -> list[Item]:
    with tqdm(items, desc="looked at", unit="image", delay=1, leave=False) as bar:
        return [item for item in bar if job.judged(item) is None]


def judge_images(job: Job, items: Sequence[Item]) -> int:
    """Judges those of a few images that the job's judges have not; returns how many images there are."""
    left = [item for item in items if job.judged(item) is None]
    judged = judge(job.judges, job.read(left)) if left else None
    for k, item in enumerate(left):
        path, key = job.judged_file(item)
        write_judged(path, judged.of_image(k), job.judges, key)
    return len(items)


def judge_all(experiment: Experiment, job: Job, items: Sequence[Item]) -> int:
    """Judges what has not been judged, in several processes where there are to be. Returns how many images
    there were.
    """
    left, judges = unjudged(job, items), job.judges
    by_memory = processes_for(len(left), BYTES_EACH) if judges.device.type == "cpu" else 1
    chunks = [left[start : start + CHUNK] for start in range(0, len(left), CHUNK)]
    processes = max(1, min(job.options.processes or by_memory, len(chunks)))
    sharing = job.options.processes or processes  # as those that attack, so that digits are the same
    share_cores(sharing)
    with tqdm(total=len(left), desc="judged", unit="image", delay=1, leave=False) as bar:
        if processes > 1:  # what they are is known before others load them
            for name in judges.names:
                experiment.identity(split_name(name)[0])
        arguments = (experiment, replace(job, attack=None, judges=None), sharing)
        for chunk in run_in_processes(processes, chunks, bar.update, judge_of, arguments):
            bar.update(judge_images(job, chunk))
    return len(left)


def judge_of(experiment: Experiment, job: Job, sharing: int) -> Callable[[Sequence[Item]], int]:
    """What one of several processes does with images, that has so much of the cores as one of `sharing`."""
    set_up(experiment.device)
    share_cores(sharing)
    return partial(judge_images, replace(job, judges=judges_of(experiment, job.options)))


def all_judged(job: Job, items: Sequence[Item]) -> Judged:
    """What was found of images that have been judged."""
    with tqdm(items, desc="added up", unit="image", delay=1, leave=False) as bar:
        return joined((job.judged(item) for item in bar), len(items))


def add_up(job: Job, items: Sequence[Item]) -> tuple[Evaluation, Callable[[int, int], dict]]:
    """The evaluation of images that have been judged, and a function that gives what results.json has of the
    k-th of them.
    """
    judged = all_judged(job, items)
    labels, targets = labels_and_targets(items)
    evaluation = evaluation_of(judged, job.judges, labels, targets)
    return evaluation, partial(row_of, judged, job.judges, labels, targets)


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
