"""The record of an image: one schema, its writer and its readers, and what is worked out of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from images import replacing

if TYPE_CHECKING:  # torch takes long to import, and figures are drawn without it
    import torch

    from diff_latent_attack import AttackRecord


def record_path(folder: Path, index: int) -> Path:
    """An image's record is written last: where it is, the image is finished."""
    return folder / f"{index:04d}_record.npz"


def write_record(record: AttackRecord, controller_state: torch.Tensor, row: dict, path: Path) -> None:
    """Saves a record with one array a field, the row of the results and the weights' state after the image;
    `numpy.load` reads it.
    """
    fields = {field.name: np.asarray(getattr(record, field.name)) for field in dataclasses.fields(record)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, **fields, controller_state=controller_state.numpy(), row=np.array(json.dumps(row))
        )


@dataclass
class ImageRecord:
    """What a run saved of one image, besides its pictures; K iterations, N timesteps, L self-attention
    layers.
    """

    path: Path
    row: dict  # of results.json
    timesteps: np.ndarray  # (N,), early to late
    layers: list[str]  # (L,), by place and grid
    weights: np.ndarray  # (K, N)
    layer_losses: np.ndarray  # (K, N, L)
    losses: np.ndarray  # (4, K): LOSSES, before their factors
    confidence: np.ndarray  # (K,), of the true class
    fooled: np.ndarray  # (K,), bool
    class_tokens: list[str]
    class_attention: np.ndarray  # (2, tokens, grid, grid), without the attack and with it
    components: np.ndarray  # (2, 3, h, w), the same

    @property
    def index(self) -> int:
        return self.row["index"]


@dataclass
class Run:
    """An output folder of main.py."""

    folder: Path
    configuration: dict
    records: list[ImageRecord]

    @property
    def timesteps(self) -> list[int]:
        """N, early to late."""
        return self.records[0].timesteps.tolist()

    @property
    def layer_losses(self) -> np.ndarray:
        """`(images, K, N, L)`."""
        return np.stack([record.layer_losses for record in self.records])

    @property
    def factors(self) -> np.ndarray:
        """`(4,)`, of the LOSSES in what was minimised: the unweighted sum of the `L_i` is not part of it, but
        has the same factor as the weighted.
        """
        return np.array(
            [
                self.configuration[f"{name}_loss_weight"]
                for name in ("attack", "self_attn", "self_attn", "cross_attn")
            ]
        )


def read_record(path: Path) -> ImageRecord:
    """Reads what main.py's `write_record` wrote.

    Raises:
        ValueError: the record is of a version that did not save all of it.
    """
    with np.load(path) as saved:
        try:
            alone = {
                name: saved[name][..., 0]
                for name in ("layer_losses", "confidence", "fooled", "class_attention", "components")
            }
            terms = [
                saved["attack_loss"],
                alone["layer_losses"].sum((1, 2))[:, None],
                saved["self_attention_loss"],
                saved["cross_attention_loss"],
            ]
            return ImageRecord(
                path=path,
                row=json.loads(str(saved["row"])),
                timesteps=saved["timesteps"],
                layers=layer_names(saved["layers"].tolist(), saved["grids"].tolist()),
                weights=saved["weights"],
                losses=np.stack([term[:, 0] for term in terms]),
                class_tokens=saved["class_tokens"][0].tolist(),
                **alone,
            )
        except KeyError as error:
            raise ValueError(
                f"{path} is of an earlier version and lacks {error}; run main.py again with --overwrite"
            ) from None


def read_run(folder: Path, indices: Sequence[int] | None = None) -> Run:
    """Reads all that main.py saved of a run, or of the images with these indices.

    Raises:
        ValueError: there is no run in the folder, or one of an earlier version.
    """
    paths = sorted(folder.glob("*_record.npz"), key=lambda path: int(path.name.split("_")[0]))
    if not paths or not (folder / "run.json").is_file():
        raise ValueError(f"no finished image of a run in {str(folder)!r}; give an output folder of main.py")
    return Run(
        folder,
        json.loads((folder / "run.json").read_text()),
        [read_record(path) for path in paths if indices is None or int(path.name.split("_")[0]) in indices],
    )


def layer_names(layers: Sequence[str], grids: Sequence[int]) -> list[str]:
    """Names of attention layers by place and grid, such as "up 28 x 28"; of several with the same, numbered
    in the order in which the UNet runs them.
    """
    names = [f"{layer.split('_')[0]} {grid} x {grid}" for layer, grid in zip(layers, grids)]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:k].count(name) + 1})"
        for k, name in enumerate(names)
    ]


def timestep_shares(layer_losses: np.ndarray) -> np.ndarray:
    """Each timestep's share of the self-attention loss, before weights, summed over iterations and layers:
    `(..., K, N, L)` to `(..., N)`, sum 1.
    """
    return normalised(np.nansum(layer_losses, (-3, -1)))


def layer_shares(layer_losses: np.ndarray) -> np.ndarray:
    """Each layer's share of the self-attention loss, before weights, summed over iterations and timesteps:
    `(..., K, N, L)` to `(..., L)`, sum 1.
    """
    return normalised(np.nansum(layer_losses, (-3, -2)))


def normalised(values: np.ndarray) -> np.ndarray:
    """`(..., M)` over its sum over the last axis; NaN where that is zero, as in the first iteration, in which
    nothing has changed yet.
    """
    total = values.sum(-1, keepdims=True)
    return np.divide(values, total, out=np.full_like(values, np.nan, dtype=np.float64), where=total > 0)
