"""What a command line names, read the same way for every command: images, classes, device, and the attack."""

import functools
import multiprocessing
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.library import OURS, load_attack, parse_attack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers.checks import check_unchanged
from diffattack.classifiers.defences import make_defence, needs_diffusion, split_name, undefended
from diffattack.classifiers.registry import groups_of, load_classifier
from diffattack.common.device import resolve_device, resolve_dtype, set_up
from diffattack.common.errors import InputError, RecordError, note
from diffattack.common.parallel import check_alone, this_process
from diffattack.data.classes import IMAGENET_CLASSES, read_class_names
from diffattack.data.dataset import PRESETS, Item, labels_and_targets, masks_of, read_dataset
from diffattack.data.images import read_image, to_tensor
from diffattack.data.layout import Layout
from diffattack.data.records import read_configuration
from diffattack.diffusion.checks import check_prediction_type
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.diffusion.pipeline import compile_pipeline, load_pipeline
from diffattack.evaluation.warnings import (
    CleanAccuracy,
    check_labels,
    clean_accuracy,
    predict_clean,
    readings,
    warnings_about_outputs,
)
from diffattack.options import Options
from diffattack.runner.folder import (
    check_save_dir,
    content_digests,
    counted,
    file_digest,
    flags_of,
    name_of,
)


@dataclass
class Experiment:
    """All that a command works on, before a network is loaded."""

    options: Options
    class_names: tuple[str, ...]
    items: list[Item]
    device: torch.device
    dtype: torch.dtype  # of the diffusion model
    masks: dict[int, Path]  # by the image's index; empty where there are none
    parts: Sequence[float] = ()  # of each change, that are judged beside the whole
    # of the classifiers that have been loaded, by their names without defences
    identities: dict[str, dict] = field(default_factory=dict)
    loaded: dict[str, torch.nn.Module] = field(default_factory=dict)  # classifiers, by name

    def configuration(self, options: Options) -> dict:
        """All that the files of a run with these options depend on, as run.json holds it; the digest of an
        image's content is in its record.
        """
        file, base = Path(parse_attack(options.attack).source), options.label_base
        own_attack = {options.attack: file_digest(file)} if file.is_file() else {}
        # others judge written pictures, which can be judged again, but for those that were judged on the way
        curve_judges = dict.fromkeys((*options.model_name, *options.judges)) if options.judge_at else ()
        needed = undefended_names((*options.model_name, *curve_judges))
        return flags_of(options, identify=True) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "images": [name_of(item, options) for item in self.items],
            "labels": [counted(item.labels, base) for item in self.items],
            "targets": [None if item.target is None else item.target + base for item in self.items],
            "curve_judges": list(curve_judges),
            "curve_measures": list(options.measures) if options.judge_at else [],
            "curve_groups": groups_of(options.transfer_models) if options.judge_at else {},
            "contents": self.contents | own_attack,
            "classifiers": {name: self.identities[name] for name in needed if name in self.identities},
        }

    def classifier(self, name: str, attacked: bool = False) -> torch.nn.Module:
        """A classifier on the device, loaded once.

        Args:
            attacked: whether it needs a gradient, and its defences their draws in an attack.
        Raises:
            InputError: it cannot be used, or is no longer what it was when it was first loaded, in this
                process or in the one that started it.
        """
        if name in self.loaded and not attacked:
            return self.loaded[name]
        draws = {"attacked": True, "attack_draws": self.options.draws} if attacked else {}
        diffusion = self.diffusion if needs_diffusion([name]) else None
        head, side = self.options.classifier_head, self.options.res
        classifier = load_classifier(name, self.class_names, side, diffusion=diffusion, head=head, **draws)
        ((network,), identity) = undefended_names([name]), undefended(classifier).identity
        check_unchanged(network, self.identities.setdefault(network, identity), identity)
        self.loaded[name] = classifier.to(self.device)
        return self.loaded[name]

    def identity(self, name: str) -> dict:
        """Of a classifier without defences, which is loaded if it has not been."""
        if name not in self.identities:
            self.classifier(name)
        return self.identities[name]

    @functools.cached_property
    def diffusion(self) -> LatentDiffusion | None:
        """The diffusion model, loaded when it is first asked for; None where none is named."""
        options = self.options
        if options.pretrained_diffusion_path is None:
            return None
        pipeline = load_pipeline(
            options.pretrained_diffusion_path, self.device, self.dtype, options.lora, options.prediction_type
        )
        if options.compile:
            compile_pipeline(pipeline)
        return LatentDiffusion(pipeline, self.class_names)

    def __getstate__(self) -> dict:
        """For another process, which loads its own networks."""
        return {k: v for k, v in vars(self).items() if k != "diffusion"} | {"loaded": {}}

    def layout(self, options: Options) -> Layout:
        """Where a run with these options keeps its files."""
        return Layout(options.save_dir, len(self.items))

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
    return IMAGENET_CLASSES if options.captions is None else read_class_names(options.captions)


def read_experiment(options: Options) -> Experiment:
    """Reads what the options name, without loading a network.

    Raises:
        InputError: something named cannot be used.
    """
    check_save_dir(options.save_dir)
    check_images_root(options)
    check_inputs(options)
    class_names = class_names_of(options)
    items = read_dataset(
        options.images_root, options.label_path, class_names, options.label_base, options.target_label
    )
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
    for name in undefended_names(options.transfer_names) if is_first else ():
        experiment.classifier(name)
    # before the diffusion model, which takes longer, except where they need it
    classifiers = [experiment.classifier(name, attacked=True) for name in options.model_name]
    noise = np.random.default_rng(0).integers(0, 256, (2, options.res, options.res, 3), np.uint8)
    for name, classifier in zip(options.model_name, classifiers) if is_first else ():
        for warning in warnings_about_outputs(name, classifier, noise, experiment.device, head):
            note(warning)
    diffusion = experiment.diffusion if needs_pipeline(each) else None
    return [
        DiffAttack(diffusion.pipeline, classifiers, experiment.class_names, one)
        if one.attack == OURS
        else PixelAttack(
            others[one.attack],
            classifiers,
            experiment.class_names,
            budget=one.allowed_change,
            contrast_limit=one.contrast_limit,
            high_pass=one.high_pass,
            colour=one.colour,
            attack_through=one.attack_through,
            draws=one.draws,
            logit_temperature=one.logit_temperature or 1.0,
            seed=one.seed,
            device=experiment.device,
            diffusion=diffusion,
            head=head,
        )
        for one in each
    ]


def needs_pipeline(each: Sequence[Options]) -> bool:
    """Whether the diffusion model is needed, by an attack or by a defence."""
    return any(
        one.attack == OURS
        or needs_diffusion(one.model_name + one.judges)
        or any(make_defence(text).needs_diffusion for text in one.attack_through)
        for one in each
    )


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
    labels, _ = labels_and_targets(experiment.items)
    if not indices:  # none of them can be read, which is reported where they are attacked
        return []
    others = {advice: other[indices] for advice, other in others.items()}
    return [
        clean_accuracy(name, predicted, labels[indices], others, len(names), head)
        for name, predicted in zip(options.model_name, np.stack(predictions, 1))
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
    for attack in [attack for attack in attacks if isinstance(attack, DiffAttack)][:1]:
        check_diffusion_model(experiment, attack, items)


def check_diffusion_model(experiment: Experiment, attack: DiffAttack, items: Sequence[Item]) -> None:
    """Raises InputError where the UNet predicts something else than its scheduler says."""
    for item in items:
        with suppress(OSError):
            picture = to_tensor(read_image(item.path, experiment.options.res))
            check_prediction_type(attack, picture, torch.tensor([item.labels]))
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


def check_inputs(options: Options) -> None:
    """Raises InputError where a file that is read lies in `--save_dir`, where it could be written over."""
    for flag in ("label_path", "captions", "mask_root"):
        path = getattr(options, flag)
        if path is not None and is_within(path, options.save_dir):
            raise InputError(
                f"--{flag}: {str(path)!r} lies in --save_dir, where it could be written over; give another "
                f"--save_dir"
            )


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, whatever links and spellings lead to both."""
    path = path.resolve()
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (path, *path.parents))
