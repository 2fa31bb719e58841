"""What is checked of a checkpoint around loading it: safetensors alone, all of its weights, and no others."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
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


def check_weights(source: str, stem: str, part: str = "") -> str | None:
    """Looks at the weights that would be loaded from a folder, or a part of it, before any of them is opened:
    their variant, "fp16" where there is no other. Of those on the hub nothing is known before.

    Raises:
        CheckpointError: there are none, or they are missing, empty or damaged.
    """
    if not Path(source).is_dir():
        stay_offline_if_out_of_reach()
        return None
    for variant, ending in ((None, ""), ("fp16", ".fp16")):
        files = weight_files(Path(source, part), stem, ending)
        for path in files:
            names_in(path)
        if files:
            return variant
    raise CheckpointError(f"there is no {stem}.safetensors; pickles (.bin, .ckpt, .pt) are not loaded")


def weight_files(folder: Path, stem: str, ending: str) -> list[Path]:
    """The files of weights that a loader would take from a folder: one, or those that an index names. What
    else lies there, of other variants, in pickles, or left behind by file managers, is none of them.

    Raises:
        CheckpointError: an index names something else, which would reach a loader of pickles.
    """
    index, names = folder / f"{stem}.safetensors.index{ending}.json", []
    if index.is_file():
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
        told = f"{index.name} is no index of .safetensors files beside it, and of nothing else: {names[:3]}"
        require(bool(names) and is_safe, told)
    missing = [name for name in names if not (folder / name).is_file()]
    require(not missing, f"{index.name} names {missing[:3]}, which are not there")
    whole = folder / f"{stem}{ending}.safetensors"
    return [folder / name for name in names] + [whole] * whole.is_file()


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
