"""Fonts for names in any script: a figure's own font has neither Chinese nor emoji, and draws boxes."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure
    from matplotlib.text import Text

MISSING = "?"  # for a character that no font has


@functools.cache
def characters_of(path: str) -> frozenset[str]:
    """Those that a font has outlines of, none of one that cannot be read: emoji in colour are pictures."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)  # of a collection the first
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (RuntimeError, OSError, ValueError):  # what it raises on files of other kinds
        return frozenset()


@functools.cache
def installed() -> tuple[str, ...]:
    """The files of all fonts, plain ones first: also of those that came after matplotlib last looked."""
    from matplotlib.font_manager import findSystemFonts

    styled = re.compile("bold|italic|oblique|black|light|thin|mono|serif")
    is_styled = {path: bool(styled.search(Path(path).name.lower())) for path in findSystemFonts()}
    return tuple(sorted(is_styled, key=lambda path: (is_styled[path], path)))


@functools.cache
def fonts_for(missing: frozenset[str]) -> tuple[str, ...]:
    """The families of fonts that have characters which a figure's own font lacks, as few as it takes."""
    from matplotlib.font_manager import FontEntry, fontManager

    families = []
    while missing:
        best = max(installed(), key=lambda path: len(missing & characters_of(path)), default=None)
        if best is None or not missing & characters_of(best):
            break
        if not any(entry.name == best for entry in fontManager.ttflist):
            # a family of its own, of which no other weight is looked for
            fontManager.ttflist.append(FontEntry(fname=best, name=best, weight=400, size="scalable"))
        families.append(best)
        missing -= characters_of(best)
    return tuple(families)


@functools.cache
def lacking(text: str) -> frozenset[str]:
    """Characters that a figure's own font lacks."""
    from matplotlib import rcParamsDefault
    from matplotlib.font_manager import findfont

    return frozenset(text) - characters_of(findfont(rcParamsDefault["font.sans-serif"][0])) - {"\n"}


def can_draw(text: str) -> bool:
    """Whether a figure can show all of a text, in any font that is here."""
    missing = lacking(visible(text))
    return not missing or all(any(c in characters_of(path) for path in installed()) for c in missing)


def visible(text: str) -> str:
    """Without what only joins or varies characters and cannot be drawn."""
    joining = {c for c in lacking(text) if unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f"}
    return "".join(c for c in text if c not in joining)


def give_fonts(figure: Figure) -> None:
    """Gives each text of a figure the fonts that it needs; what no font has is shown as MISSING."""
    for text in texts_of(figure):
        content = visible(text.get_text())
        if lacking(content):
            text.set_fontfamily([*text.get_fontfamily(), *fonts_for(lacking(content))])
            content = "".join(c if not lacking(c) or can_draw(c) else MISSING for c in content)
        if content != text.get_text():
            text.set_text(content)


def texts_of(figure: Figure) -> Iterator[Text]:
    """All but those of ticks, which name nothing that users named, and take long to make."""
    yield from figure.texts
    for panel in figure.axes:
        yield from (panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts)
    for legend in filter(None, [*figure.legends, *(panel.get_legend() for panel in figure.axes)]):
        yield from legend.get_texts()
