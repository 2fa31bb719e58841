"""Class names as prompts: what the text encoder does not take of them is said, before the attack."""

from pathlib import Path

import torch

from diffattack.data.dataset import Item
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.runner.setup import say_cut_names

NAMES = ("cat", "a" * 14, "b" * 13 + "cd", "polar bears")  # 16 places, of which BOS and EOS take two


def test_names_that_are_cut_are_said_once_a_class_of_those_that_images_have(checkpoint, capsys):
    diffusion = LatentDiffusion(checkpoint(), NAMES)
    items = [Item(k, Path(f"{k}.png"), labels) for k, labels in enumerate([(0,), (2,), (2,), (1,), (0, 3)])]
    say_cut_names(diffusion, items[:-1])
    said = capsys.readouterr().err
    said = said[said.index("note:") :]  # after the bar with which the model was saved
    assert said.count("\n") == 1 and said.startswith(f"note: the class name {NAMES[2]!r} has 15 tokens and")
    assert f"the text encoder takes 14; what remains of it is {'b' * 13 + 'c'!r}" in said
    say_cut_names(diffusion, items[-1:])  # "cat, polar bears": each of its letters and the comma is a token
    assert "'cat, polar bears' has " not in capsys.readouterr().err


def test_what_is_said_to_be_taken_is_what_the_encoder_is_given(checkpoint):
    diffusion = LatentDiffusion(checkpoint(), NAMES)
    ((tokens, taken, rest),) = diffusion.cut([NAMES[2]]).values()
    whole, is_prompt = diffusion.embed([NAMES[2]])
    assert (tokens, taken) == (15, 14) and int(is_prompt.sum()) == taken
    # but for the last letter, which is another token at the end of a word
    assert torch.allclose(diffusion.embed([rest])[0][:, :taken], whole[:, :taken], atol=1e-6)
