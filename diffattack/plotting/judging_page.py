"""Writes judging.html, on which a person says which of two attacks' pictures looks more like the original
without knowing whose they are, and judging_key.json, which does.

    write_judging_page(folder, runs, seed=42)

The page depends on the pictures and the seed alone: with the names of the attacks exchanged it is the same
byte for byte, so that nothing in it can tell them. What it saves is read by evaluation/other_sources.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from itertools import combinations, count
from pathlib import Path

import numpy as np
from PIL import Image

from diffattack.data.images import read_pair, replacing
from diffattack.data.records import Run
from diffattack.evaluation.other_sources import CHOICES, COLUMNS, KEY
from diffattack.plotting.pages import data_url, write_filled

MOST_TRIALS = 120  # about a quarter of an hour
PICTURES_BUDGET = 120_000_000  # bytes of all pictures, before base64; nothing is compressed with loss here


# its name, which is random and tells the page's order; what the key says of it; PNGs: clean, left, right
Trial = tuple[str, dict, list[bytes]]


def write_judging_page(folder: Path, runs: Mapping[str, Run], seed: int) -> int:
    """Writes the page and its key; runs by the names of their attacks. Every pair of attacks is a trial on
    each image that both have and on which they differ; where that is more than MOST_TRIALS or
    PICTURES_BUDGET, on as many images as fit, chosen at random.

    Returns:
        how many trials there are; without any, nothing is written.
    Raises:
        OSError: a picture is missing, or the page cannot be written.
    """
    trials = sorted(chosen_trials(runs, seed), key=lambda trial: trial[0])
    if not trials:
        return 0
    files = sorted({file for _, _, pictures in trials for file in pictures}, key=digest)
    places = {file: k for k, file in enumerate(files)}
    page = digest("".join(name for name, _, _ in trials).encode())
    content = {
        "page": page,
        "columns": COLUMNS,
        "choices": CHOICES,
        "pictures": [data_url(file, "image/png") for file in files],
        "trials": [[name, *(places[file] for file in pictures)] for name, _, pictures in trials],
    }
    write_filled(folder / "judging.html", "judging_template.html", count=len(trials), content=content)
    key = {
        "page": page,
        "seed": seed,
        "attacks": list(runs),
        "trials": {name: entry for name, entry, _ in trials},
    }
    with replacing(folder / KEY) as temporary:
        temporary.write_text(json.dumps(key, indent=2) + "\n")
    return len(trials)


def chosen_trials(runs: Mapping[str, Run], seed: int) -> list[Trial]:
    """The trials of as many images as fit, image by image at random."""
    rows = {name: {row["file"]: row for row in run.rows} for name, run in runs.items()}
    files = dict.fromkeys(file for of_run in rows.values() for file in of_run)
    chosen, size = [], 0
    # the names of images are not in the page, and may tell their order
    for file in sorted(files, key=lambda file: digest(f"{seed} {file}".encode("utf-8", "surrogateescape"))):
        of_image = {name: of_run[file] for name, of_run in rows.items() if file in of_run}
        trials = list(trials_of(of_image, runs, seed))
        size += sum(map(len, {picture for _, _, pictures in trials for picture in pictures}))
        if chosen and (len(chosen) + len(trials) > MOST_TRIALS or size > PICTURES_BUDGET):
            break
        chosen += trials
    return chosen


def trials_of(rows: Mapping[str, dict], runs: Mapping[str, Run], seed: int) -> Iterator[Trial]:
    """The trials of an image, from its row in each run that has it; left and right, and the names, are drawn
    from a digest of the seed and the pictures.
    """
    pairs = {
        name: [png(picture) for picture in read_pair(runs[name].layout, row["index"])]
        for name, row in rows.items()
    }
    names = set()
    for first, second in combinations(rows, 2):
        clean, adversarial = pairs[first][0], {name: pairs[name][1] for name in (first, second)}
        low, high = sorted(adversarial, key=lambda name: digest(adversarial[name]))
        if adversarial[low] == adversarial[high]:
            continue
        content = f"{seed} {digest(clean)} {digest(adversarial[low])} {digest(adversarial[high])}"
        # another pair of attacks may have made the same pictures
        possible = (digest(f"{content} {k}".encode()) for k in count())
        name = next(name for name in possible if name not in names)
        names.add(name)
        # the name's bits tell the order of trials, so that this bit is of another digest
        left, right = (low, high) if int(digest(f"side {name}".encode()), 16) % 2 else (high, low)
        row = rows[first]
        entry = {"image": row["file"], "index": row["index"], "left": left, "right": right}
        yield name, entry, [clean, adversarial[left], adversarial[right]]


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 `(H, W, 3)`, as a PNG of its pixels and nothing else."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
