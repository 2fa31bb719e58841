"""Adversarial examples by diffusion models, as a library; https://arxiv.org/abs/2305.08192.

    from diffattack import DiffAttack, load_pipeline

    attack = DiffAttack(load_pipeline(CHECKPOINT, torch.device("cuda")), classifier, weight_mode="fixed")
    adversarial = attack(images, labels).adversarial  # (B, 3, H, W) in [0, 1]

What it offers is imported when it is asked for, so that this import takes no time, and a command can set what
torch reads when it is imported.
"""

import importlib
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or where this is installed
METHOD = ("diff_latent_attack", "attentionControl", "timestep_weights")  # modules that lie beside the package
OFFERED = {
    "DiffAttack": "diff_latent_attack",
    "AttackResult": "diffattack.diffusion.batch",
    "load_pipeline": "diffattack.diffusion.pipeline",
    "ATTACK_PRESETS": "diffattack.options",
    "parse_budget": "diffattack.evaluation.budget",
}
__all__ = list(OFFERED)  # noqa: PLE0604


def check_method() -> None:
    """Refuses modules of another project that have the names of ours and come before them on the path, as
    those of the original DiffAttack do.

    Raises:
        ImportError: with the file.
    """
    for name in METHOD:
        specification = importlib.util.find_spec(name)
        if specification is None or Path(specification.origin).resolve().parent != ROOT:
            found = specification.origin if specification else "nothing"
            raise ImportError(f"{found} is found for {name}, where {ROOT / name}.py is needed; rename it, or "
                              f"take its folder off the path")  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_method()
    return getattr(importlib.import_module(OFFERED[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *OFFERED]
