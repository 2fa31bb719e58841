"""Lines for the user that need no answer."""

import functools
import multiprocessing
import os
import sys


@functools.cache
def note(text: str) -> None:
    """Says something once; of several processes, the first says it."""
    if int(os.environ.get("RANK", 0)) == 0 and multiprocessing.parent_process() is None:
        print(f"note: {text}", file=sys.stderr)
