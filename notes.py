"""Lines for the user: notes that need no answer, and errors of libraries in one line."""

import functools
import multiprocessing
import os
import sys


@functools.cache
def note(text: str) -> None:
    """Says something once; of several processes, the first says it."""
    if int(os.environ.get("RANK", 0)) == 0 and multiprocessing.parent_process() is None:
        print(f"note: {text}", file=sys.stderr)


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of another library's error, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
