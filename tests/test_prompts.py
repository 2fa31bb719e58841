"""Class names as prompts: what the text encoder does not take of them is said, before the attack."""

from pathlib import Path

from diffattack.data.dataset import Item
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.runner.setup import say_cut_names

NAMES = ("cat", "a" * 14, "b" * 13 + "cd", "polar bears")  # 16 places, of which BOS and EOS take two


def test_names_that_are_cut_are_said_once_a_class_of_those_that_images_have(checkpoint, capsys):
    diffusion = LatentDiffusion(checkpoint(), NAMES)
    items = [Item(k, Path(f"{k}.png"), labels) for k, labels in enumerate([(0,), (2,), (2,), (1,), (0, 3)])]
    capsys.readouterr()
    say_cut_names(diffusion, items[:-1])
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith(
        f"note: the class name {NAMES[2]!r} has 15 tokens and"
    )
    assert "the text encoder takes 14" in errors and int(diffusion.embed([NAMES[2]])[1].sum()) == 14
    say_cut_names(diffusion, items[-1:])  # "cat, polar bears": each of its letters and the comma is a token
    assert "'cat, polar bears' has " not in capsys.readouterr().err
