"""Writes report.html, a page on which a run is looked through: of up to SMALL images one self-contained file.

    python main.py --save_dir output_fixed/      # writes output_fixed/report.html at its end
    python utils.py output_fixed                 # writes it anew, with the figures

That one is filled in from report_template.html; pictures are part of it (plotting/pages.py). Of more images
it is that of plotting/large_page.py. What both show is in report_base.html.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffattack.data.records import ANALYSIS, ImageRecord, Run, read_pair
from diffattack.data.shares import timestep_rows
from diffattack.plotting.charts import charts
from diffattack.plotting.image_figures import AMPLIFIED
from diffattack.plotting.large_page import remove_files_of_large_page, row_shown, write_large_page
from diffattack.plotting.pages import PICTURES_BUDGET, amplified_difference, data_url, encode, write_filled

FIGURES = {  # pooled, in the order of the page: what is shown, for those who do not see it, too
    "average_loss_per_timestep": "Share of each timestep in the self-attention loss, over all layers and at "
    "the first layer, as bars with deviations; a dashed line marks equal shares",
    "layer_shares": "Share of each self-attention layer in the loss of each timestep, as a grid of "
    "percentages",
    "weight_curves": "Weight of each timestep over the iterations of the run, with the named schedules as "
    "reference lines",
    "losses": "The three losses before and after their factors, the gradients of the attention terms in "
    "percent of the attack's, and the confidence in the true class, over iterations",
    "loss_per_timestep": "Self-attention loss of each timestep at the second, middle and last iterations",
    "loss_heatmap": "Self-attention loss by timestep and iteration",
    "tradeoff": "Attack success, of the images that were right before, over PSNR, SSIM and L2, with a point "
    "for each iteration at which pictures were judged",
}
LARGEST_SHARE = 120_000  # bytes of one image's pictures, before base64


SMALL = 50  # images, up to which the page is one file that holds their pictures, too


def write_page(run: Run, results: dict) -> None:
    """Writes `report.html` into the folder of a finished run, from its records, pictures and figures; of more
    than SMALL images, with the folder that plotting/large_page.py describes beside it.

    Args:
        results: of results.json. What it says of each image under "images" is shown of that image, and no
            other images are; without "images", which large runs do without, what the records' rows say.
    Raises:
        OSError: a picture or a figure is missing, or the page cannot be written.
        RecordError: a record cannot be used.
    """
    is_large = len(run.records) > SMALL
    names = [
        name for name in FIGURES if run.timesteps and (name != "tradeoff" or "curve" in run.records[0].row)
    ]
    content = {"name": run.folder.absolute().name, "results": results, "amplified": AMPLIFIED}
    if is_large:
        figures = [
            (name, FIGURES[name], path.as_posix())
            for name in names
            if (run.folder / (path := Path(ANALYSIS, f"{name}.png"))).is_file()
        ]
        write_large_page(run, content | {"figures": figures})
        return
    figures = [
        (name, FIGURES[name], data_url((run.folder / ANALYSIS / f"{name}.png").read_bytes(), "image/png"))
        for name in names
    ]
    shown = shown_images(run, results)
    write_filled(
        run.folder / "report.html",
        "report_template.html",
        **content,
        figures=figures,
        count=len(shown),
        timestep_table=timestep_rows(run.pooled.structure, run.timesteps) if run.timesteps else None,
        images=shown,
    )
    remove_files_of_large_page(run.folder)


def shown_images(run: Run, results: dict) -> list[dict]:
    """What the gallery shows of each image."""
    models = [classifier["model"] for classifier in results.get("classifiers", ())]
    if "images" in results:
        rows = {row["index"]: row for row in results["images"]}
        records = [record for record in run.records if record.index in rows]
    else:
        records = list(run.records)
        rows = {record.index: row_shown(record.row, models) for record in records}
    budget = min(LARGEST_SHARE, PICTURES_BUDGET // max(1, len(records)))
    return [describe_image(run, record, rows[record.index], budget) for record in records]


def read_results(folder: Path, images: bool = False) -> dict:
    """results.json, without what it says of each image unless that is asked for: it is most of the file, and
    is not read where it is written last.

    Raises:
        OSError: it is missing.
        ValueError: it is no JSON.
    """
    lines = []
    with open(folder / "results.json", encoding="utf-8") as file:
        for line in file:
            if line.startswith('  "images": [') and len(lines) > 1 and not images:
                return json.loads("".join(lines).rstrip().rstrip(",") + "}")
            lines.append(line)
    results = json.loads("".join(lines))
    if not images:
        results.pop("images", None)
    return results


def describe_image(run: Run, record: ImageRecord, row: dict, budget: int) -> dict:
    """All that the gallery shows of an image."""
    clean, adversarial = read_pair(run.layout, record.index)
    difference = amplified_difference(clean, adversarial, AMPLIFIED)
    before, after = row["before"], row["after"]
    return {
        "row": row,
        "outcome": record.outcome,
        "drop": before["true_confidence"] - after["true_confidence"],
        "side": clean.shape[0],
        **dict(zip(("clean", "adversarial", "difference"), encode([clean, adversarial, difference], budget))),
        "charts": charts(record),
    }
