"""What is to be attacked: a job for each run, with its attack, its folder and its judges; `main.py` has one,
`compare.py` one for each mode.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.classifiers.defences import needs_diffusion, undefended
from diffattack.classifiers.registry import groups_of
from diffattack.common.parallel import import_ahead, processes_for, this_process
from diffattack.data.dataset import Item, labels_and_targets
from diffattack.data.images import Pictures, read_image
from diffattack.data.layout import Layout
from diffattack.data.records import read_state
from diffattack.evaluation.judges import Judged, Judges, read_judged
from diffattack.evaluation.metrics import feature_network, names_of_measures
from diffattack.options import Options
from diffattack.runner.folder import (
    WRITTEN,
    check_folder,
    checkpoint_files,
    claim,
    clear_run,
    diffusion_digest,
    drop_unusable,
    file_digest,
    missing_of,
    own_files,
)
from diffattack.runner.setup import (
    Experiment,
    load_attacks,
    look_at_clean_images,
    needs_pipeline,
    undefended_names,
)

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
    """A run: where its files lie, what made the pictures there, and what judges them."""

    options: Options
    layout: Layout
    judges: Judges | None  # None where nothing is judged, or another process loads its own
    identity: str = ""  # of the run
    attack: DiffAttack | PixelAttack | None = None  # None where all is attacked
    masks: Mapping[int, Path] = field(default_factory=dict)  # by the image's index
    paths: Mapping[int, Sequence[Path]] | None = (
        None  # of pictures, by the index; None where the layout knows
    )

    def is_left(self, item: Item) -> bool:
        """Whether an image is neither finished nor has failed."""
        return not any(self.layout.file(item.index, name).exists() for name in ("record.npz", "failed.txt"))

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        """What the attack asks, by the names under which it is counted."""
        networks = {"surrogate": [undefended(classifier) for classifier in self.attack.classifiers]}
        if self.attack.pipeline is not None:
            networks |= {"UNet": [self.attack.pipeline.unet], "decoder": [self.attack.pipeline.vae.decoder]}
        return networks

    def pictures(self, item: Item) -> list[Path]:
        """Clean, adversarial, and reconstructed where that was written."""
        if self.paths is not None:
            return list(self.paths[item.index])
        paths = [self.layout.file(item.index, f"{kind}.png") for kind in WRITTEN]
        return paths if paths[2].is_file() else paths[:2]

    def read(self, items: Sequence[Item]) -> Pictures:
        """Raises OSError where a picture is damaged."""
        paths, size = [self.pictures(item) for item in items], self.options.res
        clean, adversarial, *reconstructed = (
            np.stack([read_image(path, size) for path in side]) for side in zip(*paths)
        )
        labels, targets = labels_and_targets(items)
        return Pictures(clean, adversarial, labels, *(reconstructed or [None]), targets)

    def judged_file(self, item: Item) -> tuple[Path, str]:
        """Where it is kept what was found of an image, and of which pictures, labels and target."""
        of = [[file_digest(path) for path in self.pictures(item)], item.labels, item.target]
        return self.layout.file(item.index, "judged.npz"), json.dumps(of)

    def judged(self, item: Item) -> Judged | None:
        """What these judges have found; None where they have not looked at these pictures."""
        path, key = self.judged_file(item)
        return read_judged(path, self.judges, key)


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
        names_of_measures(options.res, experiment.device, options.measures),
        options.measures,
        groups_of(options.transfer_models),
        experiment.parts,
    )


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
        look_at_clean_images(experiment, attacks, experiment.items[: each[0].limit])
    identities = [claim_folder(experiment, options, items) for options in each]
    attacks = attacks or load_what_is_needed(experiment, each, items)
    jobs = jobs_of(experiment, list(zip(each, identities)), attacks or [None] * len(each))
    for job in jobs if attacks else ():
        done = job.layout.finished([item.index for item in items])
        if done:  # weights that learn are what they were after the last image
            job.attack.controller.load_state(torch.from_numpy(read_state(job.layout.record(max(done)))))
    return jobs


def load_what_is_needed(
    experiment: Experiment, each: Sequence[Options], items: Sequence[Item]
) -> list[DiffAttack | PixelAttack]:
    """The attacks, where something is to be attacked; else nothing, and of the classifiers it is known what
    they are.
    """
    for options in each:
        options.processes = count_processes(options, experiment.device, len(items))
    if each[0].merge or not any(one.overwrite or missing_of(items, experiment.layout(one)) for one in each):
        for name in undefended_names([name for one in each for name in (*one.model_name, *one.judges)]):
            experiment.identity(name)
        return []
    if any(options.processes > 1 for options in each):
        import_ahead(NEEDED)
    return load_attacks(experiment, each)


def check_own(experiment: Experiment, options: Options) -> None:
    if not options.overwrite:
        layout = experiment.layout(options)
        check_folder(layout.folder, experiment.configuration(options), own_files(layout, options.model_name))


def claim_folder(experiment: Experiment, options: Options, items: Sequence[Item]) -> str:
    """Returns the identity of the run."""
    layout = experiment.layout(options)
    if options.overwrite:
        clear_run(layout.folder)
    own = own_files(layout, options.model_name)
    identity = claim(layout.folder, experiment.configuration(options), own)
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
    """The jobs of options with the identities of their runs."""
    return [
        Job(
            options,
            experiment.layout(options),
            judges_of(experiment, options),
            identity,
            attack,
            experiment.masks,
        )
        for (options, identity), attack in zip(runs, attacks)
    ]


def count_processes(options: Options, device: torch.device, images: int) -> int:
    """How many processes of this machine share out the images, as far as memory allows. It does not depend on
    how many are done, so that a run that goes on computes as before.
    """
    if options.weight_mode == "learnable":
        return 1
    if options.processes is not None:
        return min(options.processes, images)
    alone = this_process().world_size > 1 or device.type != "cpu" or (options.batch_size or 1) > 1
    files = checkpoint_files(options)
    if alone or options.merge or not files:  # a model of the hub, of unknown size
        return 1
    weights = sum(path.stat().st_size for path in files) if needs_pipeline([options]) else 0
    # Measured at 224 pixels: the small model's activations, and those of Stable Diffusion 2-base's shape,
    # which are 1.2 times its weights.
    activations = max(0.3e9, 1.2 * weights) * (options.res / 224) ** 2
    return processes_for(images, int(LIBRARIES + weights + activations))
