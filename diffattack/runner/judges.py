"""Judges the written pictures of images and keeps what is said of each where it is written: the process that
attacked an image does, or several share out what is still to be judged; then all of it is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from diffattack.classifiers.defences import needs_diffusion, split_name, undefended
from diffattack.classifiers.identity import check_unchanged
from diffattack.classifiers.registry import load_classifier
from diffattack.common.devices import set_up
from diffattack.common.environment import mend_torchvision
from diffattack.common.errors import RecordError, note
from diffattack.common.progress import progress
from diffattack.common.workers import import_ahead, run_in_processes, tell_parent
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import Pictures, read_image
from diffattack.data.layout import Layout
from diffattack.data.records import read_said, update_said, write_said
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.by_image import IN_COLUMNS, Asked, Judges, Said, judge, lacking
from diffattack.evaluation.evaluate import Evaluation, add_up
from diffattack.evaluation.gathered import Gathered
from diffattack.evaluation.quality import FeatureNetwork, feature_network
from diffattack.options import Options
from diffattack.runner.folder import diffusion_digest, file_digest, pictures_of
from diffattack.runner.processes import NEEDED
from diffattack.runner.task import Task

CHUNK = 16  # images that are judged together, and again if the process dies meanwhile


class Store(Protocol):
    """Where the pictures of images are, and what has been said of them."""

    folder: Path  # that may be written to

    def read(self, item: Item) -> Said: ...

    def write(self, item: Item, said: Said) -> None: ...

    def pictures(self, item: Item) -> list[Path]:
        """Clean, adversarial and, where it was written, reconstructed."""


@dataclass(frozen=True)
class RecordStore:
    """The records of a run, with its pictures beside them."""

    layout: Layout

    @property
    def folder(self) -> Path:
        return self.layout.folder

    def read(self, item: Item) -> Said:
        return Said(*read_said(self.layout.record(item.index)))

    def write(self, item: Item, said: Said) -> None:
        update_said(self.layout.record(item.index), said.row, said.features, said.logits)

    def pictures(self, item: Item) -> list[Path]:
        kinds = pictures_of(self.read(item).row)
        return [self.layout.file(item.index, f"{kind}.png") for kind in kinds]


@dataclass(frozen=True)
class FileStore:
    """Pictures of any output folder, and files of what is said of them in a folder of their own; what was
    said of other pictures, for other labels or with another head than now is forgotten.
    """

    layout: Layout  # of what is said
    paths: dict[int, tuple[Path, ...]]  # of pictures, by the image's index
    head: str  # with which they are judged

    @property
    def folder(self) -> Path:
        return self.layout.folder

    def read(self, item: Item) -> Said:
        path = self.layout.file(item.index, "judged.npz")
        said = Said(*read_said(path)) if path.exists() else Said({})
        digests = [file_digest(picture) for picture in self.pictures(item)]
        return said.of_pictures(digests, [*item.labels, item.target], self.head)

    def write(self, item: Item, said: Said) -> None:
        path = self.layout.file(item.index, "judged.npz")
        write_said(path, said.row, said.features, said.logits)

    def pictures(self, item: Item) -> list[Path]:
        return list(self.paths[item.index])


@dataclass(frozen=True)
class Judging:
    """All that judging needs to know, in any process."""

    options: Options
    asked: Asked
    store: Store
    size: int  # pixels of a picture's side
    device: torch.device
    dtype: torch.dtype  # of the diffusion model, which some defences need
    network: FeatureNetwork
    # where the same clean pictures may have been judged before, as of another attack of a comparison
    elsewhere: Store | None = None
    diffusion: LatentDiffusion | None = field(default=None, compare=False)

    def judges(self, given: dict[str, torch.nn.Module] | None = None) -> Judges:
        """The classifiers, of which some may be loaded already."""
        return Judges(given or {}, self.load, self.device)

    def load(self, name: str) -> torch.nn.Module:
        """A classifier, on the device.

        Raises:
            InputError: it is not the one that is asked for, since it has changed meanwhile.
        """
        names, head = self.asked.class_names, self.asked.head
        loaded = load_classifier(name, names, self.size, diffusion=self.model, head=head)
        network = split_name(name)[0]
        found = undefended(loaded).identity
        check_unchanged(network, self.asked.identities.get(network, found), found)
        return loaded.to(self.device)

    @cached_property
    def model(self) -> LatentDiffusion | None:
        """The diffusion model, where it is needed and not given."""
        path = self.options.pretrained_diffusion_path
        if self.diffusion is not None or not needs_diffusion(self.asked.classifiers) or path is None:
            return self.diffusion
        lora, prediction_type = self.options.lora, self.options.prediction_type
        pipeline = load_pipeline(path, self.device, self.dtype, lora, prediction_type)
        return LatentDiffusion(pipeline, self.asked.class_names)

    def unjudged(self, items: Sequence[Item]) -> list[Item]:
        """Those of which something has not been said."""
        with progress(items, desc="looked at", unit="image") as bar:
            return [item for item in bar if lacking(self.store.read(item), self.asked, self.network.name)]

    def read_pictures(self, items: Sequence[Item]) -> Pictures:
        paths = [self.store.pictures(item) for item in items]
        sides = [np.stack([read_image(path, self.size) for path in side]) for side in zip(*paths)]
        labels, targets = labels_and_targets(items)
        return Pictures(sides[0], sides[1], labels, sides[2] if len(sides) > 2 else None, targets)

    def judge(self, items: Sequence[Item], judges: Judges, done: Callable[[int], object]) -> None:
        """Says of each image what is lacking; `done` is told of how many."""
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            said = [self.store.read(item) for item in chunk]
            if any(lacking(one, self.asked, self.network.name) for one in said):
                pictures = self.read_pictures(chunk)
                other = [self.said_elsewhere(item) for item in chunk]
                found = judge(said, pictures, self.asked, judges, self.network, other)
                for item, one in zip(chunk, found):
                    self.store.write(item, one)
            done(len(chunk))

    def said_elsewhere(self, item: Item) -> Said | None:
        try:
            return None if self.elsewhere is None else self.elsewhere.read(item)
        except RecordError:
            return None  # not attacked there

    def for_a_process(self) -> Judging:
        """The same without networks that are loaded."""
        return replace(self, diffusion=None, network=FeatureNetwork(self.network.name))

    def gather(self, items: Sequence[Item]) -> tuple[Gathered, list[dict]]:
        """What has been said of images in columns, and what else their rows say."""
        gathered, rows = Gathered(self.asked, len(items), self.store.folder), []
        with progress(items, desc="added up", unit="image") as bar:
            for item in bar:
                said = self.store.read(item)
                gathered.add(said)
                rows.append({key: value for key, value in said.row.items() if key not in IN_COLUMNS})
        return gathered, rows

    def evaluate(self, items: Sequence[Item]) -> tuple[Evaluation, list[dict]]:
        """The evaluation of images of which all has been said, and what else their rows say."""
        gathered, rows = self.gather(items)
        labels, targets = labels_and_targets(items)
        evaluation = add_up(gathered, labels, targets, self.network, self.options.fid_reference)
        return evaluation, rows


def judging_of(
    task: Task, options: Options, elsewhere: Layout | None = None, diffusion: LatentDiffusion | None = None
) -> Judging:
    """How the images of a run with these options are judged.

    Args:
        elsewhere: a run on the same images, whose judgement of the clean ones is taken.
        diffusion: the diffusion model, if it is loaded.
    """
    return Judging(
        options,
        asked_of(options, task.class_names, task.identities),
        RecordStore(task.layout(options)),
        options.res,
        task.device,
        task.dtype,
        feature_network(options.model_name),
        elsewhere and RecordStore(elsewhere),
        diffusion,
    )


def asked_of(
    options: Options, class_names: Sequence[str], identities: Mapping[str, dict] | None = None
) -> Asked:
    """What these options ask of each image, of classifiers with these identities."""
    path, is_run = options.pretrained_diffusion_path, needs_diffusion(options.model_name + options.judges)
    return Asked(
        options.model_name,
        options.judges,
        class_names,
        options.label_base,
        identities or {},
        diffusion_digest(options) if path and is_run else "",
        options.judge_draws,
        options.classifier_head,
    )


@contextmanager
def judged_bar(images: int) -> Iterator[Callable[[int], object]]:
    """Gives what is to be told of each image that has been judged."""
    with progress(total=images, desc="judged", unit="image") as bar:
        yield bar.update


def judge_all(
    judging: Judging, items: Sequence[Item], given: dict[str, torch.nn.Module], processes: int
) -> None:
    """Judges what is lacking of images, in several processes if there are to be; what one leaves undone,
    because it was killed, is done here.
    """
    left = judging.unjudged(items)
    if not left:
        return
    with judged_bar(len(left)) as done:
        if processes > 1 and len(left) > CHUNK:
            import_ahead(NEEDED)
            parts = [(judging.for_a_process(), left[k::processes]) for k in range(processes)]
            if run_in_processes(judge_part, parts, told=done):
                note("a process that judged was killed, perhaps for want of memory; going on in this one")
            left = judging.unjudged(left)
        judging.judge(left, judging.judges(given), done)


def judge_part(judging: Judging, items: Sequence[Item]) -> None:
    """What one of several processes does."""
    mend_torchvision()
    set_up(judging.device)
    judging.judge(items, judging.judges(), tell_parent)
