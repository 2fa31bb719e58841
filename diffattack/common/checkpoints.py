"""What is checked of a checkpoint around loading it: safetensors alone, all of its weights, and no others.
What is raised here is a ValueError, to which the place that loads adds the flag and what to do.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from diffattack.common.errors import one_line

# Buffers that versions of transformers and torch write or not; nothing reads them.
HARMLESS = ("position_ids", "num_batches_tracked")


def require(holds: bool, problem: str) -> None:
    """Raises ValueError where something does not hold."""
    if not holds:
        raise ValueError(problem)


def check_weights(source: str, stem: str, part: str = "") -> str | None:
    """Looks at the weights that a loader would take from a folder, or a part of it, before any of them is
    opened: one file, or those that an index names; what else lies there does not matter. Of those on the hub
    nothing is known before.

    Returns:
        their variant, "fp16" where there is no other.
    Raises:
        ValueError: there are none, or one is missing, damaged or no safetensors file.
    """
    if not Path(source).is_dir():
        stay_offline_if_out_of_reach()
        return None
    folder = Path(source, part)
    for variant, ending in ((None, ""), ("fp16", ".fp16")):
        index, names = folder / f"{stem}.safetensors.index{ending}.json", []
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # others would reach a loader of pickles
        is_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
        require(
            is_safe,
            f"{Path(part, index.name)} names {names[:3]}; expected .safetensors files beside it alone",
        )
        whole = folder / f"{stem}{ending}.safetensors"
        for name in (names := names + [whole.name] * whole.is_file()):
            names_in(folder / name)
        if names:
            return variant
    raise ValueError(f"there is no {Path(part, stem)}.safetensors; pickles (.bin, .ckpt, .pt) are not loaded")


def names_in(path: Path) -> set[str]:
    """The tensors of a safetensors file; ValueError where it is none, or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        where = "/".join(path.parts[-2:])
        raise ValueError(
            f"{where} is no safetensors file, or not whole ({one_line(error)}); if it is a Git LFS pointer, "
            f"fetch the file itself with `git lfs pull`"
        ) from None


def check_loaded(info: Mapping, part: str = "the checkpoint") -> None:
    """Looks at what `from_pretrained(..., output_loading_info=True)` says of a part of a checkpoint.

    Raises:
        ValueError: some weights were not in the checkpoint and so are random, or some of it were not used,
            because it is of another network.
    """
    for key, meaning in (
        ("missing_keys", "has no weights for {}, which would be random"),
        ("mismatched_keys", "has weights of another shape for {}"),
        ("unexpected_keys", "has weights that its network does not know: {}"),
    ):
        names = sorted(str(name) for name in info.get(key) or () if not str(name).endswith(HARMLESS))
        require(not names, f"{part} {meaning.format(', '.join(names[:3]))} ({len(names)} in all)")


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
