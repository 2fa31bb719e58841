"""The record of an image: one schema, its writer and its readers, and what is worked out of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from diffattack.common.errors import RecordError, one_line
from diffattack.data.images import replacing
from diffattack.data.layout import Layout, index_of
from diffattack.data.summaries import summary_of

ANALYSIS = "timestep_analysis"  # the folder of a run's figures, inside the run's


# what all judges find of an image's pictures at the iterations of `--judge_at`: evaluation/curves.py
CURVE = ("curve_iterations", "curve_predictions", "curve_measures", "curve_visibility")
# fields of a record that a batch shares, or that are cut otherwise
KEPT_WHOLE = ("timesteps", "layers", "grids", "class_tokens", "gradient_iterations", "weights")


@dataclass
class AttackRecord:
    """What every iteration cost, before the loss weights, and what the attack did to the attention; arrays on
    the CPU.
    """

    timesteps: torch.Tensor  # (N,)
    layers: list[str]  # self-attention layers, in the order in which the UNet runs them
    grids: list[int]  # the side of each layer's map
    class_tokens: list[list[str]]  # of each image's prompt
    gradient_iterations: list[int]  # M of them, counted from 1
    attack_loss: torch.Tensor  # (iterations, B), cross-entropy in nats of the true class, or of the target
    self_attention_loss: torch.Tensor  # (iterations, B), sum_i c_i L_i
    cross_attention_loss: torch.Tensor  # (iterations, B)
    total_loss: torch.Tensor  # (iterations, B), what was minimised
    # (iterations, N), in force in that iteration, summing to 1; (iterations, N, B) where each image of the
    # batch has its own, and of one image always (iterations, N)
    weights: torch.Tensor
    self_attention_factor: torch.Tensor  # (iterations, B), of that loss in the total
    layer_losses: torch.Tensor  # (iterations, N, layers, B)
    # (N, layers, B), mean square of each layer's unperturbed map: with `--layer_norm relative` the losses are
    # what they are with mse, divided by these
    reference_squares: torch.Tensor
    confidence: torch.Tensor  # (iterations, B), probability of the true class
    fooled: torch.Tensor  # (iterations, B), whether every classifier was fooled, as the attack sees it
    distance: torch.Tensor  # (iterations, B), to the clean image, L2 with values in [0, 1]
    # (M, 3, B), norms of the gradients on the latent of the attack, self-attention and cross-attention terms,
    # each with its factor
    gradient_norms: torch.Tensor
    # without the attack and with it, averaged over timesteps, heads and layers:
    # (2, tokens, grid, grid, B), cross-attention to the class tokens; of one image, to as many as it has
    class_attention: torch.Tensor
    # (2, 3, h, w, B), self-attention along its first principal components without the attack
    components: torch.Tensor

    @property
    def timestep_losses(self) -> torch.Tensor:
        """`L_i`, `(iterations, N, B)`: the sum over all self-attention layers."""
        return self.layer_losses.sum(2)

    def of_image(self, k: int) -> AttackRecord:
        """The record of the k-th image of the batch, as a batch of one."""
        cut = {
            field.name: getattr(self, field.name)[..., k : k + 1]
            for field in fields(self)
            if field.name not in KEPT_WHOLE
        }
        cut["class_attention"] = cut["class_attention"][:, : len(self.class_tokens[k])]
        cut["weights"] = self.weights if self.weights.ndim == 2 else self.weights[..., k]
        return replace(self, **cut, class_tokens=[self.class_tokens[k]])


def json_digest(value: object) -> str:
    """A digest of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def json_text(value: object, indent: int | None = None) -> str:
    """Strict JSON: what is not finite is null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: object) -> object:
    """What JSON can hold, of dictionaries, sequences, arrays, dataclasses and numbers."""
    if dataclasses.is_dataclass(value):
        return {field.name: finite(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(
    record: AttackRecord,
    controller_state: torch.Tensor,
    row: dict,
    path: Path,
    identity: str = "",
    curve: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Saves a record with one array a field, the row of the results, the weights' state after the image, the
    identity of the run, and with `--judge_at` the CURVE; `numpy.load` reads it.
    """
    fields = {field.name: np.asarray(getattr(record, field.name)) for field in dataclasses.fields(record)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            **fields,
            **(curve or {}),
            controller_state=controller_state.numpy(),
            row=np.array(json_text(row)),
            run=np.array(identity),
        )


@dataclass
class ImageRecord(AttackRecord):
    """The same of one image, as arrays without the last axis, with what else a run saved of it besides its
    pictures; layers by place and grid, its class tokens alone.
    """

    path: Path
    row: dict  # of results.json
    curve: dict[str, np.ndarray]  # CURVE, where there is one

    @property
    def index(self) -> int:
        return self.row["index"]

    @property
    def losses(self) -> np.ndarray:
        """`(4, iterations)`, before their factors: attack, sums of `L_i` and `c_i L_i`, cross-attention."""
        both = self.self_attention_loss, self.cross_attention_loss
        return np.stack([self.attack_loss, self.layer_losses.sum((1, 2)), *both])


def outcome_of(row: dict) -> str:
    """Of the attack on an image, by its row of results.json, in a few words."""
    return {True: "fooled", False: "not fooled", None: "wrong before"}[row["success"]]


class Records(Sequence[ImageRecord]):
    """The records of a run, each read when it is asked for, so that a run of any size takes the memory of
    one; RecordError where one cannot be used.
    """

    def __init__(self, paths: Sequence[Path], identity: str):
        self.paths, self.identity = list(paths), identity

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int | slice) -> ImageRecord | Records:
        if isinstance(k, slice):
            return Records(self.paths[k], self.identity)
        return read_record(self.paths[k], self.identity)


@dataclass
class Run:
    """An output folder of main.py."""

    folder: Path
    configuration: dict
    records: Sequence[ImageRecord]

    @property
    def layout(self) -> Layout:
        return Layout(self.folder, len(self.configuration["images"]))

    @functools.cached_property
    def timesteps(self) -> list[int]:
        """N, early to late."""
        return self.records[0].timesteps.tolist()

    @functools.cached_property
    def layers(self) -> list[str]:
        """L, by place and grid."""
        return self.records[0].layers

    @functools.cached_property
    def gradient_iterations(self) -> list[int]:
        """M of them, counted from 1, in which gradients were measured."""
        return self.records[0].gradient_iterations

    @functools.cached_property
    def summary(self) -> SimpleNamespace:
        """What all images say together: all records are read, once."""
        return summary_of(self.records)

    @property
    def rows(self) -> Iterator[dict]:
        """Of results.json, with what every classifier predicts; of an image that has not been added up yet,
        and those after it, what the attack left.
        """
        results = self.folder / "results.json"
        lines = results.open(encoding="utf-8") if results.is_file() else iter(())
        added_up = (row_of(line.rstrip(",\n")) for line in lines if line.startswith('    {"index": '))
        for path in self.records.paths:  # in the order of the lines, of which each is an image's
            found = next((row for row in added_up if row["index"] == index_of(path)), None)
            yield found or read_record(path, self.records.identity).row

    @property
    def gradient_shares_by_image(self) -> np.ndarray:
        """`(images, M, 2)`: norms of the self- and cross-attention terms' gradients on the latent over the
        attack's.
        """
        norms = self.summary.gradient_norms  # (images, M, 3)
        with np.errstate(divide="ignore", invalid="ignore"):
            return norms[..., 1:] / norms[..., :1]

    @functools.cached_property
    def gradient_shares(self) -> np.ndarray:
        """`(M, 2)`, the same, median over the images that were still attacked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return np.nanmedian(self.gradient_shares_by_image, 0)

    @property
    def factors(self) -> np.ndarray:
        """`(images, 4, K)`, of the LOSSES in what was minimised: the unweighted sum of the `L_i` is not part
        of it, but has the same factor as the weighted.
        """
        structure = self.summary.self_attention_factor
        attack, cross = (
            np.full_like(structure, self.configuration[f"{name}_loss_weight"])
            for name in ("attack", "cross_attn")
        )
        return np.stack([attack, structure, structure, cross], 1)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `numpy.savez_compressed` wrote, without pickled objects."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_record(path: Path, identity: str | None = None) -> ImageRecord:
    """Reads what `write_record` wrote.

    Args:
        identity: of the run that the record must be of; None takes any.
    Raises:
        RecordError: the record is damaged, of an earlier version, of another image or of another run.
    """
    try:
        saved = read_arrays(path)
        found = {field.name: saved[field.name] for field in fields(AttackRecord)}
        found |= {name: values[..., 0] for name, values in found.items() if name not in KEPT_WHOLE}
        found["layers"] = layer_names(found["layers"].tolist(), found["grids"].tolist())
        found["class_tokens"] = found["class_tokens"][0].tolist()
        found["gradient_iterations"] = found["gradient_iterations"].tolist()
        curve = {name: saved[name] for name in CURVE if name in saved}
        record = ImageRecord(**found, path=path, row=row_of(str(saved["row"])), curve=curve)
        if record.index != index_of(path) or identity not in (None, str(saved["run"])):
            raise ValueError("of another image or of another run than run.json")
    except (
        Exception
    ) as error:  # whatever numpy, zipfile, zlib and json raise on files that are none of theirs
        problem = f"is damaged, of an earlier version or of another run ({one_line(error, 120)})"
        raise RecordError(f"{path} {problem}; delete it, and main.py makes that image again") from None
    return record


def row_of(text: str) -> dict:
    """From JSON, which has no infinity: the PSNR of a picture that did not change."""
    row = json.loads(text)
    return row | {"psnr": math.inf} if row["psnr"] is None else row


def read_state(path: Path) -> np.ndarray:
    """The state of the learnable weights after the image of a record."""
    return np.load(path, allow_pickle=False)["controller_state"]


def read_configuration(folder: Path) -> dict:
    """The run.json of a run.

    Raises:
        RecordError: it is missing or damaged.
    """
    path = folder / "run.json"
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecordError(
            f"{path} cannot be read ({one_line(error, 120)}), so that nothing says what the folder holds; "
            f"put it back or give another folder"
        ) from None


def run_identity(folder: Path) -> str:
    """A digest of the run.json of a folder; RecordError where there is none."""
    try:
        return hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()[:16]
    except OSError as error:
        where = folder / "run.json"
        raise RecordError(f"{where}: {error.strerror}; it says of what run the files are") from None


def read_run(folder: Path, indices: Collection[int] | None = None) -> Run:
    """What main.py saved of a run, or of the images with these indices; records are read as they are asked
    for.

    Raises:
        RecordError: there is no run in the folder, or its run.json cannot be read.
    """
    configuration = read_configuration(folder) if (folder / "run.json").is_file() else {}
    layout = Layout(folder, len(configuration.get("images", ())))
    finished = sorted(layout.finished(indices)) if configuration else ()
    if not finished:
        raise RecordError(f"no finished image of a run in {str(folder)!r}; give an output folder of main.py")
    records = Records([layout.record(index) for index in finished], run_identity(folder))
    return Run(folder, configuration, records)


def layer_names(layers: Sequence[str], grids: Sequence[int]) -> list[str]:
    """Names of attention layers by place and grid, such as "up 28 x 28"; of several with the same, numbered
    in the order in which the UNet runs them.
    """
    names = [f"{layer.split('_')[0]} {grid} x {grid}" for layer, grid in zip(layers, grids)]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:k].count(name) + 1})"
        for k, name in enumerate(names)
    ]
