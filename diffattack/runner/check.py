"""What `--check` does: tries all that a command names on the first image, and says what to expect."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.names import OURS
from diffattack.attacks.pixel import PixelAttack
from diffattack.common.counting import memory_peak
from diffattack.common.errors import InputError, NonFiniteLossError
from diffattack.common.parallel import threads_of_each
from diffattack.data.images import to_pixels
from diffattack.data.records import AttackRecord
from diffattack.diffusion.inversion import Inversion
from diffattack.evaluation.clean_check import check_labels
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.predictions import predict
from diffattack.evaluation.tables import table
from diffattack.losses import measured_iterations
from diffattack.options import Options
from diffattack.runner.attack_images import invert, read_picture
from diffattack.runner.folder import name_of
from diffattack.runner.jobs import count_processes
from diffattack.runner.setup import check_diffusion_model, clean_accuracies, load_attacks, read_experiment

CHECKED_ITERATIONS = 5  # of which gradients are measured in some and not in others, whatever the options


def check(options: Options) -> int:
    """Loads all that the command names, inverts the first image, and prints what to expect of the run;
    attacks some iterations of it and writes nothing.
    """
    experiment = read_experiment(options)
    tried = options
    if options.attack == OURS:
        fewer = min(CHECKED_ITERATIONS, options.iterations)
        tried = replace(options, iterations=fewer, judge_at=(), stop_margin=None)
    (attack,) = load_attacks(experiment, [tried])
    items, class_names, device = experiment.items, experiment.class_names, experiment.device
    item, images = items[0], len(items[: options.limit])
    processes = count_processes(options, attack, images)
    if processes > 1:  # as each of them will do it
        torch.set_num_threads(threads_of_each(processes))
    try:
        picture = read_picture(item, experiment.masks, options.res)
    except OSError as error:
        raise InputError(f"--images_root: {error}") from None
    clean = picture.pixels
    accuracies = clean_accuracies(experiment, items[: options.limit], attack.classifiers)
    check_labels([accuracy for accuracy in accuracies if accuracy.doubt], options.trust_labels)
    check_diffusion_model(experiment, attack, items)
    predictions = [
        predict(classifier, clean[None], np.array([item.labels]), device, head=attack.head)[0][0]
        for classifier in attack.classifiers
    ]

    started = time.perf_counter()
    inversion = invert(attack, [picture])
    inverted = time.perf_counter() - started
    moments = [time.perf_counter()]
    try:
        record = attack.attack(inversion, lambda *_: moments.append(time.perf_counter())).record
    except NonFiniteLossError as error:
        raise InputError(
            f"{name_of(item, options)}: {error}; look at the checkpoint and at --dtype"
        ) from None
    moments.append(time.perf_counter())
    attacked = moments[-1] - moments[0]
    if options.attack == OURS:
        attacked = expected_seconds(moments, record.gradient_iterations, attack, options)
    memory = memory_peak(device)
    rows = [
        ["checked", ""],
        ["images", f"{len(items)}, of {len(class_names)} classes"],
        ["first image", f"{name_of(item, options)}: {', '.join(class_names[k] for k in item.labels)}"],
        *(
            [f"{name} says", f"{class_names[prediction['label']]} {prediction['confidence']:.2f}"]
            for name, prediction in zip(options.model_name, predictions)
        ),
        ["clean images", "; ".join(accuracy.described for accuracy in accuracies)],
        *rows_about(attack, inversion, clean, record),
        ["peak memory", f"{memory / 1e9:.1f} GB" + ("" if device.type == "cuda" else " of the process")],
        [
            "time to expect",
            "at most "
            * (options.stop_margin is not None)
            + f"{(inverted + attacked) / processes:.3g} s an image in {processes} "
            f"process{'es' * (processes > 1)} (in each, {inverted:.2g} s inversion, {attacked:.3g} s "
            f"attack); {images * (inverted + attacked) / processes / 60:.2g} min in all",
        ],
    ]
    print("\n".join(table(rows)))
    return 0


def rows_about(
    attack: DiffAttack | PixelAttack, inversion: Inversion, clean: np.ndarray, record: AttackRecord
) -> list[list[str]]:
    """Of the diffusion model, where it is what is attacked with."""
    if isinstance(attack, PixelAttack):
        return [["attack", attack.name.text]]
    return [
        ["attacked timesteps", " ".join(map(str, attack.timesteps.tolist()))],
        ["reconstruction", described_reconstruction(attack, inversion, clean)],
        [f"gradients, iteration {record.gradient_iterations[-1]}", described_gradients(record)],
    ]


def expected_seconds(
    moments: Sequence[float], measured: Sequence[int], attack: DiffAttack, options: Options
) -> float:
    """How long the attack of an image takes with `options`, by one of fewer iterations.

    Args:
        moments: when it began, after each of its iterations, and when it ended.
        measured: those of its iterations in which gradients were measured.
    """
    lasted = {number: later - earlier for number, (earlier, later) in enumerate(pairwise(moments), 1)}
    after, first = lasted.pop(len(lasted)), lasted[1]  # the first waits for the unperturbed run
    longer = [seconds for number, seconds in lasted.items() if number in measured]
    plain = [s for number, s in lasted.items() if number > 1 and number not in measured] or longer
    each = statistics.mean(plain)
    count = len(
        measured_iterations(options.iterations, options.structure_share, attack.controller.follows_gradients)
    )
    start = 0.0 if options.compile else max(0.0, first - each)  # else compiling, once for all images
    whole = start + after + (options.iterations - count) * each
    return whole + count * statistics.mean(longer)


def described_reconstruction(attack: DiffAttack, inversion: Inversion, clean: np.ndarray) -> str:
    """How near the diffusion model comes to the clean image without any attack."""
    text = f"{psnr(clean, to_pixels(attack.reconstruct(inversion)[0])):.1f} dB"
    if inversion.null_embeddings:
        plain = replace(inversion, null_embeddings=[attack.embed([""])[0]] * attack.num_timesteps)
        without = psnr(clean, to_pixels(attack.reconstruct(plain)[0]))
        text += f" with null-text optimisation, {without:.1f} dB without"
    return text + (", which is not seen" if attack.options.composition == "residual" else "")


def described_gradients(record: AttackRecord) -> str:
    """How strong the attention terms are in the last iteration that was measured."""
    shares = 100 * record.gradient_norms[-1, 1:, 0] / record.gradient_norms[-1, 0, 0]
    return "self-attention {:.2g} %, cross-attention {:.2g} % of the attack's".format(*shares.tolist())
