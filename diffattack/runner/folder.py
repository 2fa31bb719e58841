"""The folder of a run: whose it is, what in it is finished, and which files are its own.

`run.json` says what the files depend on: a run of another configuration is refused there. An image is
finished if its record opens and bears the identity of the run, its pictures are those that were written, and
its input and mask those that were read; else it is attacked again.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import distributions
from pathlib import Path

import torch
from tqdm import tqdm

from diffattack import ROOT
from diffattack.classifiers.checks import difference
from diffattack.classifiers.registry import joined_names
from diffattack.common.errors import InputError, RecordError, RunError, note
from diffattack.data.dataset import Item
from diffattack.data.images import delete_abandoned, replacing, temporary_name
from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS, json_digest, read_configuration, read_record, run_identity
from diffattack.diffusion.pipeline import loaded_files
from diffattack.options import Options
from diffattack.plotting.run_page import FIGURES, IMAGE_FIGURES, page_files, remove_page_files

WRITTEN = ("originImage", "adv_image", "reconstruction")  # pictures that are read again
OF_IMAGE = (
    *(f"{kind}.png" for kind in WRITTEN),
    "diff_relative.png",
    "diff_absolute.png",
    "judged.npz",
    "failed.txt",
    "record.npz",
)
REPORTS = ("results.json", "images.csv", "log.txt", "report.html", "run.json")


# ---------------------------------------------------------------- what a run is


def plain(value: object) -> object:
    """A flag's value as JSON gives it back."""
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str, list)) else str(value)


def name_of(item: Item, options: Options) -> str:
    """An image's name, with that of its class's folder if it has one."""
    return str(item.path.relative_to(options.images_root))


def counted(labels: Sequence[int], base: int) -> int | list[int]:
    """Labels as files give them: a number, or a list of several."""
    return labels[0] + base if len(labels) == 1 else [label + base for label in labels]


def flags_of(options: Options, identify: bool = False) -> dict:
    """The flags and their values; or those alone that identify a run."""
    declared = [one for one in fields(options) if one.metadata["identifies_run"] or not identify]
    return {one.name: plain(getattr(options, one.name)) for one in declared}


def provenance(options: Options, device: torch.device) -> dict:
    """What a results file tells of where its figures come from; of a package that is not there None."""
    packages = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    found = {one.metadata["Name"].lower(): one.version for one in distributions()}
    versions = {package: found.get(package) for package in packages}
    return {"configuration": flags_of(options), "device": str(device), "versions": versions}


# ---------------------------------------------------------------- whose folder it is


def check_save_dir(folder: Path) -> None:
    """Raises InputError where nothing can be written there."""
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # of a name that is too long, say
        raise InputError(f"--save_dir: {error.strerror}: {str(folder)[:60]!r}...; give another") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "not writable" if existing.is_dir() else "a file"
        raise InputError(
            f"--save_dir: {str(folder)!r} cannot be written: {str(existing)!r} is {why}; give another"
        )


def claim(folder: Path, configuration: dict, own: Iterable[Path] = ()) -> str:
    """Writes run.json and returns the run's identity; of several processes that start at once one wins, and
    the others compare.

    Args:
        own: those there are of what a run in this folder writes.
    Raises:
        InputError: it is another's.
    """
    check_folder(folder, configuration, own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save_dir: {str(folder)!r}: {error.strerror}; give another folder") from None
    mine = temporary_name(folder / "run.json")
    mine.write_text(json.dumps(configuration, indent=2) + "\n")
    try:
        os.link(mine, folder / "run.json")
    except FileExistsError:
        check_folder(folder, configuration)
    except OSError:  # a file system without hard links: the last wins, and the others compare
        if not (folder / "run.json").exists():
            os.replace(mine, folder / "run.json")
        check_folder(folder, configuration)
    finally:
        mine.unlink(missing_ok=True)
    return run_identity(folder)


def check_folder(folder: Path, configuration: dict, own: Iterable[Path] = ()) -> None:
    """Raises InputError if the folder holds a run of another configuration, or files of others that a run
    would write over.
    """
    path = None if (folder / "run.json").exists() else next(iter(own), None)
    if path and not (folder / "run.json").exists():  # of a process that started together with this one
        raise InputError(
            f"--save_dir: {str(folder)!r} holds {os.path.relpath(path, folder)!r}, which a run would write "
            f"over, and no run.json that says of what run it is; give another folder, or move it away"
        )
    if not (folder / "run.json").exists():
        return
    try:
        differing = differences(read_configuration(folder), configuration)
    except ValueError as error:
        raise InputError(f"--save_dir: {error}") from None
    if differing:
        raise InputError(
            f"--save_dir: {str(folder)!r} holds a run of another configuration: {'; '.join(differing)}; "
            f"give another folder, or --overwrite to start over"
        )


def differences(stored: dict, configuration: dict) -> list[str]:
    """What a run.json says that is otherwise now; a judge that is new is none."""
    if kind_of(stored) != kind_of(configuration):
        return [f"it was of {kind_of(stored)} and is of {kind_of(configuration)}"]
    lines = [
        f"{key} was {in_brief(stored.get(key))} and is {in_brief(configuration.get(key))}"
        for key in sorted({*stored, *configuration} - {"contents", "classifiers"})
        if stored.get(key) != configuration.get(key)
    ]
    before, now = stored.get("contents", {}), configuration.get("contents", {})
    lines += [
        f"the content of {n} has changed, or it is gone"
        for n in {**before, **now}
        if before.get(n) != now.get(n)
    ]
    before, now = stored.get("classifiers", {}), configuration.get("classifiers", {})
    changes = {name: difference(before[name], now[name]) for name in before if now.get(name)}
    lines += [f"the classifier {name} has changed ({how})" for name, how in changes.items() if how]
    return lines


def kind_of(configuration: dict) -> str:
    kinds = {"comparison": "a comparison", "judged": "pictures that are judged"}
    return next((name for key, name in kinds.items() if key in configuration), "an attack")


def in_brief(value: object) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."


def check_still_ours(folder: Path, identity: str) -> None:
    """Raises RunError if the folder has become another run's."""
    if run_identity(folder) != identity:
        raise RunError(
            f"--save_dir: {str(folder)!r} has been taken over by a run of another configuration, started "
            f"with --overwrite; this one stops, and what is there is the other's"
        )


# ---------------------------------------------------------------- what of it is finished


def drop_unusable(layout: Layout, items: Sequence[Item], identity: str, masks: dict[int, Path]) -> None:
    """Deletes the records of images that have to be made again, and says why: damaged, of another run,
    without their pictures, or of a picture or mask that has changed since.
    """
    for place in {layout.folder, *layout.places}:
        delete_abandoned(place)
    finished = layout.finished([item.index for item in items])
    here = [item for item in items if item.index in finished]
    with tqdm(here, desc="checked", unit="image", delay=1, leave=False) as bar:
        for item in bar:
            reason = reason_to_make_again(layout, item, identity, masks.get(item.index))
            if reason:
                note(f"{item.path.name} is made again: {reason}")
                layout.record(item.index).unlink()


def reason_to_make_again(layout: Layout, item: Item, identity: str, mask: Path | None = None) -> str | None:
    """Why a record cannot be used, None if it can."""
    try:
        row = read_record(layout.record(item.index), identity).row
    except ValueError as error:
        return str(error).split("; delete it")[0]
    for kind, digest in row["files"].items():
        picture = layout.file(item.index, f"{kind}.png")
        if not picture.is_file() or file_digest(picture) != digest:
            return f"{picture} is {'not the one that was written' if picture.is_file() else 'missing'}"
    for source, digest in ((item.path, row["digest"]), (mask, row.get("mask_digest"))):
        # one that is gone was attacked while it was there
        if source is not None and source.is_file() and digest != file_digest(source):
            return f"{source} has changed since it was attacked"
    return None


def missing_of(items: Sequence[Item], layout: Layout) -> list[Item]:
    """The images that are not finished."""
    finished = layout.finished([item.index for item in items])
    return [item for item in items if item.index not in finished]


def unattempted(items: Sequence[Item], layout: Layout) -> list[Item]:
    """The images that are neither finished nor have failed."""
    failed = layout.failed([item.index for item in items])
    return [item for item in missing_of(items, layout) if item.index not in failed]


def write_failure(layout: Layout, item: Item, error: Exception) -> None:
    with replacing(layout.failure(item.index)) as temporary:
        temporary.write_text(f"{item.path.name}: {error}\n", encoding="utf-8", errors="backslashreplace")


def read_failures(layout: Layout, items: Sequence[Item]) -> list[str]:
    failed = layout.failed([item.index for item in items])
    return [layout.failure(index).read_text(encoding="utf-8").strip() for index in sorted(failed)]


# ---------------------------------------------------------------- which files are its own


def own_files(layout: Layout, model_name: Iterable[str]) -> Iterator[Path]:
    """The files there are of those that a run over so many images writes, run.json last of all."""
    folder, figures = layout.folder, Layout(layout.folder / ANALYSIS, 0)  # which lie in one folder
    results = [f"diff_{joined_names(model_name)}_image_{how}.png" for how in ("ATKSuccess", "Fail")]
    drawn = [f"{figure}.{ending}" for figure in IMAGE_FIGURES for ending in ("png", "pdf")]
    places = [place for place in (figures.folder, *layout.places) if place.is_dir()]
    there = {path for place in places for path in place.iterdir()}
    for where, names in ((layout, (*OF_IMAGE, *results)), (figures, drawn)):
        named = (where.file(k, name) for k in range(layout.images) for name in names)
        yield from (path for path in named if path in there)
    yield from (*figure_files(folder), *page_files(folder))
    yield from (folder / name for name in REPORTS if (folder / name).exists())


def figure_files(folder: Path, more: Iterable[str] = ()) -> Iterator[Path]:
    """The figures there are that are of a whole run or comparison."""
    for path in (folder / ANALYSIS).glob("*.p[nd][gf]"):
        named = path.stem in (*FIGURES, *more)
        if named or re.fullmatch(r"contact_sheet_[1-9]\d*", path.stem):
            yield path


def clear_run(folder: Path) -> None:
    """Deletes what the run in a folder has written, and folders of its own that are empty then.

    Raises:
        InputError: its run.json does not say what it has written.
    """
    if not (folder / "run.json").is_file():
        return
    try:
        configuration = read_configuration(folder)
        layout = Layout(folder, len(configuration["images"]))
        own = own_files(layout, configuration["model_name"])
    except (RecordError, KeyError, TypeError) as error:
        raise InputError(
            f"--overwrite: {str(folder / 'run.json')!r} is not of a run of this tool, or damaged "
            f"({error}), so that nothing says which files may be deleted; give another --save_dir"
        ) from None
    for path in own:
        path.unlink(missing_ok=True)
    remove_page_files(folder)
    for place in {*layout.places, folder / ANALYSIS, folder}:
        if place.is_dir():
            delete_abandoned(place)
            if place != folder and not any(place.iterdir()):
                place.rmdir()


# ---------------------------------------------------------------- what a run depends on by content

SAMPLE = 2**20  # bytes


def file_digest(path: Path) -> str:
    """A digest of a file's size and content; of more than three SAMPLEs, of its beginning, middle and end,
    since hashing gigabytes of weights at every start would take longer than to notice that they changed is
    worth.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= 3 * SAMPLE:
            digest.update(file.read())
        else:
            for place in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def checkpoint_files(options: Options) -> list[Path]:
    """What is read of the diffusion model and its LoRA, as far as it lies here."""
    place = Path(options.pretrained_diffusion_path)
    files = loaded_files(place) if place.is_dir() else [place]
    return [path for path in (*files, *([options.lora.path] if options.lora else [])) if path.is_file()]


def content_digests(options: Options, class_names: tuple[str, ...]) -> dict[str, str]:
    """Digests by name of the class names and of the diffusion model's files."""
    files = {str(path): file_digest(path) for path in checkpoint_files(options)}
    return {"the class names": json_digest(class_names)} | files


def diffusion_digest(options: Options) -> str:
    """Of the diffusion model as these options make it, wherever its files lie."""
    digests = [(path.name, file_digest(path)) for path in checkpoint_files(options)]
    return json_digest([digests, options.lora and options.lora.scale, options.prediction_type])
