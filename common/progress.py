"""Temporary."""

from tqdm import tqdm


def progress(iterable=None, total=None, desc=None, unit="it"):
    return tqdm(iterable, total=total, desc=desc, unit=unit, leave=False, disable=None)
