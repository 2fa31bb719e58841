"""What libraries read from the environment when they are imported; so every command imports this first. A
setting of the user's wins.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from diffattack import ROOT

# A standard stream that is closed would lend its number to the next file that is opened, which what writes to
# the stream, here or in another process, would then write into.
for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115

# GNU OpenMP, which PyTorch uses on Linux, lets threads that wait for others spin by default. Where other
# processes keep the cores busy, the thread that has work to do then waits for one that only spins: an
# iteration was seen to take 18 s instead of 1.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes that wait for others tell of it in dozens of lines of C++, and common/device.py in one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Its advice on image processors has nothing to do with these programs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# tqdm's own lock takes a semaphore of the system, of which multiprocessing complains at the very end where a
# process was ended that had one.
tqdm.set_lock(threading.RLock())


# Ctrl-C while libraries are imported ends a command at once, as SIGTERM does: an exception may be caught
# halfway in C, and something else fails then. `common.commands.run_program` answers it from then on. The
# main module of a process that another one started is none of these while it is imported.
COMMANDS = [ROOT / f"{name}.py" for name in ("main", "compare", "utils", "benchmark")]
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").absolute() in COMMANDS:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

DECLARED: list = []  # what torch.library declares lasts as long as these objects


def mend_torchvision() -> None:
    """Makes a torchvision importable that was built for another torch, as one with CUDA beside a CPU-only
    torch: its import ends at compiled operators that are missing, and with it that of transformers,
    torchmetrics and timm, which use its transforms alone. The operators are declared, without any code; what
    cannot be mended so is hidden.
    """
    import importlib.util
    import re

    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    for _ in range(20):  # each attempt names the next operator that is missing
        try:
            import torchvision  # noqa: F401

            return
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                break
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DECLARED.append(library)
    sys.modules["torchvision"] = None
