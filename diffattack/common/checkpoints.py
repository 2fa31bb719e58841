"""What is checked of a checkpoint around loading it: safetensors alone, all of its weights, and no others."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from diffattack.common.errors import CheckpointError

# Buffers that versions of transformers and torch write or not; nothing reads them.
HARMLESS = ("position_ids", "num_batches_tracked")


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files of weights that a loader would take from a folder: one, or an index with those that it names.
    What else lies there, of other variants, in pickles, or left behind by file managers, is none of them.
    """
    ending = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{ending}.json"
    single = folder / f"{stem}{ending}.safetensors"
    shards = [folder / name for name in names_of_index(index)] if index.is_file() else []
    return [path for path in (index, single) if path.is_file()] + shards


def names_of_index(path: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        CheckpointError: it is none, or names a file that is no safetensors or lies elsewhere, which would
            reach a loader of pickles.
    """
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is no index of weights ({type(error).__name__})") from None
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path.name} names {name!r}; expected .safetensors files beside it, and nothing else"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.name} names {name!r}, which is not there")
    return sorted(map(str, names))


def check_weights(folder: Path, stem: str, variant: str | None = None) -> None:
    """Looks at the weights that would be loaded from a folder before any of them is opened.

    Raises:
        CheckpointError: there are none, or they are empty, damaged or a Git LFS pointer.
    """
    files = weight_files(folder, stem, variant)
    if not files:
        others = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth")
        )
        raise CheckpointError(
            f"there is no {stem}.safetensors"
            + (f", only {others[0]}, a pickle, which is not loaded" if others else "")
        )
    for path in files:
        if path.suffix == ".safetensors":
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Looks at the header of a safetensors file: 8 bytes with its length, then a JSON that ends before the
    file does.

    Raises:
        CheckpointError: the file is none.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(100)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path.name} is a Git LFS pointer: fetch the file itself with `git lfs pull`")
    header = int.from_bytes(start[:8], "little")
    if size < 10 or header > size - 8 or start[8:9] != b"{":
        raise CheckpointError(f"{path.name} is empty, cut short or no safetensors file")
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(8 + header)[8:])
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged header ({type(error).__name__})") from None
    if 8 + header + end > size:
        raise CheckpointError(f"{path.name} is cut short: it has {size} bytes of {8 + header + end}")


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
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError("the checkpoint " + meaning.format(shown))


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
