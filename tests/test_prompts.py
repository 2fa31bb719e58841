"""Class names as prompts: what the text encoder does not take of them is said once."""

import torch

from diffattack.diffusion.inversion import LatentDiffusion

NAMES = ("cat", "a" * 14, "b" * 13 + "cd")  # 16 places, of which BOS and EOS take two


def test_names_that_are_cut_are_said_once(checkpoint, images, capsys):
    diffusion = LatentDiffusion(checkpoint(), NAMES, start_step=19, guidance=1.0)
    capsys.readouterr()
    inversion = diffusion.invert(images, torch.tensor([0, 2, 2]))
    diffusion.invert(images[:2], torch.tensor([1, 2]))
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith(
        f"note: the class name {NAMES[2]!r} has 15 tokens and"
    )
    assert "the text encoder takes 14" in errors and inversion.class_tokens.sum(1).tolist() == [3, 14, 14]
