"""Every flag, declared once: its name, type, default, help and range.

The parser, the check, `DiffAttack`, a run's run.json and the table in docs/usage.md are all made from the
dataclasses below, in common/machine.py, data/inputs.py and classifiers/inputs.py (common/flags.py says how);
`python -m diffattack.options` prints that table. To add a flag, add a field: in AttackOptions if `DiffAttack`
needs it, else in the group where its readers look for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from diffattack import ROOT
from diffattack.attacks.names import OURS, attack_name
from diffattack.classifiers.defences import attack_draws, check_defence, defence_names, split_name
from diffattack.classifiers.heads import HEADS, THRESHOLD, Head, head_named, head_of
from diffattack.classifiers.inputs import ModelOptions
from diffattack.classifiers.registry import DEFAULT_TRANSFER_MODELS, check_name
from diffattack.common.errors import InputError, RecordError
from diffattack.common.flags import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    check_values,
    count,
    flag,
    flag_table,
    iteration_numbers,
    number_or_none,
)
from diffattack.common.machine import MachineOptions
from diffattack.data.dataset import PRESETS
from diffattack.data.inputs import DataOptions
from diffattack.data.records import read_configuration
from diffattack.evaluation.budget import Budget, budget_or_none, parse_budget
from timestep_weights import (
    SCHEDULES,
    STUDY_ITERATIONS,
    WEIGHT_MODES,
    Pace,
    parse_schedule,
    schedule_weights,
)

# what --preset stands for, by the names of flags; flags given beside it win
ATTACK_PRESETS: dict[str, dict[str, object]] = {
    "diffattack": {
        "composition": "decoder",
        "guidance": 2.5,
        "inversion": "diffattack",
        "contrast_limit": None,
        "latent_optimizer": "adamw",
        "latent_lr": 0.01,
        "iterations": STUDY_ITERATIONS,
        "weight_lr": Pace.learning_rate,
        "weight_step": Pace.step,
        "budget": None,
        "attack_through": (),
        "draws": 1,
    },
}


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
    weight_lr: float | None = flag(
        None,
        f"learning rate of the weight network in mode learnable (default: the study's {Pace.learning_rate:g} "
        f"times {STUDY_ITERATIONS} / --iterations, so that weights move as far in an image)",
        "RATE",
        parse=float,
        range=NOT_NEGATIVE,
    )
    weight_step: float | None = flag(
        None,
        "how far the weights of modes minimax and uncertainty move in an iteration (default: "
        f"{Pace.step:g} times {STUDY_ITERATIONS} / --iterations)",
        "STEP",
        parse=float,
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
        "end an image where every surrogate's largest wrong logit exceeds the true one by M, in 8 bits; with "
        "--head sigmoid where that of the threshold exceeds each true one",
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
    head: str | None = flag(
        None,
        "softmax: an image shows one class, that of the largest logit; sigmoid: any number, each with its "
        "own probability: the loss is binary cross-entropy, and an image is fooled where none of its true "
        "classes, or where its target, is above --threshold (default: what a model of transformers says of "
        "itself, else softmax)",
        parse=str,
        choices=HEADS,
    )
    threshold: float | None = flag(
        None,
        f"with --head sigmoid, above which probability a class is seen (default: {THRESHOLD:g})",
        "P",
        parse=float,
        range=SHARE,
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
    def classifier_head(self) -> Head:
        """How logits are read; InputError for a threshold beside a head that has none."""
        return head_named(self.head, self.threshold)

    @property
    def allowed_change(self) -> Budget | None:
        """The `budget`; ValueError where it is none."""
        return None if self.budget is None else parse_budget(str(self.budget))

    @property
    def pace(self) -> Pace:
        """How fast the weights of the modes that move them do."""
        return Pace.of(self.iterations, self.weight_step, self.weight_pull, self.weight_lr)

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
        head_named(self.head, self.threshold)
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


FOR_ALL = (
    "attack",
    "budget",
    "contrast_limit",
    "attack_through",
    "draws",
    "logit_temperature",
    "head",
    "threshold",
    "seed",
)
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
        self.fill_in_head()
        if self.pretrained_diffusion_path is None and not self.is_test:
            ours = Path("demo/tiny_diffusion")
            self.pretrained_diffusion_path = str(ours if ours.is_dir() else ROOT / ours)
        if self.label_path is None and self.images_root == Path("demo/images"):
            self.label_path = Path("demo/labels.txt")

    def fill_in_head(self) -> None:
        """Fills in what a run that is judged had, or else what the classifiers say of themselves."""
        if self.is_test and self.head is None and (self.images_root / "run.json").is_file():
            with suppress(RecordError):  # which is said where its labels are read
                run = read_configuration(self.images_root)
                self.head = run.get("head", self.head)
                self.threshold = run.get("threshold") if self.threshold is None else self.threshold
        names = (*self.model_name, *self.transfer_models)
        self.head = head_of(self.head, (check_name(name) for name in names))
        if self.head == "sigmoid" and self.threshold is None:
            self.threshold = THRESHOLD

    def verify(self) -> None:
        super().verify()
        if self.mask_root is not None and self.is_apply_mask:
            raise InputError(
                "--is_apply_mask takes its mask from the attention, --mask_root from files; give one of them"
            )
        if self.judge_draws > 1 and self.classifier_head.threshold is not None:
            raise InputError(
                "--judge_draws takes the vote of the classes that draws see, and --head sigmoid sees many; "
                "leave --judge_draws out"
            )
        if not self.model_name:
            raise InputError(
                "--model_name names no classifier; expected at least one, such as efficientnet_lite0"
            )


if __name__ == "__main__":
    print(flag_table(Options))
