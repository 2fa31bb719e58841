"""What a command line names, read the same way for every command: images, classes, device, and the attack."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.library import OURS, load_attack, parse_attack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers.checks import check_unchanged
from diffattack.classifiers.defences import check_defence, needs_diffusion, split_name, undefended
from diffattack.classifiers.registry import load_classifier
from diffattack.common.device import resolve_device, resolve_dtype, set_up
from diffattack.common.distributed import check_alone, this_process
from diffattack.common.errors import InputError, RecordError, note
from diffattack.data.class_names import read_class_names
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.dataset import PRESETS, Item, labels_and_targets, read_dataset
from diffattack.data.images import read_image, to_tensor
from diffattack.data.layout import Layout
from diffattack.data.masks import masks_of
from diffattack.data.records import read_configuration
from diffattack.diffusion.checks import check_prediction_type
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import compile_pipeline, load_pipeline
from diffattack.evaluation.clean_check import (
    CleanAccuracy,
    check_labels,
    clean_accuracy,
    predict_clean,
    readings,
)
from diffattack.evaluation.warnings import warnings_about_outputs
from diffattack.options import Options
from diffattack.runner.folder import (
    check_save_dir,
    configuration_of,
    content_digests,
    file_digest,
    in_brief,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Experiment:
    """All that a command works on, before a network is loaded."""

    options: Options
    class_names: tuple[str, ...]
    items: list[Item]
    device: torch.device
    dtype: torch.dtype  # of the diffusion model
    masks: dict[int, Path]  # by the image's index; empty where there are none
    # of the classifiers that have been loaded, by their names without defences
    identities: dict[str, dict] = field(default_factory=dict)

    def configuration(self, options: Options) -> dict:
        """What the files of a run with these options depend on."""
        file = Path(parse_attack(options.attack).source)
        contents = self.contents | ({options.attack: file_digest(file)} if file.is_file() else {})
        # others judge written pictures, which can be judged again, but for those that were judged on the way
        needed = (*options.model_name, *(options.judges if options.judge_at else ()))
        known = {name: self.identities.get(name) for name in undefended_names(needed)}
        classifiers = {name: identity for name, identity in known.items() if identity}
        return configuration_of(options, self.dtype, self.items, contents, classifiers)

    def load_classifier(self, name: str, **how: object) -> torch.nn.Module:
        """A classifier on the device, with how it is to be used as classifiers/registry.py takes it.

        Raises:
            ClassifierError: it cannot be used.
            InputError: it is no longer what it was when it was first loaded, in this process or in the one
                that started it.
        """
        classifier = load_classifier(name, self.class_names, self.options.res, **how)
        ((network,), found) = undefended_names([name]), undefended(classifier).identity
        check_unchanged(network, self.identities.setdefault(network, found), found)
        return classifier.to(self.device)

    def identity(self, name: str) -> dict:
        """Of a classifier without defences, which is loaded if it has not been."""
        if name not in self.identities:
            self.load_classifier(name, head=self.options.classifier_head)
        return self.identities[name]

    def layout(self, options: Options) -> Layout:
        """Where a run with these options keeps its files."""
        return Layout(options.save_dir, len(self.items))

    def load_pipeline(self) -> StableDiffusionPipeline:
        options = self.options
        pipeline = load_pipeline(
            options.pretrained_diffusion_path, self.device, self.dtype, options.lora, options.prediction_type
        )
        if self.options.compile:
            compile_pipeline(pipeline)
        return pipeline

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Digests of what is compared by content, read once for all that ask."""
        return content_digests(self.options, self.class_names)


def undefended_names(names: Sequence[str]) -> list[str]:
    """The classifiers of these names without their defences, each once."""
    return list(dict.fromkeys(split_name(name)[0] for name in names))


def class_names_of(options: Options) -> tuple[str, ...]:
    """The names of the classes."""
    needed = PRESETS[options.dataset_name].class_names
    if options.captions is None and needed:
        raise InputError(
            f"--dataset_name {options.dataset_name} needs --captions with the path of {needed}, which comes "
            f"with the data set"
        )
    names = IMAGENET_CLASSES if options.captions is None else read_class_names(options.captions)
    if len(names) == 1 and options.classifier_head.threshold is None:
        raise InputError(
            f"--captions: {str(options.captions)!r} names one class, which --head softmax always sees; name "
            f"two, or give --head sigmoid"
        )
    return names


def read_items(options: Options, class_names: Sequence[str]) -> list[Item]:
    """The images of --images_root with their labels and, in a targeted attack, their targets."""
    return read_dataset(
        options.images_root, options.label_path, class_names, options.label_base, options.target_label
    )


def read_experiment(options: Options) -> Experiment:
    """Reads what the options name, without loading a network.

    Raises:
        InputError, DatasetError: something named cannot be used.
    """
    check_save_dir(options.save_dir)
    check_images_root(options)
    class_names = class_names_of(options)
    items = read_items(options, class_names)
    check_inputs(options, [item.path for item in items])
    resolved = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, resolved)
    masks = {} if options.mask_root is None else masks_of(options.mask_root, options.images_root, items)
    return Experiment(options, class_names, items, resolved, dtype, masks)


def load_attacks(experiment: Experiment, each: Sequence[Options]) -> list[DiffAttack | PixelAttack]:
    """Loads the networks of a task once, and makes of them an attack with each of these options.

    Transfer classifiers are loaded, too, so that what is wrong with them is said before the attack.
    """
    options, head = experiment.options, experiment.options.classifier_head
    torch.manual_seed(options.seed)
    set_up(experiment.device)
    others = {
        one.attack: load_attack(parse_attack(one.attack), len(experiment.class_names), one.res)
        for one in each
        if one.attack != OURS
    }
    for name, attack in others.items():
        if options.target_label is not None and not attack.takes_targets:
            raise InputError(f"--attack {name} is not targeted; leave --target_label out")
    # of several processes, the first has found and said before what is wrong with them
    is_first = multiprocessing.parent_process() is None
    for name in undefended_names(options.transfer_models) if is_first else ():
        experiment.load_classifier(name, head=head)
    # before the pipeline, which takes longer, except where they need it
    pipeline = experiment.load_pipeline() if needs_diffusion(options.model_name) else None
    classifiers = [
        experiment.load_classifier(
            name,
            attacked=True,
            diffusion=pipeline and LatentDiffusion(pipeline, experiment.class_names),
            attack_draws=options.draws,
            head=head,
        )
        for name in options.model_name
    ]
    noise = np.random.default_rng(0).integers(0, 256, (2, options.res, options.res, 3), np.uint8)
    for name, classifier in zip(options.model_name, classifiers) if is_first else ():
        for warning in warnings_about_outputs(name, classifier, noise, experiment.device, head):
            note(warning)
    if pipeline is None and needs_pipeline(each):
        pipeline = experiment.load_pipeline()
    diffusion = pipeline and LatentDiffusion(pipeline, experiment.class_names)
    if any(one.attack == OURS for one in each) and is_first:
        say_cut_names(diffusion, experiment.items[: options.limit])
    return [
        DiffAttack(pipeline, classifiers, experiment.class_names, one)
        if one.attack == OURS
        else PixelAttack(
            others[one.attack],
            classifiers,
            experiment.class_names,
            budget=one.allowed_change,
            contrast_limit=one.contrast_limit,
            attack_through=one.attack_through,
            draws=one.draws,
            logit_temperature=one.logit_temperature or 1.0,
            seed=one.seed,
            device=experiment.device,
            diffusion=diffusion,
            others=OtherPictures(experiment.items, options.res),
            head=head,
        )
        for one in each
    ]


def say_cut_names(diffusion: LatentDiffusion, items: Sequence[Item]) -> None:
    """Says of which of the images' classes the text encoder does not take the whole name."""
    labels, _ = labels_and_targets(items)
    prompts = diffusion.prompts(torch.from_numpy(np.unique(labels, axis=0)))
    for name, (tokens, taken, rest) in diffusion.cut(prompts).items():
        note(
            f"the class name {in_brief(name)} has {tokens} tokens and the text encoder takes {taken}; what "
            f"remains of it is {rest!r}; a shorter name in --captions is taken whole"
        )


def needs_pipeline(each: Sequence[Options]) -> bool:
    """Whether the diffusion model is needed, by an attack or by a defence."""
    return any(
        one.attack == OURS
        or needs_diffusion(one.model_name + one.judges)
        or any(check_defence(text)[0].needs_diffusion for text in one.attack_through)
        for one in each
    )


class OtherPictures:
    """Pictures of the same folder for attacks that mix an image with others: always the same for an image,
    whatever is attacked beside it, evenly out of all that show something else.
    """

    def __init__(self, items: Sequence[Item], size: int):
        self.items, self.size, self.read = items, size, functools.lru_cache(64)(read_image)

    def __call__(self, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of labels `(L,)`, up to so many images `(count, 3, H, W)` in [0, 1], and labels `(count,)`."""
        apart = [item for item in self.items if not set(item.labels) & set(labels.tolist())]
        if not apart:
            note("the attack mixes an image with others of other classes, and there are none in the folder")
        chosen = [apart[k * len(apart) // count] for k in range(min(count, len(apart)))]
        images, theirs = [torch.zeros(0, 3, self.size, self.size)], []
        for item in chosen:
            try:
                images.append(to_tensor(self.read(item.path, self.size)))
            except OSError:
                continue  # said where it is attacked itself
            theirs.append(item.labels[0])
        return torch.cat(images), torch.tensor(theirs, dtype=torch.long)


def share_of(items: Sequence[Item], part: int, parts: int) -> list[Item]:
    """The images of this process, of as many parts; it says how many, where a launcher started several."""
    mine, start = [item for item in items if item.index % parts == part], this_process()
    if start.world_size > 1:
        print(
            f"process {start.rank} of {start.world_size}: {len(mine)} of {len(items)} images are its part",
            file=sys.stderr,
        )
    return mine


def check_shards(options: Options, weight_modes: Sequence[str]) -> tuple[int, int]:
    """Which part of the images is this process's, over all machines and processes: part k of n takes the
    images k, k + n, ...

    Raises:
        InputError: --shard is none, or does not go with --overwrite or one of the weight modes.
    """
    process, processes, _ = this_process()
    match = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard is {options.shard!r}; expected K/N with K from 0 to N - 1, such as 0/8")
    shard, shards = int(match[1]), int(match[2])
    if shards == processes == 1 and not os.environ.get("WORLD_SIZE"):
        check_alone()
    if options.overwrite and shards * processes > 1:
        raise InputError(
            "--overwrite with --shard or a launcher would delete what the others have done; empty --save_dir "
            "first"
        )
    if "learnable" in weight_modes and shards * processes * (options.processes or 1) > 1:
        raise InputError(
            "--weight_mode learnable trains one weight network on all images, one after the other; run it "
            "without --shard and in one process"
        )
    return shard * processes + process, shards * processes


# ---------------------------------------------------------------- the clean pictures


def clean_accuracies(
    experiment: Experiment, items: Sequence[Item], classifiers: Sequence[torch.nn.Module]
) -> list[CleanAccuracy]:
    """Of how many clean pictures each surrogate predicts a true class, out of the items that are attacked."""
    options, names, head = experiment.options, experiment.class_names, experiment.options.classifier_head
    predictions, indices = predict_clean(items, classifiers, options.res, experiment.device, head)
    others = readings(experiment.items, names, options.images_root, options.label_path, options.label_base)
    labels = [item.labels for item in experiment.items]
    if not indices:  # none of them can be read, which is reported where they are attacked
        return []
    return [
        clean_accuracy(name, predicted, indices, labels, others, len(names), head)
        for name, predicted in zip(options.model_name, predictions)
    ]


def look_at_clean_images(
    experiment: Experiment, attacks: Sequence[DiffAttack | PixelAttack], items: Sequence[Item]
) -> None:
    """Looks before the attack whether labels are those of the images, and, by the first image that can be
    read, whether the diffusion model is read as it was trained.

    Raises:
        InputError: they are not, or it is not.
    """
    accuracies = clean_accuracies(experiment, items, attacks[0].classifiers)
    check_labels(accuracies, experiment.options.trust_labels)
    for attack in attacks:
        if isinstance(attack, DiffAttack):
            check_diffusion_model(experiment, attack, items)
            return


def check_diffusion_model(experiment: Experiment, attack: DiffAttack, items: Sequence[Item]) -> None:
    """Raises InputError where the UNet predicts something else than its scheduler says."""
    for item in items:
        with suppress(OSError):
            picture = to_tensor(read_image(item.path, experiment.options.res))
            check_prediction_type(attack.diffusion, picture, torch.tensor([item.labels]))
            return


# ---------------------------------------------------------------- inputs


def check_images_root(options: Options) -> None:
    """Raises InputError where the images are a run's results, or where results and images would be mixed."""
    images_root, save_dir = options.images_root, options.save_dir
    with suppress(RecordError):
        if {"images", "model_name", "labels"} <= set(read_configuration(images_root)):
            raise InputError(
                f"--images_root: {str(images_root)!r} is the folder of a run, whose pictures are results; "
                f"give the folder of its images, or --is_test to judge it"
            )
    if is_within(images_root, save_dir) or is_within(save_dir, images_root):
        raise InputError(
            f"--save_dir: {str(save_dir)!r} and --images_root lie within each other, so that results and "
            f"images would be mixed up; give a folder beside it"
        )


def check_inputs(options: Options, images: Iterable[Path]) -> None:
    """Raises InputError where a file that is read lies in `--save_dir`, where it could be written over."""
    # most images are no links themselves
    links = {path for path in images if path.is_symlink()} | {path.parent for path in images}
    named = {"label_path": options.label_path, "captions": options.captions, "mask_root": options.mask_root}
    inputs = [("images_root", path) for path in sorted(links)] + list(named.items())
    for flag, path in inputs:
        if path is not None and is_within(path, options.save_dir):
            raise InputError(
                f"--{flag}: {str(path)!r} lies in --save_dir, where it could be written over; give another "
                f"--save_dir"
            )


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, whatever links and spellings lead to both."""
    path = path.resolve()
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (path, *path.parents))
