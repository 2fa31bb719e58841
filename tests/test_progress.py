"""A sign of life of what takes long, on a clock of its own."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from diffattack.common.progress import in_words, line_of, progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def ticking(bar, clock: Clock):
    """Puts a bar on the clock, from its start."""
    before, bar._time = bar.start_t, clock
    bar.last_print_t += clock.now - before
    bar.start_t = clock.now
    return bar


def test_without_a_terminal_a_line_is_said_each_minute(capsys):
    clock = Clock()
    with ticking(progress(total=1_000, desc="figures", unit="figure"), clock) as bar:
        for _ in range(200):
            clock.now += 1
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "figures: 20 of 1,000 figures, 2.0 figures/s, 8 min left",
        "figures: 140 of 1,000 figures, 2.0 figures/s, 7 min left",
        "figures: 260 of 1,000 figures, 2.0 figures/s, 6 min left",
        "figures: 380 of 1,000 figures, 2.0 figures/s, 5 min left",
    ]


def test_what_is_soon_over_is_not_talked_about(capsys):
    clock = Clock()
    found = []
    for k in ticking(progress(range(9), desc="records", unit="image"), clock):
        clock.now += 1
        found.append(k)
    assert found == list(range(9)) and capsys.readouterr().err == ""


def test_iterating_says_how_much_is_left(capsys):
    clock = Clock()
    for _ in ticking(progress(range(100), desc="records", unit="image"), clock):
        clock.now += 20
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "records: 1 of 100 images, 20.0 s/image, 33 min left" and len(lines) == 34
    assert lines[-1] == "records: 100 of 100 images, 20.0 s/image, 0 s left"


def test_small_intervals_without_a_total(capsys):
    for _ in progress(iter(range(3)), desc="x", unit="image", every=0, quiet=0):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("x: 3 images, ") and "\r" not in "".join(lines)


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(total=10, desc="figures", unit="figure") as bar:
        assert bar.delay == 1 and not bar.leave
        bar.delay = bar.mininterval = 0
        bar.update(5)
    shown = capsys.readouterr().err
    assert "figures:  50%" in shown and "5/10" in shown and "figure/s" in shown and shown.endswith("\r")


@pytest.mark.parametrize("width", [0, 50, 90])
def test_a_bar_is_seen_on_a_terminal_of_any_width(width):
    """A real one, of which one with 0 columns does not say how wide it is."""
    program = (
        "import time\n"
        "from diffattack.common.progress import progress\n"
        "for _ in progress(range(15), desc='figures', unit='figure'):\n"
        "    time.sleep(0.1)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    try:
        done = subprocess.run([sys.executable, "-c", program], stderr=theirs, cwd=ROOT, timeout=60)
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0 and "figures:  80%" in shown and "12/15" in shown
    assert all(len(line) <= (width or 80) for line in shown.split("\r"))


@pytest.mark.parametrize(
    "seconds, words", [(40, "40 s"), (89, "89 s"), (90, "2 min"), (3_500, "58 min"), (3_900, "1 h 05 min")]
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_line_before_anything_is_done():
    assert line_of("figures", 0, 10, "image", 12.0) == "figures: 0 of 10 images, 0.0 images/s"
