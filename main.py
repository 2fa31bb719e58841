"""Attacks every image of a folder in the latent space of a diffusion model, so that a classifier fails and a
person sees no change.

    python main.py                                                  # the demo photographs
    python main.py --images_root demo/images --label_path demo/labels.txt --weight_mode fixed
    python main.py --pretrained_diffusion_path Manojb/stable-diffusion-2-base --images_root PHOTOS ...
    accelerate launch --num_processes 8 main.py ...                 # shared out over processes, one GPU each

A finished image is never lost and never attacked twice: after an interruption the same command goes on with
what is missing. It exists to measure and improve the robustness of classifiers. `python main.py --help` lists
the flags, `--help all` all of them.
"""

import diffattack.common.environment  # isort: skip  # noqa: F401

import sys

from diffattack.common.errors import InputError, run_program
from diffattack.common.flags import parse_options
from diffattack.options import Options
from diffattack.runner.attack_images import attack_images
from diffattack.runner.check import check
from diffattack.runner.folder import read_failures
from diffattack.runner.jobs import claim_jobs
from diffattack.runner.judge import judge_all
from diffattack.runner.judge_folder import judge_folder
from diffattack.runner.report import is_left_to_others, report
from diffattack.runner.setup import check_shards, read_experiment


def run(options: Options) -> int:
    """Attacks, judges, adds up and writes; returns the exit code: 1 if an image could not be attacked."""
    part, parts = check_shards(options, [options.weight_mode])
    if options.merge:
        check_merge(options)
        part, parts = 0, 1
    experiment = read_experiment(options)
    selected = experiment.items[: options.limit]
    mine = [item for item in selected if item.index % parts == part]
    (job,) = jobs = claim_jobs(experiment, [options], mine)
    worked_on = 0 if options.merge else attack_images(experiment, jobs, mine)
    finished = job.layout.finished()
    done = [item for item in mine if item.index in finished]
    worked_on += judge_all(experiment, job, done)
    if parts > 1 and is_left_to_others(job, mine, selected, worked_on):
        return 1 if read_failures(job.layout, mine) else 0
    return report(job, selected)


def check_merge(options: Options) -> None:
    """Raises InputError where there is nothing to add up."""
    if options.overwrite:
        raise InputError("--overwrite deletes what --merge would add up; give one of them")
    if not (options.save_dir / "run.json").exists():
        raise InputError(f"--merge: there is no run in {str(options.save_dir)!r}; give its --save_dir")


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(Options, __doc__.split("\n\n")[0], argv)
        return judge_folder(options) if options.is_test else check(options) if options.check else run(options)

    return run_program("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
