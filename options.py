"""Every flag, declared once: its name, type, default, help and range.

The parser, the check, `DiffAttack`, a run's run.json and the table in docs/usage.md are all made from the
dataclasses below, in common/machine.py and in data/inputs.py (common/flags.py says how); `python options.py`
prints that table. To add a flag, add a field: in AttackOptions if `DiffAttack` needs it, else in the group
where its readers look for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from attacks.names import OURS, attack_name
from classifiers.defences import DEFENCES, attack_draws, check_defence, defence_names, split_name
from classifiers.registry import DEFAULT_TRANSFER_MODELS, REGISTRY, classifier_names
from common.errors import InputError
from common.flags import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    check_values,
    count,
    flag,
    flag_table,
    iteration_numbers,
    number_or_none,
)
from common.machine import MachineOptions
from data.dataset import PRESETS
from data.inputs import DataOptions
from evaluation.budget import Budget, budget_or_none, parse_budget
from timestep_weights import SCHEDULES, WEIGHT_MODES, Pace, parse_schedule, schedule_weights

# what --preset stands for, by the names of flags; flags given beside it win
ATTACK_PRESETS: dict[str, dict[str, object]] = {
    "diffattack": {
        "composition": "decoder",
        "guidance": 2.5,
        "inversion": "diffattack",
        "contrast_limit": None,
        "latent_optimizer": "adamw",
        "latent_lr": 0.01,
        "iterations": 30,
        "budget": None,
        "attack_through": (),
        "draws": 1,
    },
}


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
    fid_reference: Path | None = flag(
        None,
        "statistics of other pictures, mu and sigma in an .npz as guided-diffusion, pytorch-fid and "
        "clean-fid write them: adds the Frechet distance to them, in the features of the same network",
        "FILE",
        parse=Path,
        identifies_run=False,
    )

    @property
    def judges(self) -> tuple[str, ...]:
        """The classifiers that judge beside the surrogates: the transfer classifiers, and all of them behind
        `defences`.
        """
        behind = (
            f"{name}@{text}" for name in self.model_name + self.transfer_models for text in self.defences
        )
        return tuple(dict.fromkeys((*self.transfer_models, *behind)))


@dataclass
class WeightOptions:
    title = "timestep weights"

    weight_mode: str = flag(
        "uniform",
        "uniform: the original DiffAttack; fixed: recommended; minimax: go to the timesteps whose structure "
        "suffers most; uncertainty: make every timestep's loss contribute as much; balanced: the "
        "same of its gradient; learnable: collapses; learnable_detached: never moves",
        choices=WEIGHT_MODES,
    )
    weight_schedule: str | Sequence[float] = flag(
        "learned",
        f"weights of mode fixed, early to late: {', '.join(SCHEDULES)}, or numbers such as "
        "0.1,0.1,0.2,0.2,0.4; stretched to the number of attacked timesteps",
        "SCHEDULE",
    )
    weight_lr: float = flag(
        1e-4, "learning rate of the weight network in mode learnable", "RATE", range=NOT_NEGATIVE
    )
    weight_step: float = flag(
        Pace.step,
        "how far the weights of modes minimax and uncertainty move in an iteration",
        "STEP",
        range=NOT_NEGATIVE,
    )
    weight_pull: float = flag(
        Pace.pull,
        "pull towards uniform weights in mode minimax; without it all weight goes to one timestep",
        "PULL",
        range=NOT_NEGATIVE,
    )


@dataclass
class AttackOptions(WeightOptions):
    """What the attack itself depends on: the settings of `DiffAttack`."""

    title = "attack"
    presets = {"preset": ATTACK_PRESETS}

    attack: str = flag(
        OURS,
        f"{OURS}; torchattack:NAME, an attack of that library, with arguments as "
        "torchattack:DIFGSM(eps=8/255,steps=20); FILE.py:FUNCTION, a function of images, labels and "
        "classifier. Within --budget and --contrast_limit, too",
        "NAME",
        parse=attack_name,
    )
    preset: str | None = flag(
        None,
        "diffattack: all that the original does (decoder, guidance 2.5 with null-text optimisation, its "
        "inversion, AdamW, 30 iterations at 0.01, no limit or budget, bytes cut off); flags beside it win",
        parse=str,
        choices=tuple(ATTACK_PRESETS),
        identifies_run=False,
    )
    diffusion_steps: int = flag(20, "DDIM steps between noise and image", "T")
    start_step: int = flag(15, "the last T - S steps are attacked", "S")
    inversion: str = flag(
        "exact",
        "exact: undoes the attack's own steps; diffattack: a step further than where the attack starts, and "
        "bytes cut off instead of rounded, as the original does, to compare with its published figures",
        choices=("exact", "diffattack"),
    )
    iterations: int | None = count("steps on the latent (default: 6; 20 with --stop_margin)", "K")
    guidance: float = flag(
        1.0,
        "classifier-free guidance; at 1 there is one branch, inverted and attacked with the class's prompt, "
        "and no null-text optimisation",
        "SCALE",
        range=NOT_NEGATIVE,
    )
    composition: str = flag(
        "residual",
        "residual: the clean picture and what the attack adds, so that what the autoencoder loses is not "
        "seen; decoder: what the decoder gives, as in the original",
        choices=("residual", "decoder"),
    )
    contrast_limit: float | None = flag(
        1.0,
        "no pixel changes by more than 1/255 + K times the local contrast of the clean picture, so that "
        "nothing shows where an eye would see it; none: no limit",
        "K",
        parse=number_or_none,
        range=NOT_NEGATIVE,
    )
    latent_optimizer: str = flag(
        "momentum",
        "momentum: steps along the sum of normalised gradients, within --budget; adamw: as the original",
        choices=("momentum", "adamw"),
    )
    latent_lr: float = flag(0.01, "learning rate of --latent_optimizer adamw", "RATE", range=POSITIVE)
    budget: str | None = flag(
        "psnr=36.5",
        "how far each picture may change, as it is written: psnr=DB, ssim=S or l2=D; momentum keeps within "
        "it, adamw ends where it would be exceeded; none: no budget",
        "MEASURE=VALUE",
        parse=budget_or_none,
    )
    attack_through: tuple[str, ...] | None = flag(
        None,
        "defences that the gradient goes through and judging does not, so that pictures transfer "
        '(default: resize:0.9; "" with --stop_margin, for surrogates behind defences, and for other attacks)',
        "DEFENCES",
        parse=defence_names,
    )
    draws: int | None = count(
        "draws of a random defence in each iteration of an attack (default: 8; 4 through diffpure, of which "
        "each is a purification and back)",
        "K",
    )
    stop_margin: float | None = flag(
        None,
        "end an image where every surrogate's largest wrong logit exceeds the true one by M, in 8 bits",
        "M",
        parse=number_or_none,
        range=NOT_NEGATIVE,
    )
    judge_at: tuple[int, ...] = flag(
        (),
        "judge pictures after these iterations, too: the curve of transfer over visibility, from one run",
        "K,K,...",
        parse=iteration_numbers,
    )
    attack_loss_weight: float = flag(
        10.0, "factor of the classifier's cross-entropy", "FACTOR", range=NOT_NEGATIVE
    )
    cross_attn_loss_weight: float = flag(
        10000.0, "factor of the variance of the cross-attention", "FACTOR", range=NOT_NEGATIVE
    )
    self_attn_loss_weight: float = flag(
        100.0, "factor of the change of the self-attention", "FACTOR", range=NOT_NEGATIVE
    )
    structure_share: float | None = flag(
        None,
        "instead of --self_attn_loss_weight: a factor for each image, renewed as the attack goes on, with "
        "which the gradient of that term is S times as long as the attack's",
        "S",
        parse=float,
        range=NOT_NEGATIVE,
    )
    layer_norm: str = flag(
        "mse",
        "mse: each layer's mean squared change, as in the original, which counts coarse layers most; "
        "relative: that over the mean square of its unperturbed map, so that each layer's change counts in "
        "proportion to itself",
        choices=("mse", "relative"),
    )
    logit_temperature: float | None = flag(
        None,
        "the attack's loss divides logits by it; above 1 where a classifier is so sure that gradients vanish "
        "(default: 1; 10 for cub_200_2011 and standford_car)",
        "T",
        parse=float,
        range=POSITIVE,
    )
    is_apply_mask: bool = flag(False, "change the image only where the true class is looked at")
    is_hard_mask: bool = flag(False, "the same with a mask of zeros and ones")
    seed: int = flag(42, "the same command with the same seed on the same machine writes identical images")

    def __post_init__(self) -> None:
        if self.iterations is None:
            self.iterations = 6 if self.stop_margin is None else 20
        if self.attack_through is None:
            ours = self.attack == OURS and self.stop_margin is None
            self.attack_through = ("resize:0.9",) if ours else ()
        if self.draws is None:
            self.draws = attack_draws(self.attack_through)

    @property
    def allowed_change(self) -> Budget | None:
        """The `budget`; ValueError where it is none."""
        return None if self.budget is None else parse_budget(self.budget)

    @property
    def schedule(self) -> tuple[float, ...]:
        """The numbers of `weight_schedule`; ValueError where it is the name of none."""
        named = isinstance(self.weight_schedule, str)
        return parse_schedule(self.weight_schedule) if named else tuple(self.weight_schedule)

    def verify(self) -> None:
        """Raises InputError for a value out of its range, steps that leave no timestep, or a schedule that
        does not fit them.
        """
        check_values(self)
        self.verify_attack()
        if not 1 <= self.start_step < self.diffusion_steps <= 1000:
            raise InputError(
                f"--start_step is {self.start_step} and --diffusion_steps {self.diffusion_steps}; expected "
                f"1 <= start_step < diffusion_steps <= 1000"
            )
        try:
            schedule_weights(self.schedule, self.diffusion_steps - self.start_step)
        except ValueError as error:
            raise InputError(f"--weight_schedule: {error}") from None
        self.verify_change()

    def verify_attack(self) -> None:
        """Raises InputError for flags of the latent attack beside another one."""
        if self.attack == OURS:
            return
        given = [name for name in flags_of_ours() if getattr(self, name) != getattr(DEFAULTS, name)]
        if given:
            raise InputError(
                f"--{given[0]} goes with --attack {OURS} alone; another attack has its own arguments, as "
                f"torchattack:MIFGSM(steps=20), beside {', '.join(f'--{name}' for name in FOR_ALL[1:])}"
            )

    def verify_change(self) -> None:
        """Raises InputError for flags of what is changed that do not go together."""
        try:
            budget = self.allowed_change
        except ValueError as error:
            raise InputError(f"--budget: {error}") from None
        if self.composition == "decoder" and (budget or self.contrast_limit is not None):
            raise InputError(
                "--composition decoder shows what the autoencoder loses, which neither --contrast_limit nor "
                "--budget can bound; give --composition residual, or --preset diffattack without them"
            )
        if self.inversion == "diffattack" and budget:
            raise InputError("--inversion diffattack cuts bytes off, which no --budget knows; give exact")
        if self.attack == OURS and self.latent_optimizer == "momentum" and budget is None:
            raise InputError("--latent_optimizer momentum needs a --budget, such as psnr=37; or give adamw")
        for text in self.attack_through:
            check_defence(text)
        if max(self.judge_at, default=0) > self.iterations:
            raise InputError(
                f"--judge_at names iteration {max(self.judge_at)}, and --iterations is {self.iterations}"
            )


FOR_ALL = ("attack", "budget", "contrast_limit", "attack_through", "draws", "logit_temperature", "seed")
DEFAULTS = AttackOptions()


def flags_of_ours() -> list[str]:
    """The flags of the attack that another attack than ours does not know."""
    return [declared.name for declared in fields(AttackOptions) if declared.name not in FOR_ALL]


@dataclass
class Options(MachineOptions, AttackOptions, ModelOptions, DataOptions):
    """All flags of main.py. What a preset decides is None until `fill_in_defaults`."""

    def __post_init__(self) -> None:
        behind = [text for name in self.model_name for text in split_name(name)[1]]
        if self.attack_through is None and behind:
            self.attack_through = ()
        if self.draws is None and behind:
            self.draws = attack_draws([*behind, *self.attack_through])
        super().__post_init__()

    def fill_in_defaults(self) -> None:
        """Fills in what depends on --dataset_name and on whether these are the demo's images."""
        preset = PRESETS[self.dataset_name]
        if self.label_base is None:
            self.label_base = preset.label_base
        if self.logit_temperature is None:
            self.logit_temperature = preset.logit_temperature
        if self.transfer_models is None:
            self.transfer_models = () if self.captions or preset.class_names else DEFAULT_TRANSFER_MODELS
        if self.pretrained_diffusion_path is None and not self.is_test:
            self.pretrained_diffusion_path = "demo/tiny_diffusion"
        if self.label_path is None and self.images_root == Path("demo/images"):
            self.label_path = Path("demo/labels.txt")

    def verify(self) -> None:
        super().verify()
        if self.mask_root is not None and self.is_apply_mask:
            raise InputError(
                "--is_apply_mask takes its mask from the attention, --mask_root from files; give one of them"
            )
        if not self.model_name:
            raise InputError(
                "--model_name names no classifier; expected at least one, such as efficientnet_lite0"
            )


if __name__ == "__main__":
    print(flag_table(Options))
