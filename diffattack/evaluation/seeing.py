"""Three models of how people see a difference, as measures where they are asked for, with
`--measures flip,ssimulacra2,butteraugli`. Each is its package's or program's own, at its defaults; no attack
here was made with them in mind.

    pip install flip-evaluator ssimulacra2      # and butteraugli, which Debian has, for the third
    named_measures(("flip",))["FLIP"](clean, adversarial)         # uint8 (H, W, 3) each
"""

import argparse
import functools
import importlib.util
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffattack.common.errors import note

Measure = Callable[[np.ndarray, np.ndarray], float]  # of 8-bit pictures (H, W, 3), the clean one first


def flip(clean: np.ndarray, other: np.ndarray) -> float:
    """FLIP (Andersson et al., 2020), the mean of its map: 0 for equal pictures, up to 1; of what one sees who
    flips between the pictures 67 pixels a degree away.
    """
    from flip_evaluator import evaluate

    pair = (picture.astype(np.float32) / 255 for picture in (clean, other))
    return evaluate(*pair, "LDR", applyMagma=False)[1]


def ssimulacra2(clean: np.ndarray, other: np.ndarray) -> float:
    """SSIMULACRA 2 (Sneyers, 2023), up to 100 for equal pictures: 90 is not told apart at 1:1 by most, 70 is
    high quality, 50 medium.
    """
    from ssimulacra2 import compute_ssimulacra2

    return compute_ssimulacra2(*map(png, (clean, other)))


def butteraugli(clean: np.ndarray, other: np.ndarray) -> float:
    """Butteraugli (Alakuijala et al., 2017), 0 up: below 1 the pictures are the same to most people."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(2)]
        for path, picture in zip(paths, (clean, other)):
            path.write_bytes(png(picture).getvalue())
        shown = subprocess.run(["butteraugli", *paths], capture_output=True, text=True, check=True)
    return float(shown.stdout)


def png(picture: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    file.seek(0)
    return file


# by the flag's word: its name in tables, and what it needs
MODELS_OF_SEEING: dict[str, tuple[str, Measure, str]] = {
    "flip": ("FLIP", flip, "flip_evaluator"),
    "ssimulacra2": ("SSIMULACRA2", ssimulacra2, "ssimulacra2"),
    "butteraugli": ("Butteraugli", butteraugli, ""),  # a program
}


def measure_names(text: str) -> tuple[str, ...]:
    """The words that a flag lists, separated by commas."""
    words = tuple(filter(None, map(str.strip, text.split(","))))
    if unknown := set(words).difference(MODELS_OF_SEEING):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r}; expected some of {', '.join(MODELS_OF_SEEING)}")
    return words


@functools.cache
def named_measures(words: Sequence[str]) -> dict[str, Measure]:
    """Those of these words that are there, by their names in tables; a note tells what is missing."""
    chosen = {}
    for word in words:
        name, measure, package = MODELS_OF_SEEING[word]
        if importlib.util.find_spec(package) if package else shutil.which(word):
            chosen[name] = measure
        else:
            what = f"the package {package.replace('_', '-')}" if package else f"the program {word}"
            note(f"--measures {word} is left out: {what} is not installed")
    return chosen
