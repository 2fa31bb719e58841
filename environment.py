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


def hide_broken_torchvision() -> None:
    """Lets libraries believe that torchvision is not installed where it cannot be imported, as one for
    another build of torch: transformers would end in a traceback, also for those who need none of it.
    """
    import importlib.util
    import sys

    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None
        os.environ["TORCHVISION_ERROR"] = " ".join(str(error).split())[:120]
