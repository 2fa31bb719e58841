"""What ends a run: the tables on the screen, results.json, images.csv, log.txt, the figures and the page."""

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from diffattack.common.parallel import this_process
from diffattack.data.dataset import Item
from diffattack.data.images import replacing
from diffattack.data.records import ANALYSIS, Run, finite, json_text, read_record, read_run
from diffattack.data.summaries import timestep_rows
from diffattack.evaluation.comparison import lines_about_weights, weight_movement
from diffattack.evaluation.curves import Points, curve_dicts, curve_points
from diffattack.evaluation.results import Evaluation
from diffattack.evaluation.tables import cost_dict, cost_rows, figure_rows, in_words, table
from diffattack.evaluation.warnings import warnings_about_rounding
from diffattack.plotting.run_page import read_results, write_page
from diffattack.runner.folder import provenance, read_failures, unattempted
from diffattack.runner.jobs import Job
from diffattack.runner.judge import add_up, unjudged
from timestep_weights import named_schedules

SHOWN = 50  # images in the table on the screen
FELT_ABOVE = 0.01  # of the attack's gradient


def report(job: Job, selected: Sequence[Item]) -> int:
    """Adds up what is in the folder of a run, all of which has been judged, writes and prints it, and draws
    the figures and the page of a run that is complete; returns the exit code. Of two processes that end at
    the same moment one does.
    """
    failures, left = read_failures(job.layout, selected), unattempted(selected, job.layout)
    finished = job.layout.finished()  # after what is left, so that nothing can be in neither
    done = [item for item in selected if item.index in finished]
    with open(job.layout.folder / "run.json") as lock:
        if is_locked(lock):
            run, _ = write_run(job, done, failures, len(left))
            show_run(job, run, bool(left))
    return 1 if failures else 0


def is_locked(file: IO) -> bool:
    """Whether this process has the lock on a file, until it closes it; on systems without locks, always."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def show_run(job: Job, run: Run | None, is_partial: bool) -> None:
    """Prints what was added up, and draws it where nothing is left."""
    options, folder = job.options, job.layout.folder
    print("\n" + (folder / "log.txt").read_text(encoding="utf-8").split("\n\n", 1)[1].rstrip())
    if run and not is_partial and options.figures != "none":
        from diffattack.plotting.draw import draw_folders  # it takes matplotlib

        each, images = options.figures == "all", options.figure_images
        draw_folders([run], named_schedules, each, figure_images=images)
        write_page(run, read_results(folder))
        print(f"\nfigures in {folder / ANALYSIS}, and a page to look through in {folder / 'report.html'}")


def write_run(
    job: Job, done: Sequence[Item], failures: Sequence[str] = (), left: int = 0
) -> tuple[Run, Evaluation] | tuple[None, None]:
    """Adds up images that are finished and judged, and writes results.json, images.csv and log.txt; returns
    the run, whose records it has read, and the evaluation, None where no image was attacked.

    Args:
        failures: why others could not be attacked.
        left: how many are still to be attacked.
    """
    options, layout = job.options, job.layout
    evaluation, run, rows, points = None, None, [], {}
    if done:
        run = read_run(layout.folder, {item.index for item in done})
        evaluation, found = add_up(job, done)
        rows = [without_files(read_record(layout.record(item.index)).row) for item in done]
        for key in ("first_fooled", "distance_then"):
            for row, value in zip(rows, getattr(run.summary, key).tolist()):
                row[key] = value
        evaluation.warnings.extend(warnings_about_rounding(rows))
        points = curve_points(run)
    weights = weights_at_the_end(run)
    lines = [summarise(rows, evaluation, failures, weights.tolist())]
    if run:
        lines += lines_about(run, rows, points)
        if run.timesteps:
            lines += lines_about_weights(weight_movement(run, weights), run)
    if left:
        lines.append(f"still to be attacked: {left} images, by the same command or its other shards")
    results = {
        **(evaluation.as_dict() | {"tables": evaluation.tables()} if evaluation else {}),
        "not_attacked": list(failures),
        "weights_at_the_end": weights.tolist(),
        "gradient_shares": gradient_dict(run) if run else None,
        "curve": curve_dicts(points) if points else None,
        **(means_of(rows) if rows else {}),
        **provenance(options, job.judges.device),
    }

    def all_rows() -> Iterator[dict]:
        return (row | found(options.label_base, k) for k, row in enumerate(rows))

    names = ("results.json", "images.csv", "log.txt")
    write_reports(options.save_dir, names, results, all_rows, "\n".join(lines), evaluation)
    return run, evaluation


def without_files(row: dict) -> dict:
    """A row without the digests of its pictures, which a run alone needs."""
    return {key: value for key, value in row.items() if key != "files"}


def is_left_to_others(job: Job, mine: Sequence[Item], selected: Sequence[Item], worked_on: int) -> bool:
    """Whether other processes of the run have images to attack or to judge, of which the last adds up; then
    it prints how many. Where there was nothing to do, the first of a launcher's processes adds up.

    Args:
        worked_on: how many images this process has attacked or judged.
    """
    left = unattempted(selected, job.layout)
    finished = job.layout.finished() - {item.index for item in mine}  # after what is left
    others = unjudged(job, [item for item in selected if item.index in finished])
    if left or others:
        lines = [f"not attacked: {failure}" for failure in read_failures(job.layout, mine)]
        lines.append(
            f"still to be attacked: {len(left)} images, to be judged: {len(others)}, by others of this run, "
            f"of which the last adds up; the same command with --merge adds up what there is"
        )
        print("\n".join(lines))
    return bool(left or others) or (worked_on == 0 and this_process().rank > 0)


def means_of(rows: Sequence[dict]) -> dict[str, object]:
    changed = [row["psnr"] for row in rows if math.isfinite(row["psnr"])]
    return {
        "mean_seconds": float(np.mean([row["seconds"] for row in rows])),
        "costs": cost_dict(rows),
        "mean_psnr": float(np.mean(changed)) if changed else None,
        "changed": len(changed),
    }


def write_reports(
    folder: Path,
    names: tuple[str, str, str],
    results: dict,
    rows: Callable[[], Iterable[dict]],
    text: str,
    evaluation: Evaluation | None,
) -> None:
    """Writes what there is to tell at the end: JSON with a list `images` at its end, of which each
    is on a line of its own, images.csv, and the text.

    Args:
        names: of the JSON, the table and the text.
        rows: gives what the JSON has of each image, one at a time.
        evaluation: None where there are no images.
    """
    start = json_text(results, indent=2).removesuffix("\n}")
    # file names need not be Unicode
    text_file = partial(open, mode="w", encoding="utf-8", errors="backslashreplace")
    with replacing(folder / names[0]) as temporary, text_file(temporary) as file:
        file.write(f'{start},\n  "images": [')
        for k, row in enumerate(rows()):
            file.write(f"{',' * (k > 0)}\n    {json_text(row)}")
        file.write("\n  ]\n}\n")
    if evaluation is not None:
        with replacing(folder / names[1]) as temporary, text_file(temporary) as file:
            csv.writer(file, lineterminator="\n").writerows(image_table(evaluation, rows()))
    command = "python main.py " + " ".join(sys.argv[1:])
    write_texts(folder, {names[2]: f"{command}\n\n{text}"})


def image_table(evaluation: Evaluation, rows: Iterable[dict]) -> Iterator[list]:
    """images.csv: a row an image; of each classifier the label that it predicts, how sure it is, and whether
    it is fooled, which is empty where it was wrong before; of each measure the value; and what it took.
    """
    names = [result.name for result in evaluation.classifiers]
    measures = [name for name, quality in evaluation.quality.items() if quality.by_image is not None]
    of_classifiers = [f"{what} {name}" for name in names for what in ("predicted", "confidence", "fooled")]
    of_attack = {
        "first_fooled": "first fooled in iteration",
        "distance_then": "L2 then",
        "seconds": "seconds",
    }
    yield ["file", "label", "class", "target", *of_classifiers, *measures, *of_attack.values()]
    counted = [result.counts[None]["success"] for result in evaluation.classifiers]
    for k, row in enumerate(rows):
        label = " ".join(map(str, row["label"])) if isinstance(row["label"], list) else row["label"]
        cells = [row["file"], label, row["class"], row.get("target")]
        for name, (right, fooled) in zip(names, counted):
            after = row["predictions"][name]["after"]
            cells += [after["label"], after["confidence"], int(fooled[k]) if right[k] else None]
        cells += [*(row["quality"][name] for name in measures), *(row.get(name) for name in of_attack)]
        yield [finite(cell) for cell in cells]


def write_texts(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            # file names need not be Unicode
            temporary.write_text(content.rstrip() + "\n", encoding="utf-8", errors="backslashreplace")


def summarise(
    rows: list[dict], evaluation: Evaluation | None, failures: Sequence[str], weights: list[float]
) -> str:
    """The aligned tables that end a run."""
    shown = rows[:SHOWN]
    lines = table(
        [["image", "true class", "before", "after", "success", "PSNR dB", "s"]]
        + [
            [
                row["file"],
                row["class"] + (f" -> {row['target_class']}" if "target" in row else ""),
                *(in_words(row[side]) for side in ("before", "after")),
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
        means = means_of(rows)
        psnr, changed = means["mean_psnr"], means["changed"]
        of = "" if changed == len(rows) else f" of the {changed} images that were changed"
        figures = [
            "no image was changed" if psnr is None else f"mean PSNR {psnr:.1f} dB{of}",
            f"mean time {means['mean_seconds']:.1f} s an image",
        ]
        if weights:
            figures.append(f"timestep weights at the end {', '.join(f'{w:.3f}' for w in weights)}")
        lines += ["", *evaluation.lines(), "", ", ".join(figures), *table(cost_rows({"": rows}))]
    lines += [f"not attacked: {failure}" for failure in failures]
    return "\n".join(lines)


def weights_at_the_end(run: Run | None) -> np.ndarray:
    """The weights `(N,)` after the last image; where each image has its own, their mean over the images."""
    if run is None or not run.timesteps:
        return np.zeros(0)
    of_network = run.records[-1].row.get("weights_after")
    return (
        run.summary.weights[:, -1].mean(0, dtype=np.float64) if of_network is None else np.array(of_network)
    )


def lines_about_gradients(run: Run) -> list[str]:
    """How strong the two attention terms are beside the attack's, and whether the weights can have been felt
    at all.
    """
    rows = [["gradient on the latent, % of the attack's", "self-attention", "cross-attention"]]
    known, share = np.isfinite(run.gradient_shares[:, 0]), 0.0  # while images were attacked
    for iteration, shares in zip(np.array(run.gradient_iterations)[known], run.gradient_shares[known]):
        rows.append([f"iteration {iteration}", *(f"{100 * share:.2g}" for share in shares)])
        share, last = shares[0], iteration
    factor = run.configuration["self_attn_loss_weight"]
    if run.configuration["structure_share"] is not None or not 0 < share < FELT_ABOVE:
        return table(rows)
    return [
        *table(rows),
        f"the self-attention term's gradient is {100 * share:.2g} % of the attack's in iteration {last}: its "
        f"weights cannot be felt, and --self_attn_loss_weight {factor * 0.1 / share:.1g} would make it 10 %",
    ]


def gradient_dict(run: Run) -> dict[str, dict[str, float]]:
    """The same for JSON."""
    shares = (dict(zip(("self-attention", "cross-attention"), both)) for both in run.gradient_shares.tolist())
    return dict(zip(map(str, run.gradient_iterations), shares))


def lines_about(run: Run, rows: Sequence[dict], points: Points) -> list[str]:
    """What the records of a run say, and its pictures at several iterations."""
    lines = []
    if run.timesteps:
        lines += [
            "",
            "self-attention loss by timestep, over all layers, before weights",
            *table(timestep_rows(run.summary.structure, run.timesteps)),
            "",
            *lines_about_gradients(run),
        ]
    if points:
        lines += ["", "after so many iterations", *table(figure_rows(curve_dicts(points)))]
    unreached = sum(row.get("margin_reached") is False for row in rows)
    if unreached:
        lines.append(
            f"{unreached} of {len(rows)} images never reached the margin of --stop_margin, and keep "
            f"their last picture"
        )
    return lines
