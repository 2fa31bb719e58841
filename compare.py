"""Compares weight modes, or attacks, on the same images, and says of every difference whether it is more than
chance.

    python compare.py                                       # all four modes on the demo photographs
    python compare.py --modes uniform,fixed,fixed:increasing --images_root PHOTOS --label_path LABELS.txt
    python compare.py --modes uniform,fixed,minimax --sweep structure_share=0,0.1,0.3,1
    python compare.py --attacks diffattack,torchattack:PGD,torchattack:DIFGSM --budget psnr=33

Inversion and null-text optimisation do not depend on the weights; they are done once an image and shared by
all modes. The folder of each mode or attack inside --save_dir is as `main.py` writes it; in a sweep it lies
inside that of its value. A comparison that was interrupted goes on with what is missing. The first mode is
the one that the others are compared with.
"""

import diffattack.common.environment  # isort: skip  # noqa: F401

import sys
from dataclasses import replace
from pathlib import Path

from diffattack.common.errors import run_program
from diffattack.common.flags import parse_options
from diffattack.evaluation.curves import PARTS
from diffattack.runner.attack_images import attack_images
from diffattack.runner.compare import (
    CompareOptions,
    check_options,
    comparison_folders,
    entries,
    report_comparison,
    reports_in,
)
from diffattack.runner.folder import check_folder, claim
from diffattack.runner.jobs import claim_jobs
from diffattack.runner.setup import check_shards, read_experiment


def run(options: CompareOptions) -> int:
    """Checks, attacks in every mode, compares and writes; returns the exit code."""
    check_options(options)
    parts = PARTS if options.attacks and not options.sweep else ()
    experiment = replace(read_experiment(options), parts=parts)
    compared = entries(options)
    each = [entry.options for entry in compared]
    # each mode has as many processes as it may have
    shard, shards = check_shards(replace(options, processes=1), [one.weight_mode for one in each])
    folders = comparison_folders(experiment, options)
    for folder, configuration in folders.items():
        check_folder(folder, configuration, reports_in(folder))
    selected = experiment.items[: options.limit]
    mine = [item for item in selected if item.index % shards == shard]
    jobs = claim_jobs(experiment, each, mine)
    for folder, configuration in folders.items():
        claim(folder, configuration)
    if not options.merge:
        attack_images(experiment, jobs, mine)
    return report_comparison(experiment, options, compared, jobs, selected)


def main(argv: list[str] | None = None) -> int:
    return run_program(
        "compare.py",
        lambda: run(
            parse_options(CompareOptions, __doc__.split("\n\n")[0], argv, save_dir=Path("comparison"))
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
