"""Imported by every command before torch, so that a thread that waits for the others sleeps.

GNU OpenMP, which PyTorch uses on Linux, lets waiting threads spin by default. Where other processes keep the cores busy, the thread that has
work to do then waits for one that only spins: an iteration of the attack was seen to take 18 s instead of 1. A setting of the user's wins.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
