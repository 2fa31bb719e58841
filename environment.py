"""What libraries read from the environment when they are imported; so every command imports this first. A
setting of the user's wins.
"""

import os

# GNU OpenMP, which PyTorch uses on Linux, lets threads that wait for others spin by default. Where other
# processes keep the cores busy, the thread that has work to do then waits for one that only spins: an
# iteration was seen to take 18 s instead of 1.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Its advice on image processors has nothing to do with these programs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
