"""Draws figures from what a run saved: weights, losses by timestep and layer, attention, and what changed in
the image.

    python utils.py output_fixed                    # its timestep_analysis and report.html, without any model
    python utils.py output_fixed output_uniform     # of each; and both side by side, as compared_*

    from utils import plot_average_loss_per_timestep, read_run
    run = read_run(Path("output_fixed"))
    plot_average_loss_per_timestep({"fixed": run}).savefig("shares.png")

The functions that draw return a matplotlib `Figure`.
"""

import diffattack.common.environment  # isort: skip  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffattack.common.errors import InputError, run_program
from diffattack.data.records import read_run
from diffattack.data.summaries import FIGURE_IMAGES
from diffattack.plotting.draw import draw_folders, draw_runs, save_figures
from diffattack.plotting.figures import (  # one import gives a notebook what it draws with
    plot_average_loss_per_timestep,
    plot_layer_shares,
    plot_loss_per_timestep,
    plot_losses,
    plot_tradeoff,
    plot_weight_curves,
)
from diffattack.plotting.image_figures import plot_attention, plot_contact_sheet, short
from diffattack.plotting.run_page import read_results, write_page
from timestep_weights import named_schedules

__all__ = [
    "plot_attention",
    "plot_average_loss_per_timestep",
    "plot_contact_sheet",
    "plot_layer_shares",
    "plot_loss_per_timestep",
    "plot_losses",
    "plot_tradeoff",
    "plot_weight_curves",
    "read_run",
]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="output folder of main.py, or a mode's folder inside that of compare.py",
    )
    parser.add_argument("--pdf", action="store_true", help="as PDF, too")
    parser.add_argument(
        "--figure_images",
        type=int,
        default=FIGURE_IMAGES,
        metavar="K",
        help="of more images than K, contact sheets and figures of single images show the most visible, the "
        "least visible and some drawn by the run's seed, a third each (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.figure_images < 1:
        parser.error(f"--figure_images is {arguments.figure_images}; expected at least 1")
    return arguments


def draw(arguments: argparse.Namespace) -> int:
    try:
        names = [short(str(folder)) for folder in arguments.runs]
        runs = {
            name if names.count(name) == 1 else f"{k}: {name}": read_run(folder)
            for k, (name, folder) in enumerate(zip(names, arguments.runs), 1)
        }
        options = {"pdf": arguments.pdf, "figure_images": arguments.figure_images}
        draw_folders(runs.values(), named_schedules, **options)
        for run in runs.values():
            if (run.folder / "results.json").is_file():
                write_page(run, read_results(run.folder))
        if len(runs) > 1:
            figures = draw_runs(runs, named_schedules)
            save_figures(figures, arguments.runs[0], "compared_", arguments.pdf)
    except ValueError as error:  # of a folder that is no run, or of what is damaged in it
        raise InputError(str(error)) from error
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_program("utils.py", lambda: draw(arguments), "the figures drawn so far are complete")


if __name__ == "__main__":
    sys.exit(main())
