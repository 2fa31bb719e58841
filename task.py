"""What a command line names, read the same way for every command: images, classes, device, and the attack."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from classifiers import load_classifier
from dataset import Item
from diff_latent_attack import DiffAttack
from environment import hide_broken_torchvision
from models import load_pipeline, resolve_device, resolve_dtype, set_up
from options import Options, class_names_of, read_items
from runs import check_save_dir, configuration_of

hide_broken_torchvision()


@dataclass(frozen=True)
class Task:
    """All that a command works on, before a network is loaded."""

    options: Options
    class_names: tuple[str, ...]
    items: list[Item]
    device: torch.device
    dtype: torch.dtype  # of the diffusion model

    def configuration(self, options: Options | None = None) -> dict:
        """What the files of a run depend on, here or with other options."""
        return configuration_of(options or self.options, self.dtype, self.items, self.class_names)


def read_task(options: Options, device: str | None = None) -> Task:
    """Reads what the options name, without loading a network.

    Args:
        device: another than `--device`, as one of several processes has it.
    Raises:
        InputError, DatasetError: something named cannot be used.
    """
    class_names = class_names_of(options)
    items = read_items(options, class_names)
    resolved = resolve_device(device or options.device)
    dtype = resolve_dtype(options.dtype, resolved)
    check_save_dir(options.save_dir)
    return Task(options, class_names, items, resolved, dtype)


def load_attacks(task: Task, each: Sequence[Options]) -> list[DiffAttack]:
    """Loads the networks of a task once, and makes of them an attack with each of these options.

    Transfer classifiers are loaded, too, so that what is wrong with them is said before the attack.
    """
    options = task.options
    torch.manual_seed(options.seed)
    set_up(task.device)
    # of several processes, the first has found and said before what is wrong with them
    transfer = options.transfer_models if multiprocessing.parent_process() is None else ()
    for name in transfer:
        load_classifier(name, task.class_names, options.res)
    classifiers = [
        load_classifier(name, task.class_names, options.res, attacked=True).to(task.device)
        for name in options.model_name
    ]
    pipeline = load_pipeline(options.pretrained_diffusion_path, task.device, task.dtype)
    return [DiffAttack(pipeline, classifiers, task.class_names, one) for one in each]
