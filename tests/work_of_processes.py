"""What test_workers.py has done in processes of their own; a module that imports no more than they need."""

import errno
import os
import signal
import time
from pathlib import Path


def write_threads(folder: Path, name: str) -> None:
    import torch

    (folder / name).write_text(str(torch.get_num_threads()))


def fail_or_wait(fails: bool) -> None:
    if fails:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    time.sleep(600)


def die_or_write(path: Path, dies: bool) -> None:
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text("written")
