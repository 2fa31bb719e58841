"""Text files as people save them: in UTF-8, with or without a byte order mark, in UTF-16 as Excel does, and
with the line ends of any system.
"""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """A file's text, its lines separated by newlines.

    Raises:
        UnicodeDecodeError: it is no text, or in an encoding that it does not name.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    if "\0" in text:
        raise UnicodeDecodeError("utf-8", content, 0, 1, "zeros are no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")
