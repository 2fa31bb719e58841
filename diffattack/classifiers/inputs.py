"""The flags of the networks: the diffusion model, the classifiers that are attacked, and what judges."""

from __future__ import annotations

from dataclasses import dataclass

from diffattack.classifiers.defences import DEFENCES, defence_names
from diffattack.classifiers.registry import DEFAULT_TRANSFER_MODELS, REGISTRY, classifier_names
from diffattack.common.flags import COUNT, flag
from diffattack.diffusion.inversion import PREDICTION_TYPES
from diffattack.diffusion.pipeline import Lora, parse_lora


@dataclass
class ModelOptions:
    title = "models"

    pretrained_diffusion_path: str | None = flag(
        None,
        "Stable Diffusion 1.x or 2.x: a folder in diffusers format, or a hub id (default: "
        "demo/tiny_diffusion; with --is_test none)",
        "PATH",
        parse=str,
    )
    lora: Lora | None = flag(
        None,
        "a LoRA for the diffusion model, .safetensors as diffusers or kohya's scripts write it; FILE:0.8 "
        "adds so much of it",
        "FILE[:SCALE]",
        parse=parse_lora,
    )
    prediction_type: str | None = flag(
        None,
        "what the UNet predicts, where the checkpoint does not say it, as single files do not (default: what "
        "its scheduler says)",
        parse=str,
        choices=PREDICTION_TYPES,
    )
    model_name: tuple[str, ...] = flag(
        ("efficientnet_lite0",),
        "the classifier that is attacked (the surrogate), or several, separated by commas: "
        f"{', '.join(REGISTRY)}, a short name of --list_models, timm:NAME, hf:ORG/NAME, hf:FOLDER, FILE.pt2, "
        "FILE.ts or FILE.py:FUNCTION; each with defences as NAME@resize:0.9@jpeg:75",
        "NAMES",
        parse=classifier_names,
    )
    list_models: bool = flag(False, "list the short names of classifiers, and stop", identifies_run=False)
    transfer_models: tuple[str, ...] | None = flag(
        None,
        'classifiers that judge whether the attack transfers, separated by commas; "" for none '
        f"(default: {','.join(DEFAULT_TRANSFER_MODELS)}; none for classes other than ImageNet's)",
        "NAMES",
        parse=classifier_names,
        identifies_run=False,
    )
    defences: tuple[str, ...] = flag(
        (),
        "judge each classifier behind each of these, too, separated by commas: "
        f"{', '.join(DEFENCES)}, with their numbers, such as jpeg:75,bits:4,diffpure:100",
        "DEFENCES",
        parse=defence_names,
        identifies_run=False,
    )
    judge_draws: int = flag(
        1,
        "judge random defences (resize, smoothing, diffpure) by each of K draws alone, too, where K is above "
        "1: by the worst of them, their mean and their majority vote",
        "K",
        range=COUNT,
        identifies_run=False,
    )

    @property
    def judges(self) -> tuple[str, ...]:
        """The classifiers that judge beside the surrogates: the transfer classifiers, and all of them behind
        `defences`, but for those that are behind the same defence already.
        """
        behind = (
            f"{name}@{text}"
            for name in self.model_name + self.transfer_models
            for text in self.defences
            if f"@{text}@" not in f"{name}@"
        )
        return tuple(dict.fromkeys((*self.transfer_models, *behind)))
