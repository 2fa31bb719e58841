"""Of several processes on one run, one at a time adds up and reports.

with adding_up(folder):
    ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diffattack.common.errors import RunError

SAID_AFTER, PATIENCE = 10, 30 * 60  # seconds; a page of 50,000 images takes 12 minutes


@contextmanager
def adding_up(folder: Path) -> Iterator[None]:
    """Where one process at a time adds up the run in a folder: another waits here. The lock ends with the
    process that holds it, however that ends.

    Raises:
        RunError: the other one holds it for longer than `PATIENCE`.
    """
    with open(folder / "run.json") as file:
        started, said = time.monotonic(), False
        while not is_locked(file):
            if time.monotonic() - started > PATIENCE:
                raise RunError(
                    f"another process has been adding up {str(folder)!r} for {PATIENCE / 60:.0f} minutes, or "
                    f"is stopped; the images are done, and the same command goes on once it has ended"
                )
            if not said and time.monotonic() - started > SAID_AFTER:
                said = True
                print(f"waits for another process, which adds up {str(folder)!r}", file=sys.stderr)
            time.sleep(0.1)
        yield


def is_locked(file: IO) -> bool:
    """Whether this process has the lock on a file now; without locks, as on Windows, two that add up at once
    write the same.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
