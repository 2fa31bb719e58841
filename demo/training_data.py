"""Stage `data` of demo/train_tiny_diffusion.py: photographs from Debian packages, cut into square crops."""

import math
import re
import shutil
import subprocess
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm
from training_common import DEMO, SIZE, save_array

from diffattack.classifiers.registry import load_classifier
from diffattack.data.images import read_image, write_image

PACKAGES = (
    "plasma-workspace-wallpapers",
    "gnome-backgrounds",
    "mate-backgrounds",
    "ukui-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "opencv-doc",
    "scratch",
    "tuxpaint-stamps-default",
    "gcompris-qt-data",
)
# Drawn rather than photographed, or many times the same scene (OpenCV's calibration pictures).
EXCLUDED = (
    "cartoon",
    "/symbols/",
    "/flags/",
    "_mirror",
    "/html/",
    "/contents/screenshot",
    "data/left",
    "data/right",
)
# GCompris packs its photographs into Qt resource files; the activities with animals are left out for the demo
# and the held-out set.
GCOMPRIS_ACTIVITIES = ("categorization", "details", "explore_monuments", "explore_world_music", "lang")


def download(work: Path) -> list[Path]:
    """Fetches and unpacks the Debian packages; returns the picture files in a fixed order."""
    (work / "debs").mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target, partial = work / "packages" / package, work / "partial" / package
        if target.is_dir():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        target.parent.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=work / "debs", check=True)
        deb = next((work / "debs").glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", deb, partial], check=True)
        for activity in GCOMPRIS_ACTIVITIES if package == "gcompris-qt-data" else ():
            unpack_webp(next(partial.rglob(f"rcc/{activity}.rcc")))
        partial.rename(target)
    pictures = [
        p
        for p in (work / "packages").rglob("*")
        if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
        and p.is_file()
        and not p.is_symlink()
        and not any(part in str(p) for part in EXCLUDED)
    ]
    return sorted(pictures)


def unpack_webp(resource: Path) -> None:
    """Writes every WebP picture inside a Qt resource file beside it; Qt stores them as they are, and RIFF
    headers tell the length.
    """
    blob = resource.read_bytes()
    for match in re.finditer(rb"RIFF(....)WEBP", blob, re.DOTALL):
        end = match.start() + 8 + int.from_bytes(match[1], "little")
        resource.with_name(f"{resource.stem}_{match.start():08d}.webp").write_bytes(blob[match.start() : end])


def looks_drawn(crop: np.ndarray) -> bool:
    """Whether a uint8 crop (H, W, 3) is a diagram, a gradient or empty: too many equal neighbours, or too
    little difference between them.
    """
    steps = np.abs(np.diff(crop.astype(np.int16), axis=1))
    return (steps == 0).all(-1).mean() > 0.35 or steps.mean() < 2.5


def crops_of(job: tuple[Path, int]) -> list[np.ndarray]:
    """Square crops of one picture at all scales from SIZE to its full side, as uint8 (SIZE, SIZE, 3)."""
    path, seed = job
    random = np.random.default_rng(seed)
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        image.load()
    except OSError:
        return []
    image = image.convert("RGBA")
    if np.asarray(image.getchannel("A")).mean() < 250:
        return stamps_of(image, random)
    image = image.convert("RGB")
    side = min(image.size)
    if side < 0.85 * SIZE:
        return []
    count = int(np.clip(math.prod(image.size) / SIZE**2, 8, 60))
    crops = []
    for _ in range(count):
        s = min(side, int(round(math.exp(random.uniform(math.log(min(SIZE, side)), math.log(side))))))
        x, y = random.integers(0, image.width - s + 1), random.integers(0, image.height - s + 1)
        crop = np.asarray(image.resize((SIZE, SIZE), Image.LANCZOS, box=(x, y, x + s, y + s), reducing_gap=3))
        if not looks_drawn(crop):
            crops.append(crop)
    return crops


def stamps_of(image: Image.Image, random: np.random.Generator) -> list[np.ndarray]:
    """A photograph cut out on transparency, pasted twice on a soft two-colour gradient."""
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 120:
        return []
    image = image.crop(box)
    if looks_drawn(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS))):
        return []
    crops = []
    for _ in range(2):
        scale = SIZE * random.uniform(0.7, 1.0) / max(image.size)
        stamp = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
        ramp = np.linspace(0, 1, SIZE)[:, None, None]
        top, bottom = random.uniform(40, 235, (2, 3))
        ground = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (SIZE, SIZE, 3)) + random.normal(
            0, random.uniform(0, 6), (SIZE, SIZE, 3)
        )
        canvas = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        canvas.paste(stamp, tuple(int(random.integers(0, SIZE - side + 1)) for side in stamp.size), stamp)
        crops.append(np.asarray(canvas))
    return crops


def prepare_data(work: Path) -> None:
    """Writes crops.npy, uint8 (M, SIZE, SIZE, 3), in random order; the last 4 % of the files are kept apart
    in holdout.npy.
    """
    if (work / "crops.npy").exists():
        return
    pictures = download(work)
    np.random.default_rng(0).shuffle(pictures)
    with Pool() as pool:
        per_file = list(
            tqdm(
                pool.imap(crops_of, [(p, i) for i, p in enumerate(pictures)], chunksize=4),
                total=len(pictures),
                desc="crops",
            )
        )
    per_file = [crops for crops in per_file if crops]
    split = int(len(per_file) * 0.96)
    train = np.stack([crop for crops in per_file[:split] for crop in crops])
    np.random.default_rng(1).shuffle(train)
    save_array(work / "holdout.npy", np.stack([crop for crops in per_file[split:] for crop in crops[:3]]))
    save_array(work / "crops.npy", train)
    print(f"{len(train)} crops of {split} files for training, {len(per_file) - split} files held out")


@torch.no_grad()
def draw_neighbours(work: Path, device: torch.device, count: int = 3) -> None:
    """Writes neighbours.png: beside each demo and held-out photograph the training crops most like it, to see
    that none shows the same scene.

    Likeness is the cosine of the classifier's pooled features, centred on the crops' mean.
    """
    classifier, features = load_classifier("efficientnet_lite0").to(device), []
    classifier.network._fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].cpu()))

    def features_of(pictures: np.ndarray) -> torch.Tensor:
        features.clear()
        for start in tqdm(range(0, len(pictures), 64), desc="features"):
            classifier(
                torch.from_numpy(pictures[start : start + 64]).to(device).permute(0, 3, 1, 2).float() / 255
            )
        return torch.cat(features)

    crops = np.load(work / "crops.npy")
    photographs = np.stack(
        [
            read_image(path, SIZE)
            for folder in ("images", "heldout")
            for path in sorted((DEMO / folder).iterdir())
        ]
    )
    known, asked = features_of(crops), features_of(photographs)
    known, asked = (F.normalize(f - known.mean(0)) for f in (known, asked))
    nearest = (asked @ known.T).topk(count).indices
    write_image(
        np.vstack([np.hstack([one, *crops[indices]]) for one, indices in zip(photographs, nearest.numpy())]),
        work / "neighbours.png",
    )
