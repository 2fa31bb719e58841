"""The folder of a run: who may write to it, what is finished in it, its records, and how its images are
shared out, in batches and processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from diffattack.classifiers.identity import difference
from diffattack.common.errors import InputError, RunError, note
from diffattack.common.progress import progress
from diffattack.data.dataset import Item
from diffattack.data.images import delete_abandoned, replacing, temporary_name
from diffattack.data.layout import Layout
from diffattack.data.records import json_digest, read_configuration, read_record, run_identity
from diffattack.diffusion.lora import Lora
from diffattack.diffusion.pipeline import loaded_files
from diffattack.options import Options
from diffattack.runner.checked import Checked

WRITTEN = ("originImage", "adv_image")  # what is read of an image's pictures
PACKAGES = (
    "torch",
    "torchvision",
    "torchattack",
    "piq",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "torchmetrics",
    "pillow",
    "imagecodecs",
    "tifffile",
)


def configuration_of(
    options: Options,
    dtype: torch.dtype,
    items: Sequence[Item],
    contents: dict[str, str],
    classifiers: dict[str, dict],
) -> dict:
    """All that the files of a run depend on, with `content_digests` and identities of classifiers by name;
    the digest of an image's content is in its record.
    """
    flags = {
        declared.name: plain(getattr(options, declared.name))
        for declared in fields(Options)
        if declared.metadata["identifies_run"]
    }
    return flags | {
        "dtype": str(dtype).removeprefix("torch."),
        "images": [name_of(item, options) for item in items],
        "labels": [counted(item.labels, options.label_base) for item in items],
        "targets": [None if item.target is None else item.target + options.label_base for item in items],
        "contents": contents,
        "classifiers": classifiers,
    }


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


def check_save_dir(folder: Path) -> None:
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # of a name that is too long, say
        raise InputError(
            f"--save_dir: {error.strerror}: {str(folder)[:60]!r}...; give another folder"
        ) from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"--save_dir: {str(folder)!r} cannot be written, because {str(existing)!r} is "
            f"{'not writable' if existing.is_dir() else 'a file'}; give another folder"
        )


def check_folder(folder: Path, configuration: dict) -> None:
    """Raises InputError if the folder holds a run of another configuration."""
    if not (folder / "run.json").exists():
        if any(folder.glob("*_record.npz")):
            raise InputError(
                f"--save_dir: {str(folder)!r} holds results but no run.json that says of what; give another "
                f"folder, or move them away"
            )
        return
    try:
        found = read_configuration(folder)
    except ValueError as error:
        raise InputError(f"--save_dir: {error}") from None
    differing = [
        f"{key} was {in_brief(found.get(key))} and is {in_brief(configuration.get(key))}"
        for key in sorted({*found, *configuration} - {"contents", "classifiers"})
        if found.get(key) != configuration.get(key)
    ]
    differing += changed_contents(found.get("contents", {}), configuration.get("contents", {}))
    known = found.get("classifiers")
    for name, identity in configuration.get("classifiers", {}).items():
        if isinstance(known, dict) and name not in known:
            continue  # a judge that is new
        change = difference(known.get(name) if isinstance(known, dict) else None, identity)
        if change:
            differing.append(f"the classifier {name} is not the one that it was ({change})")
    if differing:
        raise InputError(
            f"--save_dir: {str(folder)!r} holds a run of another configuration: {'; '.join(differing)}; "
            f"give another folder, or --overwrite to start over"
        )


def changed_contents(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Which files of the diffusion model and the classifiers are others than they were."""
    unknown = sorted(name for name in before.keys() - now.keys() if not Path(name).is_dir())
    if any(Path(name).is_dir() for name in before):
        note(
            "this run is of an earlier version, which does not say of single files whether they have changed"
        )
        before = before | {name: before.get(name, digest) for name, digest in now.items()}
    return [
        *(f"the content of {name} has changed" for name in now if before.get(name, now[name]) != now[name]),
        *(f"{name} was read then and is gone" for name in unknown),
        *(f"{name} is read now and was not there" for name in sorted(now.keys() - before.keys())),
    ]


def identity_of(folder: Path) -> str:
    """The identity of the run whose folder this is.

    Raises:
        RunError: its run.json cannot be read.
    """
    path = folder / "run.json"
    try:
        stat = path.stat()
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); it says of what run the files are"
        ) from None
    return _identity(folder, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(64)
def _identity(folder: Path, *stat: int) -> str:
    """Read once for as long as the file stays the same: it names all images, and is asked for with each."""
    return run_identity(read_configuration(folder))


def check_still_ours(folder: Path, identity: str) -> None:
    """Raises RunError if the folder has become another run's."""
    if identity_of(folder) != identity:
        raise RunError(
            f"--save_dir: {str(folder)!r} has been taken over by a run of another configuration, started "
            f"with --overwrite; this one stops, and what is there is the other's"
        )


def drop_unusable(layout: Layout, items: Sequence[Item], identity: str, checked: Checked) -> None:
    """Deletes the records of images that have to be made again, and says why: damaged, of another run,
    without their pictures, or of a picture or mask that has changed since. What was found whole before and
    has not changed is not read again.
    """
    for place in {layout.folder, *layout.places}:
        delete_abandoned(place)
    finished = layout.finished([item.index for item in items])
    new = [item for item in items if item.index in finished and not checked.has(item)]
    with progress(new, desc="checked", unit="image") as bar:
        for item in bar:
            reason = reason_to_make_again(layout, item, identity, checked.masks.get(item.index))
            if reason:
                note(f"{item.path.name} is made again: {reason}")
                layout.record(item.index).unlink()
            else:
                checked.add(item)


def reason_to_make_again(layout: Layout, item: Item, identity: str, mask: Path | None = None) -> str | None:
    """Why a record cannot be used, None if it can."""
    try:
        row = read_record(layout.record(item.index), identity).row
    except ValueError as error:
        return str(error).split("; delete it")[0]
    for kind in pictures_of(row):
        picture = layout.file(item.index, f"{kind}.png")
        try:
            with Image.open(picture) as file:
                file.verify()
            if row["files"][kind] != file_digest(picture):
                return f"{picture} is not the one that was written"
        # of a file that is no PNG, or a damaged one, Pillow raises these
        except (OSError, SyntaxError, ValueError) as error:
            return f"{picture} is missing or damaged ({type(error).__name__})"
        except KeyError:
            return f"{layout.record(item.index)} is of an earlier version"
    for source, digest in ((item.path, row["digest"]), (mask, row.get("mask_digest"))):
        try:
            if source is not None and digest != file_digest(source):
                return f"{source} has changed since it was attacked"
        except OSError:
            continue  # it is gone, and was attacked while it was there
    return None


def make_folder(folder: Path, *more: Path) -> None:
    """Makes a folder, and more inside it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        for one in (folder, *more):
            one.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--save_dir: {str(folder)!r} cannot be made ({error.strerror}); give another folder"
        ) from None


def claim_folder(folder: Path, configuration: dict) -> str:
    """Writes run.json and returns the run's identity; of several processes that start at once one wins, and
    the others compare.
    """
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
    return identity_of(folder)


def in_brief(value: object) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."


def write_failure(layout: Layout, item: Item, error: Exception) -> None:
    with replacing(layout.failure(item.index)) as temporary:
        temporary.write_text(f"{item.path.name}: {error}\n", encoding="utf-8", errors="backslashreplace")


def read_failures(layout: Layout, items: Sequence[Item]) -> list[str]:
    failed = layout.failed([item.index for item in items])
    return [layout.failure(index).read_text(encoding="utf-8").strip() for index in sorted(failed)]


def pictures_of(row: dict) -> tuple[str, ...]:
    """The kinds of pictures that belong to an image, by its row."""
    reconstructed = "reconstructed" in next(iter(row["predictions"].values()))
    return (*WRITTEN, "reconstruction") if reconstructed else WRITTEN


def write_results(path: Path, results: dict, images: Iterable[dict]) -> None:
    """Writes JSON with a list `images` at its end, of which each is taken, and written on a line of its own,
    when its turn comes.
    """
    text = json.dumps(results, indent=2, sort_keys=False).removesuffix("\n}")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{text},\n  "images": [')
        for k, image in enumerate(images):
            file.write(f"{',' * (k > 0)}\n    {json.dumps(image)}")
        file.write("\n  ]\n}\n")


def missing_of(items: Sequence[Item], layout: Layout) -> list[Item]:
    """The images that are not finished."""
    finished = layout.finished([item.index for item in items])
    return [item for item in items if item.index not in finished]


def unattempted(items: Sequence[Item], layout: Layout) -> list[Item]:
    """The images that are neither finished nor have failed."""
    failed = layout.failed([item.index for item in items])
    return [item for item in missing_of(items, layout) if item.index not in failed]


def provenance(options: Options, device: torch.device) -> dict:
    """What a results file says of where its figures come from."""
    return {
        "configuration": {
            declared.name: plain(getattr(options, declared.name)) for declared in fields(options)
        },
        "device": str(device),
        "versions": {package: version(package) for package in PACKAGES if is_installed(package)},
    }


def is_installed(package: str) -> bool:
    """Whether it is there, since some attacks and measures do without some packages."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def write_texts(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            # file names need not be Unicode
            temporary.write_text(content.rstrip() + "\n", encoding="utf-8", errors="backslashreplace")


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


def content_digests(
    checkpoint: str, class_names: tuple[str, ...], lora: Lora | None = None
) -> dict[str, str]:
    """Digests by name of the class names, and of the files of the diffusion model as far as they are read
    from here.
    """
    named = [*files_of(checkpoint, loaded_files), *([(str(lora.path), lora.path)] if lora else [])]
    found = {name: file_digest(path) for name, path in named if path.is_file()}
    return {"the class names": json_digest(class_names)} | found


def files_of(place: str, read: Callable[[Path], list[Path]]) -> list[tuple[str, Path]]:
    """The names and paths of what is read of a file or folder."""
    return [(str(path), path) for path in (read(Path(place)) if Path(place).is_dir() else [Path(place)])]


def checkpoint_digest(path: str) -> str:
    """Of a diffusion model that is a file or a folder here, else nothing."""
    return digest_of(files_of(path, loaded_files))


def diffusion_digest(options: Options) -> str:
    """Of the diffusion model as these options make it."""
    found, lora = checkpoint_digest(options.pretrained_diffusion_path), options.lora
    if lora is None and options.prediction_type is None:
        return found
    added = [file_digest(lora.path), lora.scale] if lora and lora.path.is_file() else []
    return json_digest([found, *added, options.prediction_type])


def digest_of(files: Sequence[tuple[str, Path]]) -> str:
    digests = [(path.name, file_digest(path)) for _, path in files if path.is_file()]
    return json_digest(digests) if digests else ""
