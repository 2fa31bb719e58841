"""Text files as people save them: in UTF-8 or UTF-16, with the line ends of any system."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path, forms: str) -> str:
    """A file's text, its lines separated by newlines; a comment, a line that begins with #, is left blank.

    Raises:
        ValueError: there is no such file, or it is no text; the message says that `forms` are expected.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    content = path.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors="replace")
    if "\0" in text or "\ufffd" in text:
        raise ValueError(f"{str(path)!r} is no text in UTF-8; expected {forms}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join("" if line.lstrip().startswith("#") else line for line in lines)
