"""Reads and writes pictures: inputs as a person sees them, results under the original tool's names, weight curves and image grids.

    python utils.py output_fixed output_uniform     # grid.png in each folder; weights.png, the curves of all, in the first

    from utils import plot_weights
    plot_weights({"fixed": record.weights.numpy()}, record.timesteps.tolist()).savefig("weights.png")
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:  # matplotlib takes half a second to import, and main.py draws nothing
    from matplotlib.figure import Figure

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def read_image(path: Path, size: int) -> np.ndarray:
    """A picture as a person sees it, Lanczos-resized: uint8 `(size, size, 3)`.

    EXIF rotation is applied, transparency is laid over white, and 16-bit greyscale is scaled to 8 bits.

    Raises:
        OSError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on broken files
        raise OSError(f"{path.name} is not a readable image ({error})") from error
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size), Image.LANCZOS))


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """8-bit `(H, W, 3)` or `(B, H, W, 3)` to `(B, 3, H, W)` in [0, 1]; B is 1 for a single picture."""
    return torch.from_numpy(pixels.copy()).view(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float() / 255


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """`(3, H, W)` in [0, 1] to 8-bit `(H, W, 3)`."""
    return (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end, so that no half-written file ever has the final name, whatever happens."""
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_image(array: np.ndarray, path: Path) -> None:
    """Writes uint8 `(H, W, 3)` as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def write_result(folder: Path, index: int, clean: np.ndarray, adversarial: np.ndarray, model_name: str, success: bool) -> None:
    """Writes the five pictures of one image, named as the original DiffAttack names them; both uint8 `(H, W, 3)`."""
    stem = f"{index:04d}"
    outcome = "ATKSuccess" if success else "Fail"
    difference = adversarial.astype(np.float64) - clean
    span = max(np.ptp(difference), 1)
    pictures = {
        f"{stem}_originImage.png": clean,
        f"{stem}_adv_image.png": adversarial,
        f"{stem}_diff_{model_name}_image_{outcome}.png": np.concatenate([clean, adversarial], axis=1),
        f"{stem}_diff_relative.png": ((difference - difference.min()) / span * 255).round().astype(np.uint8),
        f"{stem}_diff_absolute.png": np.abs(difference).astype(np.uint8),
    }
    for name in (f"{stem}_diff_{model_name}_image_ATKSuccess.png", f"{stem}_diff_{model_name}_image_Fail.png"):
        (folder / name).unlink(missing_ok=True)  # an earlier run may have ended the other way
    for name, picture in pictures.items():
        write_image(picture, folder / name)


def image_grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Pictures of equal size, uint8 `(H, W, 3)`, side by side on white."""
    padded = [[np.pad(picture, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for picture in row] for row in rows]
    return np.concatenate([np.concatenate(row, axis=1) for row in padded])


def amplified_difference(clean: np.ndarray, adversarial: np.ndarray, factor: float = 8) -> np.ndarray:
    """The signed difference of two 8-bit pictures, `factor` times, around mid-grey."""
    return (128 + factor * (adversarial.astype(np.float64) - clean)).clip(0, 255).astype(np.uint8)


def plot_weights(runs: Mapping[str, np.ndarray], timesteps: Sequence[int]) -> Figure:
    """Weight of each timestep over iterations, one panel a run.

    Args:
        runs: by name, weights `(iterations, N)` that sum to 1 over N.
        timesteps: the N attacked timesteps, early to late.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(runs), 2.8), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    shades = np.linspace(0.15, 0.85, len(timesteps))
    for panel, (name, weights) in zip(panels, runs.items()):
        for i, t in enumerate(timesteps):
            panel.plot(np.arange(1, len(weights) + 1), weights[:, i], color=colormaps["viridis"](shades[i]), label=f"t = {t}")
        panel.axhline(1 / len(timesteps), color="0.6", linewidth=0.8, linestyle=":")
        panel.set(title=f"timestep weights, {name}", xlabel="iteration", ylim=(0, 1))
    panels[0].set_ylabel("weight")
    panels[-1].legend(fontsize="small", loc="upper right")
    return figure


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep what is freed: returned to the kernel, every large tensor costs page faults again.

    It does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def main(folders: Sequence[str]) -> None:
    """Draws `grid.png` for each run, and the weight curves of all runs, one image after the other."""
    weights, timesteps = {}, []
    for folder in map(Path, folders):
        rows = []
        for path in sorted(folder.glob("*_originImage.png")):
            clean, adversarial = (np.asarray(Image.open(path.with_name(path.name.replace("originImage", kind)))) for kind in ("originImage", "adv_image"))
            rows.append([clean, adversarial, amplified_difference(clean, adversarial)])
        write_image(image_grid(rows), folder / "grid.png")
        records = [np.load(path) for path in sorted(folder.glob("*_record.npz"))]
        weights[folder.name] = np.concatenate([record["weights"] for record in records])
        timesteps = records[0]["timesteps"].tolist()
    plot_weights(weights, timesteps).savefig(Path(folders[0]) / "weights.png", dpi=200)


if __name__ == "__main__":
    main(sys.argv[1:])
