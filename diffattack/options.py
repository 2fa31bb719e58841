"""Every flag, declared once: its name, type, default, help and range.

The parser, the check, `DiffAttack`, a run's run.json and the table in docs/flags.md are all made from the
dataclasses below (common/flags.py says how); `python -m diffattack.options` prints that table. To add a flag,
add a field: in AttackOptions if `DiffAttack` needs it, else in the group where its readers look for it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from diffattack import ROOT
from diffattack.attacks.library import OURS, attack_name
from diffattack.classifiers.defences import DEFENCES, attack_draws, make_defence, split_name
from diffattack.classifiers.heads import HEADS, THRESHOLD, Head, head_named
from diffattack.classifiers.registry import DEFAULT_TRANSFER_MODELS, REGISTRY, check_name, split_group
from diffattack.common.errors import InputError, RecordError
from diffattack.common.flags import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SIDE,
    SIGMA,
    check_values,
    count,
    flag,
    flag_table,
    iteration_numbers,
    names,
    number,
)
from diffattack.data.dataset import PRESETS, TARGET_COLUMN, target_label
from diffattack.data.records import read_configuration
from diffattack.data.summaries import FIGURE_IMAGES
from diffattack.diffusion.inversion import PREDICTION_TYPES
from diffattack.diffusion.pipeline import Lora, parse_lora
from diffattack.evaluation.budget import Budget, parse_budget
from diffattack.evaluation.seeing import MODELS_OF_SEEING, measure_names
from timestep_weights import SCHEDULES, STUDY_ITERATIONS, WEIGHT_MODES, Pace, parse_schedule, schedule_weights

# what no image depends on, so that a run may go on with another value
of_machine = partial(flag, identifies_run=False)

# what --preset stands for, by the names of flags; flags given beside it win
ATTACK_PRESETS: dict[str, dict[str, object]] = {
    "diffattack": {
        "composition": "decoder",
        "guidance": 2.5,
        "inversion": "diffattack",
        "contrast_limit": 0.0,
        "high_pass": 0.0,
        "colour": 1.0,
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
class DataOptions:
    title = "data"

    images_root: Path = flag(Path("demo/images"), "images to attack, in natural order", "FOLDER")
    label_path: Path | None = flag(
        None, "true classes, a line an image or a table (default: metadata.csv, or folders)", "FILE", Path
    )
    label_base: int | None = flag(None, "what labels count from (default: 1)", parse=int, choices=(0, 1))
    captions: Path | None = flag(
        None, "names of the classes, one a line, or a JSON with id2label (default: ImageNet's)", "FILE", Path
    )
    trust_labels: bool = of_machine(False, "attack although the clean images say that the labels are wrong")
    dataset_name: str = flag(
        "imagenet_compatible", "presets of captions, label base and logit temperature", choices=tuple(PRESETS)
    )
    target_label: int | str | None = flag(
        None, f"make the classifier see this class; or the table's {TARGET_COLUMN}", "N", target_label
    )
    mask_root: Path | None = flag(
        None, "masks named as the pictures, of any size: white may change, black stays", "FOLDER", Path
    )
    save_dir: Path = of_machine(Path("output"), "where results go, and an interrupted run goes on", "FOLDER")
    overwrite: bool = of_machine(False, "delete the results of an earlier run in --save_dir first")
    is_test: bool = of_machine(
        False, "attack nothing: judge the folder of a run, of this tool or of the original DiffAttack"
    )
    figures: str = of_machine(
        "all", "draw each image's figures, the pooled ones and report.html", choices=("all", "pooled", "none")
    )
    figure_images: int = of_machine(
        FIGURE_IMAGES, "of more images, single ones' figures show a sample of so many", "K", range=COUNT
    )
    check: bool = of_machine(False, "try all that is named on the first image, say what to expect, and stop")
    res: int = flag(224, "side of the squares that images are resized to", "PIXELS", range=SIDE)
    limit: int | None = count("attack only the first K images (default: all)", "K", identifies_run=False)


@dataclass
class ModelOptions:
    title = "models"

    pretrained_diffusion_path: str | None = flag(
        None,
        "Stable Diffusion 1.x or 2.x: a folder, a .safetensors file or a hub id (default: the demo's)",
        "PATH",
    )
    lora: Lora | None = flag(
        None, "a LoRA for it, .safetensors; FILE:0.8 adds so much of it", "FILE[:SCALE]", parse_lora
    )
    prediction_type: str | None = flag(
        None, "what the UNet predicts (default: what its scheduler says)", choices=PREDICTION_TYPES
    )
    model_name: tuple[str, ...] = flag(
        ("efficientnet_lite0",),
        f"what is attacked: {', '.join(REGISTRY)}, resnet and such, timm:NAME, hf:NAME, FILE.pt2, "
        "FILE.ts, FILE.py:FUNCTION; or several; each behind defences as NAME@jpeg:75",
        "NAMES",
        names,
    )
    transfer_models: tuple[str, ...] | None = of_machine(
        None, 'judges, perhaps as GROUP=NAME; "" for none (default: two beside the surrogate)', "NAMES", names
    )
    defences: tuple[str, ...] = of_machine(
        (), f"judge behind each of these, too: {', '.join(DEFENCES)}", "jpeg:75,bits:4", names
    )
    judge_draws: int = of_machine(
        1,
        "judge random defences by each of K draws alone, too: the worst, the mean, the vote",
        "K",
        range=COUNT,
    )
    measures: tuple[str, ...] = of_machine(
        (), f"models of seeing, too: {', '.join(MODELS_OF_SEEING)}", "NAMES", measure_names
    )

    @property
    def transfer_names(self) -> tuple[str, ...]:
        """Without groups."""
        return tuple(name for _, name in map(split_group, self.transfer_models))

    @property
    def judges(self) -> tuple[str, ...]:
        """The classifiers that judge beside the surrogates: the transfer classifiers, and all of them behind
        `defences`, but for those that are behind the same defence already.
        """
        behind = (
            f"{name}@{text}"
            for name in self.model_name + self.transfer_names
            for text in self.defences
            if f"@{text}@" not in f"{name}@"
        )
        return tuple(dict.fromkeys((*self.transfer_names, *behind)))


@dataclass
class WeightOptions:
    title = "timestep weights"

    weight_mode: str = flag(
        "uniform",
        "uniform: the original; fixed: a schedule, as the study recommends; learnable: collapses; "
        "learnable_detached: never moves; others: follow each image's losses or gradients",
        choices=WEIGHT_MODES,
    )
    weight_schedule: str | Sequence[float] = flag(
        "learned", f"of mode fixed, early to late: {', '.join(SCHEDULES)}, or 0.1,0.1,0.2,0.2,0.4", "SCHEDULE"
    )
    weight_lr: float | None = number("rate of mode learnable (default: 3e-3 / iterations)", "RATE")
    weight_step: float | None = number(
        "step of modes minimax and uncertainty (default: 3 / iterations)", "STEP"
    )
    weight_pull: float = flag(
        Pace.pull, "pull of minimax towards uniform weights", "PULL", range=NOT_NEGATIVE
    )


@dataclass
class AttackOptions(WeightOptions):
    """What the attack itself depends on: the settings of `DiffAttack`."""

    title = "attack"
    presets = {"preset": ATTACK_PRESETS}

    attack: str = flag(
        OURS,
        f"{OURS}, advad, torchattack:DIFGSM(steps=20), or FILE.py:FUNCTION, within the same budget",
        "NAME",
        attack_name,
    )
    preset: str | None = of_machine(
        None, "diffattack: all that the original does; flags beside it win", choices=tuple(ATTACK_PRESETS)
    )
    diffusion_steps: int = flag(20, "DDIM steps between noise and image", "T")
    start_step: int = flag(15, "the last T - S steps are attacked", "S")
    inversion: str = flag(
        "exact",
        "diffattack: a step further, and bytes cut off, as the original",
        choices=("exact", "diffattack"),
    )
    iterations: int | None = count("steps on the latent (default: 6; 20 with --stop_margin)", "K")
    guidance: float = flag(
        1.0,
        "of the classifier-free kind; at 1 one branch, and no null-text optimisation",
        "SCALE",
        range=NOT_NEGATIVE,
    )
    composition: str = flag(
        "residual", "clean picture plus the attack's change; or as decoded", choices=("residual", "decoder")
    )
    contrast_limit: float | None = number(
        "holds the change around a place to 1/255 + K of the picture's contrast; 0: no limit (default: 0.5)",
        "K",
    )
    high_pass: float | None = number(
        "the change loses what a Gaussian of S pixels keeps; 0: nothing (default: 1.5)", "S", range=SIGMA
    )
    colour: float | None = number("what part of the change's colour is kept (default: 0.3)", "PART")
    latent_optimizer: str = flag(
        "momentum", "momentum within the budget, or adamw as the original", choices=("momentum", "adamw")
    )
    latent_lr: float = flag(0.01, "learning rate of --latent_optimizer adamw", "RATE", range=POSITIVE)
    budget: str | None = flag(
        "psnr=35",
        "of each written picture: psnr=DB, ssim=S or l2=D; or none",
        "MEASURE=VALUE",
        parse=lambda text: None if text.lower() == "none" else text,
    )
    attack_through: tuple[str, ...] | None = flag(
        None, "defences that the gradient goes through (default: resize:0.9)", "DEFENCES", names
    )
    draws: int | None = count("of a random defence in each iteration (default: 8; 4 through diffpure)", "K")
    stop_margin: float | None = number(
        "end an image where every surrogate is wrong by a margin of M logits, in 8 bits", "M"
    )
    judge_at: tuple[int, ...] = flag(
        (), "judge after these iterations, too: transfer over visibility", "K,K,...", iteration_numbers
    )
    attack_loss_weight: float = flag(10.0, "factor of the cross-entropy", "FACTOR", range=NOT_NEGATIVE)
    cross_attn_loss_weight: float = flag(
        10000.0, "factor of the variance of the cross-attention", "FACTOR", range=NOT_NEGATIVE
    )
    self_attn_loss_weight: float = flag(
        100.0, "factor of the change of the self-attention", "FACTOR", range=NOT_NEGATIVE
    )
    structure_share: float | None = number(
        "instead of it a factor of each image's own, with which that gradient is S times the attack's", "S"
    )
    layer_norm: str = flag(
        "mse", "mse: as the original; relative: over each map's mean square", choices=("mse", "relative")
    )
    logit_temperature: float | None = number(
        "that logits are divided by (default: 1; 10 for cub_200_2011, standford_car)", "T", range=POSITIVE
    )
    head: str | None = flag(
        None, "softmax: an image shows one class; sigmoid: any number (default: softmax)", choices=HEADS
    )
    threshold: float | None = number(
        f"with --head sigmoid, above which probability a class is seen (default: {THRESHOLD:g})",
        "P",
        range=SHARE,
    )
    is_apply_mask: bool = flag(False, "change the image only where the true class is looked at")
    is_hard_mask: bool = flag(False, "the same with a mask of zeros and ones")
    seed: int = flag(42, "the same command with the same seed on the same machine writes identical images")

    def __post_init__(self) -> None:
        if self.iterations is None:
            self.iterations = 6 if self.stop_margin is None else 20
        if self.attack_through is None:
            self.attack_through = ("resize:0.9",) if self.attack == OURS and self.stop_margin is None else ()
        is_fine = self.attack == OURS and self.composition == "residual"
        if self.contrast_limit is None:
            self.contrast_limit = 0.5 if is_fine else 0.0
        if self.high_pass is None:
            self.high_pass = 1.5 if is_fine else 0.0
        if self.colour is None:
            self.colour = 0.3 if is_fine else 1.0
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
        """Raises InputError for a value out of its range, and for flags that do not go together."""
        check_values(self)
        head_named(self.head, self.threshold)
        given = [] if self.attack == OURS else [name for name in flags_of_ours() if self.differs(name)]
        if given:
            raise InputError(
                f"--{given[0]} goes with --attack {OURS} alone; others take their own arguments, as in "
                f"torchattack:MIFGSM(steps=20), beside --{', --'.join(FOR_ALL)}"
            )
        if not 1 <= self.start_step < self.diffusion_steps <= 1000:
            steps = f"--start_step is {self.start_step} and --diffusion_steps {self.diffusion_steps}"
            raise InputError(f"{steps}; expected 1 <= start_step < diffusion_steps <= 1000")
        try:
            schedule_weights(self.schedule, self.diffusion_steps - self.start_step)
        except ValueError as error:
            raise InputError(f"--weight_schedule: {error}") from None
        self.verify_change()

    def differs(self, name: str) -> bool:
        """Whether a flag is not at its default."""
        return getattr(self, name) != getattr(DEFAULTS, name)

    def verify_change(self) -> None:
        """Raises InputError for flags of what is changed that do not go together."""
        try:
            budget = self.allowed_change
        except ValueError as error:
            raise InputError(f"--budget: {error}") from None
        limited = (budget, self.contrast_limit, self.high_pass, self.colour) != (None, 0, 0, 1)
        if self.composition == "decoder" and limited:
            without = "--budget none --contrast_limit 0 --high_pass 0 --colour 1"
            raise InputError(f"--composition decoder goes with {without} alone; give those, or residual")
        if self.inversion == "diffattack" and budget:
            raise InputError("--inversion diffattack cuts bytes off, which no --budget knows; give exact")
        if self.attack == OURS and self.latent_optimizer == "momentum" and budget is None:
            raise InputError("--latent_optimizer momentum needs a --budget, such as psnr=35; or give adamw")
        check_each("attack_through", make_defence, self.attack_through)
        if max(self.judge_at, default=0) > self.iterations:
            raise InputError(f"--judge_at goes beyond the {self.iterations} of --iterations")


# what all attacks know, and whose default depends on the attack
BY_ATTACK = ("attack_through", "contrast_limit", "high_pass", "colour")
FOR_ALL = (*BY_ATTACK, "budget", "draws", "logit_temperature", "head", "threshold", "seed")
DEFAULTS = AttackOptions()


def check_each(name: str, check: Callable[[str], object], texts: Iterable[str]) -> None:
    """Raises InputError with the flag's name where one of its texts is refused."""
    for text in texts:
        try:
            check(text)
        except InputError as error:
            raise InputError(f"--{name}: {error}") from None


def flags_of_ours() -> list[str]:
    """The flags of the attack that another attack than ours does not know."""
    return [declared.name for declared in fields(AttackOptions) if declared.name not in (*FOR_ALL, "attack")]


@dataclass
class MachineOptions:
    title = "machine"

    device: str = of_machine("auto", "auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu", "DEVICE")
    dtype: str = flag(
        "auto", "of the diffusion model; auto: bf16 on a GPU that has it", choices=("auto", "fp32", "bf16")
    )
    batch_size: int | None = count(
        "images at once (default: on a GPU by its memory, else 1; 1 in the learnable modes)",
        "B",
        identifies_run=False,
    )
    processes: int | None = count(
        "that share out the images (default: on a CPU one for each core)", "P", identifies_run=False
    )
    compile: bool = of_machine(False, "let torch.compile make iterations quicker, after minutes at first")
    shard: str = of_machine("0/1", "attack the K-th of N parts, from 0; the last adds up", "K/N")
    merge: bool = of_machine(False, "attack nothing: judge and add up the images that are finished")


@dataclass
class Options(MachineOptions, AttackOptions, ModelOptions, DataOptions):
    """All flags of main.py. What a preset decides is None until `fill_in_defaults`."""

    # those that `--help` lists; the others, `--help all`
    common = ("images_root", "label_path", "save_dir", "model_name", "weight_mode", "weight_schedule")
    common += ("budget", "pretrained_diffusion_path", "transfer_models", "defences", "attack", "preset")
    common += ("check", "limit")

    def __post_init__(self) -> None:
        behind = [text for name in self.model_name for text in split_name(name)[1]]
        if self.attack_through is None and behind:
            self.attack_through = ()
        if self.draws is None and behind:
            self.draws = attack_draws([*behind, *self.attack_through])
        super().__post_init__()

    def fill_in_defaults(self) -> None:
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
        """Fills in what a run that is judged had, or else softmax."""
        if self.is_test and self.head is None and (self.images_root / "run.json").is_file():
            with suppress(RecordError):  # which is said where its labels are read
                run = read_configuration(self.images_root)
                self.head = run.get("head", self.head)
                self.threshold = run.get("threshold") if self.threshold is None else self.threshold
        self.head = self.head or HEADS[0]
        if self.head == "sigmoid" and self.threshold is None:
            self.threshold = THRESHOLD

    def verify(self) -> None:
        super().verify()
        if self.mask_root is not None and self.is_apply_mask:
            raise InputError("--is_apply_mask and --mask_root both say where to change; give one of them")
        if self.judge_draws > 1 and self.classifier_head.threshold is not None:
            raise InputError("--judge_draws takes a vote, and --head sigmoid sees many; leave it out")
        if not self.model_name:
            raise InputError("--model_name names no classifier; give one, such as efficientnet_lite0")
        check_each("model_name", check_name, self.model_name)
        check_each("transfer_models", check_name, self.transfer_names)
        check_each("defences", make_defence, filter(None, "@".join(self.defences).split("@")))


if __name__ == "__main__":
    print(flag_table(Options))
