"""What is to be attacked: a job for each run, with its attack, its folder and its judges; `main.py` has one,
`compare.py` one for each mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers.defences import undefended
from diffattack.common.counting import bytes_of
from diffattack.common.distributed import once_all_have_come, this_process
from diffattack.common.parallel import import_ahead, processes_for
from diffattack.data.dataset import Item
from diffattack.data.layout import Layout
from diffattack.data.records import read_state
from diffattack.evaluation.judges import Judges
from diffattack.options import Options
from diffattack.runner.folder import (
    check_folder,
    claim,
    clear_run,
    drop_unusable,
    files_of_run,
    missing_of,
)
from diffattack.runner.judge import PictureFiles, judges_of
from diffattack.runner.setup import Experiment, load_attacks, look_at_clean_images, undefended_names

# by each process of a CPU: reading and compiling all of this takes longer than to attack a picture
NEEDED = (
    "diffattack.runner.attack_images",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_dc",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torchmetrics.functional.image",
)
LIBRARIES = 0.5e9  # bytes of a process that has imported them


@dataclass(frozen=True)
class Job:
    """An attack, and what a run needs to write and judge its images."""

    attack: DiffAttack | PixelAttack | None  # None where all is attacked
    options: Options
    identity: str  # of the run
    files: PictureFiles
    masks: Mapping[int, Path]  # by the image's index; empty where there are none
    judges: Judges
    elsewhere: PictureFiles | None = None  # where the same clean pictures are judged, too

    @property
    def layout(self) -> Layout:
        return self.files.layout

    def is_left(self, item: Item) -> bool:
        """Whether an image is neither finished nor has failed."""
        layout, index = self.layout, item.index
        return not layout.record(index).exists() and not layout.failure(index).exists()

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        """What the attack asks, by the names under which it is counted."""
        networks = {"surrogate": [undefended(classifier) for classifier in self.attack.classifiers]}
        if self.attack.pipeline is not None:
            networks |= {"UNet": [self.attack.pipeline.unet], "decoder": [self.attack.pipeline.vae.decoder]}
        return networks


def claim_jobs(experiment: Experiment, each: Sequence[Options], items: Sequence[Item]) -> list[Job]:
    """Makes the folder of each of these options that of its run, and loads what is needed; deletes there what
    has to be made again of the images, or with `--overwrite` all that a run left.

    Raises:
        InputError: a folder is of another run, or holds files of others; labels are wrong.
    """
    for options in each:
        check_own(experiment, options)
    attacks = load_what_is_needed(experiment, each, items)
    for options in each:  # again, now that it is known what the classifiers are
        check_own(experiment, options)
    is_new = any(one.overwrite or not experiment.layout(one).finished() for one in each)
    if attacks and is_new:
        ours = (attack for attack in attacks if isinstance(attack, DiffAttack))
        look_at_clean_images(experiment, next(ours, attacks[0]), experiment.items[: each[0].limit])
    identities = [claim_folder(experiment, options, items) for options in each]
    attacks = attacks or load_what_is_needed(experiment, each, items)
    jobs = jobs_of(experiment, list(zip(each, identities)), attacks or [None] * len(each))
    for job in jobs if attacks else ():
        job.options.processes = count_processes(job.options, job.attack, len(items))
        restore_weights(job, items)
    return jobs


def load_what_is_needed(
    experiment: Experiment, each: Sequence[Options], items: Sequence[Item]
) -> list[DiffAttack | PixelAttack]:
    """The attacks, where something is to be attacked; else nothing, and of the classifiers it is known what
    they are.
    """
    if each[0].merge or not any(one.overwrite or missing_of(items, experiment.layout(one)) for one in each):
        for name in undefended_names([name for one in each for name in (*one.model_name, *one.judges)]):
            experiment.identity(name)
        return []
    if any(largest_count(one, experiment.device, len(items)) > 1 for one in each):
        import_ahead(NEEDED)
    return load_attacks(experiment, each)


def check_own(experiment: Experiment, options: Options) -> None:
    if not options.overwrite:
        layout = experiment.layout(options)
        own = files_of_run(layout, options.model_name)
        check_folder(layout.folder, experiment.configuration(options), own)


def claim_folder(experiment: Experiment, options: Options, items: Sequence[Item]) -> str:
    """Returns the identity of the run."""
    layout, configuration = experiment.layout(options), experiment.configuration(options)

    def start_over() -> None:
        clear_run(layout.folder)
        claim(layout.folder, configuration, files_of_run(layout, options.model_name))

    if options.overwrite and this_process().world_size > 1:
        once_all_have_come(experiment.device.type == "cuda", start_over)
    elif options.overwrite:
        start_over()
    identity = claim(layout.folder, configuration, files_of_run(layout, options.model_name))
    for place in layout.places:
        place.mkdir(exist_ok=True)
    drop_unusable(layout, items, identity, experiment.masks)
    for item in [] if options.merge else missing_of(items, layout):
        layout.failure(item.index).unlink(missing_ok=True)  # of an earlier start
    return identity


def jobs_of(
    experiment: Experiment,
    runs: Sequence[tuple[Options, str]],
    attacks: Sequence[DiffAttack | PixelAttack | None],
) -> list[Job]:
    """The jobs of options with the identities of their runs; all judges share what they load."""
    loaded: dict[str, torch.nn.Module] = {}
    files = [PictureFiles(experiment.layout(options), options.res) for options, _ in runs]
    jobs = []
    for (options, identity), attack, own in zip(runs, attacks, files):
        loaded |= dict(zip(options.model_name, attack.classifiers)) if attack else {}
        judges = judges_of(experiment, options, attack and attack.diffusion, loaded)
        elsewhere = None if own is files[0] else files[0]
        jobs.append(Job(attack, options, identity, own, experiment.masks, judges, elsewhere))
    return jobs


def restore_weights(job: Job, items: Sequence[Item]) -> None:
    """Sets the learnable weights to what they were after the last image that is finished."""
    done = job.layout.finished([item.index for item in items])
    if done:
        job.attack.controller.load_state(torch.from_numpy(read_state(job.layout.record(max(done)))))


def largest_count(options: Options, device: torch.device, images: int) -> int:
    """How many processes of this machine share out the images, as far as memory allows."""
    if options.weight_mode == "learnable":
        return 1
    if options.processes is not None:
        return min(options.processes, images)
    alone = this_process().world_size > 1 or device.type != "cpu" or (options.batch_size or 1) > 1
    return 1 if alone or options.merge else processes_for(images)


def count_processes(options: Options, attack: DiffAttack | PixelAttack, images: int) -> int:
    """How many processes of this machine share out the images. It does not depend on how many are done, so
    that a run that goes on computes as before.
    """
    largest = largest_count(options, attack.device, images)
    if options.processes is not None or largest == 1:
        return largest
    weights = bytes_of(loaded_networks(attack))
    # Measured at 224 pixels: the small model's activations, and those of Stable Diffusion 2-base's shape,
    # which are 1.2 times its weights.
    activations = max(0.3e9, 1.2 * weights) * (options.res / 224) ** 2
    return processes_for(images, int(LIBRARIES + weights + activations))


def loaded_networks(attack: DiffAttack | PixelAttack) -> list[torch.nn.Module]:
    """Whose weights an attack needs in memory."""
    pipeline = attack.pipeline
    if isinstance(attack, PixelAttack) and not attack.needs_diffusion:  # it is there to judge
        pipeline = None
    parts = [] if pipeline is None else [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    return [*parts, *attack.classifiers]
