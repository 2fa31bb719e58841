"""Writes comparison.html, one self-contained page on which a comparison is looked through: its tables, and
every image as each attack changed it.

    write_comparison_page(folder, "Comparison of attacks", runs, comparison.sections, comparison.remarks)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffattack.data.images import read_pair
from diffattack.data.records import ANALYSIS, Run, outcome_of
from diffattack.evaluation.tables import Sections
from diffattack.plotting.image_figures import AMPLIFIED, amplified_difference
from diffattack.plotting.pages import data_url, encode, write_filled

FIGURES = {  # those that are there: what is shown, for those who do not see it, too
    "tradeoff": "Attack success over PSNR, SSIM and L2, a curve for each attack",
    "success_against_visibility": "Attack success over visibility, a point with intervals for each attack",
}
MOST_IMAGES = 50
PICTURES_BUDGET = 12_000_000  # bytes of all pictures, before base64
LARGEST_SHARE = 100_000  # bytes of one picture


def write_comparison_page(
    folder: Path, title: str, runs: Mapping[str, Run], sections: Sections, remarks: Sequence[str]
) -> None:
    """Writes `comparison.html` into the folder of a comparison; runs by the names of their attacks, of which
    the images are shown that all of them have, up to MOST_IMAGES.

    Raises:
        OSError: a picture is missing, or the page cannot be written.
    """
    rows = {name: {row["file"]: row for row in run.rows} for name, run in runs.items()}
    shared = [file for file in next(iter(rows.values())) if all(file in of_run for of_run in rows.values())]
    psnr = {file: np.mean([of_run[file]["psnr"] for of_run in rows.values()]) for file in shared}
    files = most_and_least_visible(psnr)
    pictures = 1 + 2 * len(runs)  # clean, and of each attack the adversarial one and the difference
    budget = pictures * min(LARGEST_SHARE, PICTURES_BUDGET // (pictures * max(1, len(files))))
    paths = {text: folder / ANALYSIS / f"{name}.png" for name, text in FIGURES.items()}
    drawn = {text: path.read_bytes() for text, path in paths.items() if path.is_file()}
    write_filled(
        folder / "comparison.html",
        "comparison_template.html",
        title=title,
        attacks=list(runs),
        sections=sections,
        remarks=remarks,
        amplified=AMPLIFIED,
        count=len(shared),
        figures=[(text, data_url(content, "image/png")) for text, content in drawn.items()],
        images=[describe_image(runs, {name: rows[name][file] for name in runs}, budget) for file in files],
    )


def most_and_least_visible(psnr: Mapping[str, float]) -> list[str]:
    """Of more images than MOST_IMAGES, by their mean PSNR, half of that number from each end, in the order in
    which they come.
    """
    if len(psnr) <= MOST_IMAGES:
        return list(psnr)
    by_visibility = sorted(psnr, key=psnr.get)
    chosen = {*by_visibility[: MOST_IMAGES // 2], *by_visibility[-MOST_IMAGES // 2 :]}
    return [file for file in psnr if file in chosen]


def describe_image(runs: Mapping[str, Run], rows: Mapping[str, dict], budget: int) -> dict:
    """All that the page shows of an image, from its row in each run."""
    pairs = [read_pair(run.layout, rows[name]["index"]) for name, run in runs.items()]
    clean, adversarial = pairs[0][0], [pair[1] for pair in pairs]
    differences = [amplified_difference(*pair) for pair in pairs]
    # flickering shows what compression changes, too, so that these have the larger part
    clean_url, *urls = encode([clean, *adversarial], 2 * budget // 3, lossless=True)
    attacks = [
        {"name": name, "row": row, "outcome": outcome_of(row), "adversarial": url, "difference": difference}
        for (name, row), url, difference in zip(rows.items(), urls, encode(differences, budget // 3))
    ]
    row = next(iter(rows.values()))
    return {"row": row, "side": clean.shape[0], "clean": clean_url, "attacks": attacks}
