"""Which files in a folder are a run's own: those that its run.json and its records name, and no others.

Only these are deleted to start over, and no other file is ever written over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from diffattack.classifiers.registry import joined_names
from diffattack.common.errors import InputError, RecordError
from diffattack.data.images import temporary_name
from diffattack.data.layout import SUBFOLDERS, Layout
from diffattack.data.records import ANALYSIS, read_configuration
from diffattack.options import Options
from diffattack.plotting.draw import IMAGE_FIGURES, POOLED_FIGURES
from diffattack.plotting.large_page import files_of_large_page, remove_files_of_large_page

# of a run as a whole; its run.json comes last, since it says of what run the others are
RUN_FILES = ("results.json", "log.txt", "report.html", "checked.json", "run.json")
OF_IMAGE = (
    "originImage.png",
    "adv_image.png",
    "reconstruction.png",
    "diff_relative.png",
    "diff_absolute.png",
    "record.npz",
    "failed.txt",
)
PARTIAL = r"(\.\w*-\d+\.partial)?"  # of what was being written when a process was killed
FIGURES = "|".join((*POOLED_FIGURES, "overlay", "tradeoff", r"contact_sheet_[1-9]\d*"))
ANALYSED = rf"((?P<index>\d{{4,}})_({'|'.join(IMAGE_FIGURES)})|{FIGURES})\.(png|pdf){PARTIAL}"


class OwnFiles:
    """The files that a run over so many images writes, with these surrogates."""

    def __init__(self, layout: Layout, model_name: Iterable[str]):
        self.layout = layout
        names = joined_names(model_name)
        self.of_image = {*OF_IMAGE, *(f"diff_{names}_image_{how}.png" for how in ("ATKSuccess", "Fail"))}

    def check_lengths(self) -> None:
        """Raises InputError where the longest path, while it is written, is more than the system takes."""
        name = max(self.of_image, key=lambda name: len(name.encode()))
        path = temporary_name(self.layout.file(self.layout.images - 1, name)).absolute()
        there = next(folder for folder in path.parents if folder.exists())
        longest = {"PC_NAME_MAX": 255, "PC_PATH_MAX": 4096}
        for what in longest if hasattr(os, "pathconf") else ():
            with suppress(OSError, ValueError):  # of a file system that does not say
                longest[what] = os.pathconf(there, what)
        in_name, in_all = len(os.fsencode(path.name)), len(os.fsencode(path))
        if in_name > longest["PC_NAME_MAX"] or in_all >= longest["PC_PATH_MAX"]:
            raise InputError(
                f"--save_dir: files such as {path.name[:60]!r}... would have longer names than "
                f"{str(there)[:60]!r} takes; give a folder with a shorter name, or elsewhere"
            )

    def existing(self) -> Iterator[Path]:
        """Those that are there; those that say what the others are come last."""
        folder = self.layout.folder
        yield from (path for path in listed(folder / ANALYSIS) if self.is_figure(path))
        yield from files_of_large_page(folder)
        for place in self.layout.places:
            found = [path for path in listed(place) if self.is_of_image(path)]
            yield from sorted(found, key=lambda path: "_record.npz" in path.name)
        for name in RUN_FILES:
            yield from (path for path in listed(folder) if re.fullmatch(re.escape(name) + PARTIAL, path.name))

    def is_figure(self, path: Path) -> bool:
        match = re.fullmatch(ANALYSED, path.name)
        return match is not None and int(match["index"] or 0) < self.layout.images

    def is_of_image(self, path: Path) -> bool:
        match = re.fullmatch(rf"(\d{{4,}})_(.+?){PARTIAL}", path.name)
        if not match or match[2] not in self.of_image:
            return False
        index = int(match[1])
        return index < self.layout.images and self.layout.file(index, match[2]) == path.with_name(
            f"{match[1]}_{match[2]}"
        )


def listed(folder: Path) -> list[Path]:
    """The files of a folder, if it is one."""
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def clear_run(folder: Path) -> None:
    """Deletes what the run in a folder has written, and folders of its own that are empty then.

    Raises:
        InputError: its run.json does not say what it has written.
    """
    if not (folder / "run.json").is_file():
        return
    try:
        configuration = read_configuration(folder)
        own = OwnFiles(Layout(folder, len(configuration["images"])), configuration["model_name"])
    except (RecordError, KeyError, TypeError) as error:
        raise InputError(
            f"--overwrite: {str(folder / 'run.json')!r} is not of a run of this tool, or damaged "
            f"({error}), so that nothing says which files may be deleted; give another --save_dir"
        ) from None
    for path in own.existing():
        path.unlink(missing_ok=True)
    remove_files_of_large_page(folder)
    for place in (folder / ANALYSIS, *folder.glob(SUBFOLDERS)):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def check_nothing_is_in_the_way(layout: Layout, options: Options) -> None:
    """Raises InputError where a new run would write over a file that no run recorded, or can write none."""
    folder, own = layout.folder, OwnFiles(layout, options.model_name)
    own.check_lengths()
    if (folder / "run.json").exists():
        return
    for path in own.existing():
        if path.name.endswith(".partial"):
            continue
        if (folder / "run.json").exists():  # of a process of this run that started together with this one
            return
        raise InputError(
            f"--save_dir: {str(folder)!r} holds {str(path.relative_to(folder))!r}, which a run would write "
            f"over, and no run.json that says of what run it is; give another folder, or move it away"
        )


def check_reports_are_ours(
    folder: Path, kept: str, others: Iterable[str], images_root: Path | None = None
) -> None:
    """Raises InputError where reports would be written over that this tool has not written: what it writes
    lies beside a JSON that says with what options and versions.

    Args:
        kept: the name of that JSON.
        others: the names of the other reports.
        images_root: of which folder the reports have to be, if it matters.
    """
    there = [name for name in (kept, *others) if (folder / name).exists()]
    if not there:
        return
    try:
        content = json.loads((folder / kept).read_text(encoding="utf-8"))
        is_ours = {"configuration", "versions"} <= set(content)
        was = content["configuration"].get("images_root") if is_ours else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise InputError(
            f"--save_dir: {str(folder)!r} holds {there[0]!r}, which would be written over, and is not of "
            f"this tool; give another folder, or move it away"
        )
    if images_root and was and Path(was).exists() and not Path(was).samefile(images_root):
        raise InputError(
            f"--save_dir: {str(folder)!r} has the {kept} of another folder, {str(was)!r}; give another "
            f"--save_dir"
        )


# ---------------------------------------------------------------- inputs


def check_apart(save_dir: Path, images_root: Path) -> None:
    """Raises InputError where results would lie among the images, or the images among the results."""
    above, inside = is_within(images_root, save_dir), is_within(save_dir, images_root)
    if above or inside:
        place = "is" if above and inside else "lies above" if above else "lies inside"
        raise InputError(
            f"--save_dir: {str(save_dir)!r} {place} --images_root, so that results and images would be mixed "
            f"up; give a folder beside it"
        )


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, whatever links and spellings lead to both."""
    path, folder = path.resolve(), folder.resolve()
    if folder == path or folder in path.parents:
        return True
    return folder.exists() and any(
        one.exists() and one.samefile(folder) for one in (path, *path.parents)
    )  # where case does not tell names apart


def check_links_lead_elsewhere(save_dir: Path, images: Iterable[Path]) -> None:
    """Raises InputError where images are links to files of a folder of results."""
    inside: dict[Path, bool] = {}  # by folder, since most images are no links themselves
    for path in images:
        if path.parent not in inside:
            inside[path.parent] = is_within(path.parent, save_dir)
        if inside[path.parent] or (path.is_symlink() and is_within(path, save_dir)):
            raise InputError(
                f"--images_root: {str(path)!r} is a link into --save_dir, where it would be written over; "
                f"give another --save_dir"
            )


def check_images_are_no_results(images_root: Path) -> None:
    """Raises InputError where a folder of images is that of a run."""
    try:
        configuration = read_configuration(images_root)
    except RecordError:
        return
    if {"images", "model_name", "labels"} <= set(configuration):
        raise InputError(
            f"--images_root: {str(images_root)!r} is the folder of a run, whose pictures are results; give "
            f"the folder of its images, or --is_test to judge it"
        )


def check_inputs_are_safe(options: Options) -> None:
    """Raises InputError where a file that a command names is called as one that it writes."""
    for name in ("label_path", "captions", "fid_reference"):
        path = getattr(options, name)
        if path is None or path.resolve().parent != options.save_dir.resolve():
            continue
        if path.name in RUN_FILES or re.fullmatch(r"\d{4,}_.+", path.name):
            raise InputError(
                f"--{name}: {str(path)!r} is called as a result that is written there; move it elsewhere"
            )
