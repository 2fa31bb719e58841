"""What `--check` does: tries all that a command names on the first image, and says what to expect."""

import numpy as np

from diff_latent_attack import DiffAttack
from diffattack.common.device import measured
from diffattack.common.errors import InputError, NonFiniteLossError
from diffattack.common.parallel import share_cores
from diffattack.data.images import to_pixels
from diffattack.data.records import AttackRecord
from diffattack.diffusion.inversion import Inversion
from diffattack.evaluation.metrics import psnr
from diffattack.evaluation.predictions import predict
from diffattack.evaluation.tables import table
from diffattack.evaluation.warnings import check_labels
from diffattack.options import Options
from diffattack.runner.attack_images import invert, read_picture
from diffattack.runner.folder import name_of
from diffattack.runner.jobs import Job, count_processes
from diffattack.runner.setup import check_diffusion_model, clean_accuracies, load_attacks, read_experiment


def check(options: Options) -> int:
    """Loads all that the command names, attacks the first image, and prints what to expect of the run; writes
    nothing.
    """
    experiment = read_experiment(options)
    (attack,) = load_attacks(experiment, [options])
    items, class_names, device = experiment.items, experiment.class_names, experiment.device
    item, images = items[0], len(items[: options.limit])
    processes = count_processes(options, device, images)
    if processes > 1:  # as each of them will do it
        share_cores(processes)
    try:
        picture = read_picture(item, experiment.masks, options.res)
    except OSError as error:
        raise InputError(f"--images_root: {error}") from None
    accuracies = clean_accuracies(experiment, items[: options.limit], attack.classifiers)
    check_labels([accuracy for accuracy in accuracies if accuracy.doubt], options.trust_labels)
    rows = [
        ["checked", ""],
        ["images", f"{len(items)}, of {len(class_names)} classes"],
        ["first image", f"{name_of(item, options)}: {', '.join(class_names[k] for k in item.labels)}"],
    ]
    for name, classifier in zip(options.model_name, attack.classifiers):
        labels = np.array([item.labels])
        (predicted,) = predict(classifier, picture.pixels[None], labels, device, head=attack.head)
        rows += [[f"{name} predicts", f"{class_names[predicted['label']]} {predicted['confidence']:.2f}"]]
    rows += [["clean images", "; ".join(accuracy.description for accuracy in accuracies)]]
    if isinstance(attack, DiffAttack):
        check_diffusion_model(experiment, attack, items)
    job = Job(options, experiment.layout(options), None, attack=attack)  # nothing is judged
    inversion, inversion_cost = invert(job, [picture])
    try:
        with measured({}, device) as attack_cost:
            record = attack.attack(inversion).record
    except NonFiniteLossError as error:
        raise InputError(
            f"{name_of(item, options)}: {error}; look at the checkpoint and at --dtype"
        ) from None
    if isinstance(attack, DiffAttack):
        rows += rows_about(attack, inversion, picture.pixels, record)
    cost = inversion_cost + attack_cost
    each = cost.seconds / processes
    rows += [
        ["peak memory", f"{cost.peak_memory / 1e9:.1f} GB"],
        [
            "time to expect",
            f"{each:.3g} s an image in {processes} process{'es' * (processes > 1)} (in each, "
            f"{inversion_cost.seconds:.2g} s inversion, {attack_cost.seconds:.3g} s attack); "
            f"{images * each / 60:.2g} min in all",
        ],
    ]
    print("\n".join(table(rows)))
    return 0


def rows_about(
    attack: DiffAttack, inversion: Inversion, clean: np.ndarray, record: AttackRecord
) -> list[list[str]]:
    """How near the diffusion model comes to the clean image without any attack, and how strong the attention
    terms are in the last iteration that was measured.
    """
    unseen = ", which is not seen" if attack.options.composition == "residual" else ""
    shares = 100 * record.gradient_norms[-1, 1:, 0] / record.gradient_norms[-1, 0, 0]
    strength = "self-attention {:.2g} %, cross-attention {:.2g} % of the attack's".format(*shares.tolist())
    return [
        ["attacked timesteps", " ".join(map(str, attack.timesteps.tolist()))],
        ["reconstruction", f"{psnr(clean, to_pixels(attack.reconstruct(inversion)[0])):.1f} dB{unseen}"],
        [f"gradients, iteration {record.gradient_iterations[-1]}", strength],
    ]
