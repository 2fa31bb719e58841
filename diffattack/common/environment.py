"""What libraries read from the environment when they are imported; so every command imports this first. A
setting of the user's wins.
"""

import os
import sys
import threading

if None in (sys.stdin, sys.stdout, sys.stderr):  # its number would go to the next file that is opened
    print("error: a standard stream is closed; redirect it to or from /dev/null", file=sys.stderr)
    sys.exit(2)

# GNU OpenMP, which PyTorch uses on Linux, lets threads that wait for others spin by default. Where other
# processes keep the cores busy, the thread that has work to do then waits for one that only spins: an
# iteration was seen to take 18 s instead of 1.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes that wait for others tell of it in dozens of lines of C++.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Its advice on image processors has nothing to do with these programs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():  # a bar in a log is a line a minute
    os.environ.setdefault("TQDM_MININTERVAL", "60")

from tqdm import tqdm  # noqa: E402

# tqdm's own lock takes a semaphore of the system, of which multiprocessing complains at the very end where a
# process was ended that had one.
tqdm.set_lock(threading.RLock())
