"""What a run depends on by content, so that a run which goes on notices when it has become another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from classifiers import check_name

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


def folder_digest(folder: Path) -> str:
    """A digest of the names and contents of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = [(str(path.relative_to(folder)), file_digest(path)) for path in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def content_digests(
    checkpoint: str, classifiers: tuple[str, ...], class_names: tuple[str, ...]
) -> dict[str, str]:
    """Digests by name of the class names, and of the diffusion model and the surrogates as far as they are
    files here.
    """
    digests = {"the class names": hashlib.sha256(json.dumps(class_names).encode()).hexdigest()[:16]}
    for name in (checkpoint, *classifiers):
        resolved = name if name == checkpoint else check_name(name).removeprefix("hf:")
        path = Path(resolved.rsplit(":", 1)[0] if ".py:" in resolved else resolved)
        if path.is_dir():
            digests[name] = folder_digest(path)
        elif path.is_file():
            digests[name] = file_digest(path)
    return digests
