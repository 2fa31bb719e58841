"""What a classifier says of a picture, from its entry in results.json, in words."""

from __future__ import annotations


def in_words(said: dict) -> str:
    """The class that it says and how sure it is; with a sigmoid head how sure it is of the target, if there
    is one, and of each true class.
    """
    pairs = said.get("of_classes") or [(said["class"], said["confidence"])]
    return ", ".join(f"{name} {probability:.2f}" for name, probability in pairs)


def deciding(said: dict) -> tuple[str, float]:
    """The class that is told where there is room for one, and how sure the classifier is of it: the one that
    it says, or with a sigmoid head the target, or the surest of the true classes.
    """
    name, probability = said.get("of_classes", [(said["class"], said["confidence"])])[0]
    return name, probability
