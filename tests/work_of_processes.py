"""What test_processes.py has done in processes of their own; a module that imports no more than they need."""

import errno
import operator
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def named_by(parent: int) -> Callable[[int], tuple[int, object]]:
    """What says of a part which process, as it was prepared, has had it."""
    prepared = object()
    assert os.getpid() != parent
    return lambda part: (part, (os.getpid(), id(prepared)))


def caller() -> Callable:
    """What calls parts."""
    return operator.call


def fail_or_wait(fails: bool) -> None:
    if fails:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    time.sleep(600)


def die_or_write(path: Path, dies: bool) -> None:
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text("written")
