"""The flags of what is attacked, and of where results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffattack.common.flags import COUNT, SIDE, count, flag
from diffattack.data.dataset import PRESETS, TARGET_COLUMN, target_label
from diffattack.data.sample import FIGURE_IMAGES


@dataclass
class DataOptions:
    title = "data"

    images_root: Path = flag(
        Path("demo/images"), "images to attack, taken in natural order (img2 before img10)", "FOLDER"
    )
    label_path: Path | None = flag(
        None,
        "true classes: one a line in the order of the images (a number, a WordNet id or a name; several for "
        "an image that shows several), or a table with columns ImageId,TrueLabel or filename,label; without "
        "it the demo's for the demo, metadata.csv in the folder, or the folder that an image lies in",
        "FILE",
        parse=Path,
    )
    label_base: int | None = flag(None, "what labels count from (default: 1)", parse=int, choices=(0, 1))
    captions: Path | None = flag(
        None,
        "names of the classes: one a line, CUB's classes.txt, Stanford Cars' cars_meta.mat, ImageNet's "
        "meta.mat or map_clsloc.txt, or a JSON with id2label (default: ImageNet's 1000)",
        "FILE",
        parse=Path,
    )
    trust_labels: bool = flag(
        False,
        "attack although the classifiers' answers to the clean images say that the labels are wrong",
        identifies_run=False,
    )
    dataset_name: str = flag(
        "imagenet_compatible", "presets of captions, label base and logit temperature", choices=tuple(PRESETS)
    )
    target_label: int | str | None = flag(
        None,
        f"targeted attack: make the classifier see this class; or {TARGET_COLUMN}, for the column of that "
        "name in a CSV",
        "N",
        parse=target_label,
    )
    mask_root: Path | None = flag(
        None,
        "masks, one a picture with its name, of any size: white may change, black stays",
        "FOLDER",
        parse=Path,
    )
    save_dir: Path = flag(
        Path("output"),
        "where results go; a run that was interrupted goes on here",
        "FOLDER",
        identifies_run=False,
    )
    overwrite: bool = flag(
        False, "delete the results of an earlier run in --save_dir first", identifies_run=False
    )
    is_test: bool = flag(
        False,
        "attack nothing: evaluate the folder --images_root of an earlier run, of this tool or of the "
        "original DiffAttack",
        identifies_run=False,
    )
    figures: str = flag(
        "all",
        "draw at the end: each image's figures and those pooled over the images, with the page report.html; "
        "only the pooled ones and the page; nothing",
        choices=("all", "pooled", "none"),
        identifies_run=False,
    )
    figure_images: int = flag(
        FIGURE_IMAGES,
        "of more images than K, contact sheets and figures of single images show the most visible, the least "
        "visible and some drawn by --seed, a third each",
        "K",
        range=COUNT,
        identifies_run=False,
    )
    check: bool = flag(
        False,
        "load all that the command names, try it on the first image, say what to expect, and stop: for "
        "before a long run",
        identifies_run=False,
    )
    res: int = flag(
        224, "side of the square the images are resized to, a multiple of 32", "PIXELS", range=SIDE
    )
    limit: int | None = count("attack only the first K images (default: all)", "K", identifies_run=False)
