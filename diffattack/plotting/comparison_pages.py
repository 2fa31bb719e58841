"""Writes the pages of a comparison: comparison.html, on which its tables and every image as each attack
changed it are looked through; and judging.html, on which a person says which of two attacks' pictures looks
more like the original without knowing whose they are, with judging_key.json, which does.

    write_comparison_page(folder, "Comparison of attacks", runs, comparison.sections, comparison.remarks)
    write_judging_page(folder, runs, seed=42)

Each is one file. The page for judging depends on the pictures and the seed alone: with the names of the
attacks exchanged it is the same byte for byte, so that nothing in it can tell them.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from diffattack.data.images import read_pair, replacing
from diffattack.data.records import ANALYSIS, Run, outcome_of
from diffattack.evaluation.other_sources import CHOICES, COLUMNS, KEY
from diffattack.evaluation.tables import Sections
from diffattack.plotting.run_page import amplified_difference, data_url, picture_url, png_url, write_filled

FIGURES = {  # those that are there: what is shown, for those who do not see it, too
    "tradeoff": "Attack success over PSNR, SSIM and L2, a curve for each attack",
    "success_against_visibility": "Attack success over visibility, a point with intervals for each attack",
    "equally_visible": "Three images as each attack changes them, made equally visible",
}
MOST_IMAGES = 50


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
    drawn = {folder / ANALYSIS / f"{name}.png": text for name, text in FIGURES.items()}
    write_filled(
        folder / "comparison.html",
        "comparison_template.html",
        title=title,
        attacks=list(runs),
        sections=sections,
        remarks=remarks,
        count=len(shared),
        figures=[(text, png_url(path)) for path, text in drawn.items() if path.is_file()],
        images=[describe_image(runs, {name: rows[name][file] for name in runs}) for file in files],
    )


def most_and_least_visible(psnr: Mapping[str, float]) -> list[str]:
    """By their mean PSNR up to half of MOST_IMAGES from each end, in the order in which they come."""
    by_visibility = sorted(psnr, key=psnr.get)
    chosen = {*by_visibility[: MOST_IMAGES // 2], *by_visibility[-MOST_IMAGES // 2 :]}
    return [file for file in psnr if file in chosen]


def describe_image(runs: Mapping[str, Run], rows: Mapping[str, dict]) -> dict:
    """All that the page shows of an image, from its row in each run."""
    attacks = []  # flickering would show what compression changes, so that there is no loss in it
    for name, row in rows.items():
        clean, adversarial = read_pair(runs[name].layout, row["index"])
        visibility = f"{row['psnr']:.1f} dB" if np.isfinite(row["psnr"]) else "the same picture"
        shown = {"name": name, "row": row, "outcome": outcome_of(row), "visibility": visibility}
        shown["difference"] = picture_url(amplified_difference(clean, adversarial))
        attacks.append(shown | {"adversarial": picture_url(adversarial, lossless=True)})
    return {
        "row": row,
        "side": clean.shape[0],
        "clean": picture_url(clean, lossless=True),
        "attacks": attacks,
    }


# ---------------------------------------------------------------- the page for judging

MOST_TRIALS = 120  # about a quarter of an hour

# its name, which is random and tells the page's order; what the key says of it; PNGs: clean, left, right
Trial = tuple[str, dict, list[bytes]]


def write_judging_page(folder: Path, runs: Mapping[str, Run], seed: int) -> int:
    """Writes the page and its key; runs by the names of their attacks. Every pair of attacks is a trial on
    each image that both have and on which they differ; where that is more than MOST_TRIALS, on as many
    images as fit, chosen at random.

    Returns:
        how many trials there are; without any, nothing is written.
    Raises:
        OSError: a picture is missing, or the page cannot be written.
    """
    trials = sorted(chosen_trials(runs, seed), key=lambda trial: trial[0])
    if not trials:
        return 0
    page = digest("".join(name for name, _, _ in trials).encode())
    content = {"page": page, "columns": COLUMNS, "choices": CHOICES}
    content["pictures"] = {digest(png): data_url(png, "image/png") for *_, pngs in trials for png in pngs}
    content["trials"] = [[name, *map(digest, pngs)] for name, _, pngs in trials]
    write_filled(folder / "judging.html", "judging_template.html", count=len(trials), content=content)
    key = {"page": page, "seed": seed, "attacks": list(runs), "trials": {name: of for name, of, _ in trials}}
    with replacing(folder / KEY) as temporary:
        temporary.write_text(json.dumps(key, indent=2) + "\n")
    return len(trials)


def chosen_trials(runs: Mapping[str, Run], seed: int) -> list[Trial]:
    """The trials of as many images as fit, image by image at random."""
    rows = {}  # by image, its row in each run that has it
    for name, run in runs.items():
        for row in run.rows:
            rows.setdefault(row["file"], {})[name] = row
    chosen = []
    # the names of images are not in the page, and may tell their order
    for file in sorted(rows, key=lambda file: digest(f"{seed} {file}".encode("utf-8", "surrogateescape"))):
        trials = list(trials_of(rows[file], runs, seed))
        if chosen and len(chosen) + len(trials) > MOST_TRIALS:
            break
        chosen += trials
    return chosen


def trials_of(rows: Mapping[str, dict], runs: Mapping[str, Run], seed: int) -> Iterator[Trial]:
    """The trials of an image, from its row in each run that has it; left and right, and the names, are drawn
    from the seed and the pictures.
    """
    pairs = {name: list(map(png, read_pair(runs[name].layout, row["index"]))) for name, row in rows.items()}
    digests = {name: digest(b"".join(pair)) for name, pair in pairs.items()}
    by_picture = sorted(rows, key=digests.get)  # an order that says nothing of the attacks
    drawn = random.Random(f"{seed} {sorted(digests.values())}")
    for pair in combinations(by_picture, 2):
        left, right = drawn.sample(pair, 2)
        name, row = f"{drawn.getrandbits(64):016x}", rows[left]
        entry = {"image": row["file"], "index": row["index"], "left": left, "right": right}
        if pairs[left] != pairs[right]:
            yield name, entry, [*pairs[left], pairs[right][1]]


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 `(H, W, 3)`, as a PNG of its pixels and nothing else."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
