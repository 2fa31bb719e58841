"""What ends a run: the tables on the screen, results.json and log.txt, the figures and the page."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack
from diffattack.data.answers import deciding
from diffattack.data.dataset import Item
from diffattack.data.records import ANALYSIS, Run, read_run
from diffattack.data.shares import timestep_rows
from diffattack.evaluation.by_image import row_of_results
from diffattack.evaluation.checks import warnings_about_rounding
from diffattack.evaluation.costs import cost_dict, cost_rows
from diffattack.evaluation.curves import CurvePoint, curve_dicts, curve_points, point_rows
from diffattack.evaluation.evaluate import Evaluation
from diffattack.evaluation.tables import table
from diffattack.evaluation.weights import lines_about_weights, weight_movement
from diffattack.plotting.draw import draw_folders
from diffattack.plotting.report import write_page
from diffattack.runner.checked import Checked
from diffattack.runner.folder import provenance, read_failures, write_results, write_texts
from diffattack.runner.judges import Judging
from timestep_weights import named_schedules

SHOWN = 50  # images in the table on the screen
FELT_ABOVE = 0.01  # of the attack's gradient


def summarise(
    rows: list[dict], evaluation: Evaluation | None, failures: list[str], weights: list[float]
) -> str:
    """The aligned tables that end a run."""
    shown = rows[:SHOWN]
    lines = table(
        [["image", "true class", "before", "", "after", "", "success", "PSNR dB", "s"]]
        + [
            [
                row["file"],
                row["class"] + (f" -> {row['target_class']}" if "target" in row else ""),
                *two_columns(row["before"]),
                *two_columns(row["after"]),
                {True: "yes", False: "no", None: "wrong before"}[row["success"]],
                f"{row['psnr']:.1f}",
                f"{row['seconds']:.0f}",
            ]
            for row in shown
        ]
    )
    if len(shown) < len(rows):
        lines.append(f"and {len(rows) - len(shown)} more images, which results.json and the page have")
    if evaluation is not None:
        lines += [
            "",
            *evaluation.lines(),
            "",
            f"mean PSNR {np.mean([row['psnr'] for row in rows]):.1f} dB, mean time "
            f"{np.mean([row['seconds'] for row in rows]):.1f} s an image"
            + (f", timestep weights at the end {', '.join(f'{w:.3f}' for w in weights)}" if weights else ""),
            *table(cost_rows({"": rows})),
        ]
    lines += [f"not attacked: {failure}" for failure in failures]
    return "\n".join(lines)


def two_columns(said: dict) -> tuple[str, str]:
    """What a classifier says, and how sure it is."""
    name, probability = deciding(said)
    return name, f"{probability:.2f}"


def weights_at_the_end(attack: DiffAttack | PixelAttack, run: Run | None) -> torch.Tensor:
    """The weights `(N,)` after the last image; where each image has its own, their mean over the images."""
    weights = attack.controller.weights()
    if attack.num_timesteps == 0:  # of an attack that has none
        return weights
    if weights.ndim == 1 or run is None:
        return weights.view(attack.num_timesteps, -1).mean(1)
    return torch.from_numpy(run.pooled.weights[:, -1].mean(0, dtype=np.float64))


def gradient_rows(run: Run) -> list[list[str]]:
    """How strong the two attention terms are beside the attack's."""
    return [["gradient on the latent, % of the attack's", "self-attention", "cross-attention"]] + [
        [f"iteration {iteration}", *(f"{100 * share:.2g}" for share in shares)]
        for iteration, shares in zip(run.gradient_iterations, run.gradient_shares)
    ]


def shares_by_iteration(run: Run) -> dict[str, dict[str, float]]:
    """The same for JSON."""
    return {
        str(iteration): {
            name: share if math.isfinite(share) else None
            for name, share in zip(("self-attention", "cross-attention"), shares.tolist())
        }
        for iteration, shares in zip(run.gradient_iterations, run.gradient_shares)
    }


def advice_on_strength(run: Run) -> list[str]:
    """Whether the weights can have been felt at all, in one line if not."""
    measured = run.gradient_shares[:, 0][np.isfinite(run.gradient_shares[:, 0])]  # while images were attacked
    share, factor = measured[-1] if len(measured) else 0.0, run.configuration["self_attn_loss_weight"]
    if run.configuration["structure_share"] is not None or not 0 < share < FELT_ABOVE:
        return []
    needed = factor * 0.1 / share
    return [
        f"the self-attention term's gradient is {100 * share:.2g} % of the attack's in the last iteration: "
        f"its weights cannot be felt, and --self_attn_loss_weight {needed:.1g} would make it 10 %"
    ]


def lines_about(finished: Run, rows: Sequence[dict], points: Sequence[CurvePoint]) -> list[str]:
    """What the records of a run say, and its pictures at several iterations."""
    lines = []
    if finished.timesteps:
        lines += [
            "",
            "self-attention loss by timestep, over all layers, before weights",
            *table(timestep_rows(finished.pooled.structure, finished.timesteps)),
            "",
            *table(gradient_rows(finished)),
            *advice_on_strength(finished),
        ]
    if points:
        lines += ["", "after so many iterations", *table(point_rows(points))]
    unreached = sum(row.get("margin_reached") is False for row in rows)
    if unreached:
        lines.append(
            f"{unreached} of {len(rows)} images never reached the margin of --stop_margin, and keep "
            f"their last picture"
        )
    return lines


def report(
    judging: Judging, selected: Sequence[Item], attack: DiffAttack | PixelAttack, checked: Checked
) -> int:
    """Adds up what is in the folder, writes and prints the tables, and draws the figures and the page of a
    run that is complete; returns the exit code.
    """
    options, layout = judging.options, checked.layout
    failures, finished_ones = read_failures(layout, selected), layout.finished()
    done = [item for item in selected if item.index in finished_ones]
    evaluation, finished, rows, points = None, None, [], []
    if done:
        finished = read_run(layout.folder, finished_ones & {item.index for item in done})
        evaluation, rows = judging.evaluate(done)
        evaluation.warnings.extend(
            warnings_about_rounding(
                [row["file"] for row in rows],
                [row["fooled_as_tensor"] for row in rows],
                [row["fooled"] for row in rows],
            )
        )
    weights = weights_at_the_end(attack, finished)
    left = len(selected) - len(rows) - len(failures)
    lines = [summarise(rows, evaluation, failures, weights.tolist())]
    if finished:
        points = curve_points(rows, finished.configuration)
        lines += lines_about(finished, rows, points)
        if finished.timesteps:
            lines += lines_about_weights(weight_movement(finished, weights.numpy()), finished)
    if left:
        lines.append(f"still to be attacked: {left} images, by the same command or its other shards")
    text = "\n".join(lines)
    results = {
        **(evaluation.as_dict() | {"tables": evaluation.tables()} if evaluation else {}),
        "not_attacked": failures,
        "weights_at_the_end": weights.tolist(),
        "gradient_shares": shares_by_iteration(finished) if finished else None,
        "curve": curve_dicts(points) if points else None,
        "mean_seconds": float(np.mean([row["seconds"] for row in rows])) if rows else None,
        "costs": cost_dict(rows) if rows else None,
        "mean_psnr": float(np.mean([row["psnr"] for row in rows])) if rows else None,
        **provenance(options, judging.device),
    }
    images = (row_of_results(judging.store.read(item).row, judging.asked) for item in done)
    write_report(options.save_dir, "results.json", "log.txt", results, images, text)
    if finished and not left and options.figures != "none":
        draw_folders(
            [finished],
            named_schedules,
            each_image=options.figures == "all",
            anew=False,
            figure_images=options.figure_images,
        )
        write_page(finished, results)
        print(
            f"\nfigures in {options.save_dir / ANALYSIS}, and a page to look through in "
            f"{options.save_dir / 'report.html'}"
        )
    checked.add_finished(done)
    checked.write_reported(selected, options, judging.asked.identities)
    return 1 if failures else 0


def write_report(
    folder: Path, json_name: str, text_name: str, results: dict, images: Iterable[dict], text: str
) -> None:
    """Writes and prints what a run has to say at its end."""
    write_results(folder / json_name, results, images)
    command = "python main.py " + " ".join(sys.argv[1:])
    write_texts(folder, {text_name: f"{command}\n\n{text}"})
    print("\n" + text)
