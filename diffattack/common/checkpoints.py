"""What is checked of a checkpoint around loading it: safetensors alone, all of its weights, and no others."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from diffattack.common.errors import CheckpointError, one_line

# Buffers that versions of transformers and torch write or not; nothing reads them.
HARMLESS = ("position_ids", "num_batches_tracked")


def require(holds: bool, problem: str) -> None:
    """Raises CheckpointError where something does not hold."""
    if not holds:
        raise CheckpointError(problem)


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files of weights that a loader would take from a folder: one, or an index with those that it names.
    What else lies there, of other variants, in pickles, or left behind by file managers, is none of them.

    Raises:
        CheckpointError: an index names something else, which would reach a loader of pickles.
    """
    ending = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{ending}.json"
    files = [path for path in (index, folder / f"{stem}{ending}.safetensors") if path.is_file()]
    if not index.is_file():
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names, is_safe = [], False
    missing = [name for name in names if not (folder / name).is_file()]
    require(
        is_safe, f"{index.name} is no index of .safetensors files beside it, and of nothing else: {names[:3]}"
    )
    require(not missing, f"{index.name} names {missing[:3]}, which are not there")
    return files + [folder / name for name in names]


def check_weights(folder: Path, stem: str, variant: str | None = None) -> None:
    """Looks at the weights that would be loaded from a folder before any of them is opened.

    Raises:
        CheckpointError: there are none, or they are missing, empty or damaged.
    """
    files = weight_files(folder, stem, variant)
    require(bool(files), f"there is no {stem}.safetensors; pickles (.bin, .ckpt, .pt) are not loaded")
    for path in files:
        if path.suffix == ".safetensors":
            names_in(path)


def names_in(path: Path) -> set[str]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name} is no safetensors file, or not whole ({one_line(error)}); if it is a Git LFS "
            f"pointer, fetch the file itself with `git lfs pull`"
        ) from None


def check_loaded(info: Mapping) -> None:
    """Looks at what `from_pretrained(..., output_loading_info=True)` says.

    Raises:
        CheckpointError: some weights were not in the checkpoint and so are random, or some of it were not
            used, because it is of another network.
    """
    for key, meaning in (
        ("missing_keys", "has no weights for {}, which would be random"),
        ("mismatched_keys", "has weights of another shape for {}"),
        ("unexpected_keys", "has weights that its network does not know: {}"),
    ):
        names = [entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(key) or ()]
        names = sorted(name for name in names if not name.endswith(HARMLESS))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        require(not names, "the checkpoint " + meaning.format(", ".join(names[:3]) + more))


@functools.cache
def stay_offline_if_out_of_reach(seconds: float = 4.0) -> None:
    """Keeps the hub's client to its cache where the hub does not answer in time: it would try for half a
    minute, and say so in a dozen lines, for each file.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds)
    except HTTPError:
        return  # it answered
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
