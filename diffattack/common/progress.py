"""A sign of life of what takes long: a bar on a terminal, else a line a minute.

for record in progress(records, desc="records", unit="image"):   # counts what it hands out
    ...
with progress(total=5_000, desc="figures", unit="figure") as bar:
    bar.update(12)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

EVERY, QUIET = 60.0, 10.0  # seconds between two lines, and before the first


class Lines(tqdm):
    """tqdm where nobody would see a bar move: whole lines, of which a log is not filled with control
    characters."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(line_of(self.desc, self.n, self.total, self.unit, self._time() - self.start_t) + "\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        """Without tqdm's last word, which clears the bar."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress(
    iterable: Iterable | None = None,
    total: int | None = None,
    desc: str = "",
    unit: str = "step",
    every: float = EVERY,
    quiet: float = QUIET,
) -> tqdm:
    """What counts the elements of `iterable`, or what `update(n)` says, and tells so on stderr: on a terminal
    by a bar that is gone at the end, else by one line in `every` seconds. What ends within `quiet` seconds is
    not worth a line, nor within one a bar.

    Args:
        total: how many there will be, where the iterable does not know.
        unit: one of what is counted, in the singular.
    """
    if sys.stderr.isatty():
        width = {"dynamic_ncols": True} if columns() else {"ncols": 80}
        return tqdm(iterable, desc, total, leave=False, unit=unit, delay=1, **width)
    delay = max(quiet, 1e-9)  # without any it would say something at once
    lines = Lines(iterable, desc, total, unit=unit, mininterval=every, miniters=1, delay=delay)
    lines.last_print_t = lines.start_t + quiet - every  # so that the first comes after `quiet` seconds
    return lines


def columns() -> int:
    """How wide the terminal is, 0 where it does not say so, as in some containers: there tqdm's bar would be
    as narrow."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def line_of(desc: str, count: int, total: int | None, unit: str, seconds: float) -> str:
    """Such as "figures: 1,200 of 5,000 images, 23.1 images/s, 2 min left", after so many seconds."""
    rate = count / seconds if seconds > 0 else 0.0
    counted = f"{count:,} {unit}s" if total is None else f"{count:,} of {total:,} {unit}s"
    parts = [counted, f"{rate:.1f} {unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s/{unit}"]
    if total is not None and rate:
        parts.append(f"{in_words(max(0, total - count) / rate)} left")
    return f"{desc}: {', '.join(parts)}"


def in_words(seconds: float) -> str:
    """A time as one says it: "40 s", "2 min", "1 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
