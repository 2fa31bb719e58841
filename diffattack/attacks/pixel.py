"""An attack on pixels as a run sees it: the same calls as of `DiffAttack`, without a diffusion model.

    attack = PixelAttack("torchattack:MIFGSM", classifier, budget=parse_budget("psnr=37"))
    result = attack(images, labels)             # (B, 3, H, W) in [0, 1] and (B,)
    result.adversarial                          # (B, 3, H, W) in [0, 1]

Each image is attacked by itself, from the same seed, so that images never influence each other: what comes
out is what the attack itself gives of that image and seed, unless a budget or a limit is asked for. Both are
the latent attack's: the picture that is written is the strongest within the budget, found by the attack's
radius or, where it has none, by a part of its change; and the change around each place keeps to the limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size

from diffattack.attacks.library import Method, load_attack, parse_attack
from diffattack.attacks.limited import strongest
from diffattack.classifiers.arguments import checked_arguments, checked_classifiers
from diffattack.classifiers.defences import defend, under_attack
from diffattack.classifiers.heads import SOFTMAX, Head, marked
from diffattack.common.errors import AttackError, InputError, NonFiniteLossError, one_line
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.records import AttackRecord
from diffattack.diffusion.batch import AttackResult, stacked
from diffattack.diffusion.composition import Composition, change_limits
from diffattack.evaluation.budget import Budget

if TYPE_CHECKING:
    from diffattack.diffusion.inversion import LatentDiffusion

OUT_OF_THE_WAY = -1e4  # of the logit of a true class that another one stands for


@dataclass(frozen=True)
class GivenImages:
    """What is attacked, as `DiffAttack` has it after inversion."""

    images: torch.Tensor  # (B, 3, H, W) in [0, 1]
    labels: torch.Tensor  # (B, L), -1 where an image has fewer than another
    targets: torch.Tensor  # (B,), -1 where there is none
    masks: torch.Tensor | None = None  # (B, 1, H, W) in [0, 1]; 0: may not change


class Surrogates(torch.nn.Module):
    """The surrogates as an attack of a library sees them: one classifier of images `(N, 3, H, W)` in [0, 1],
    whose logits are the mean of theirs (Dong et al., CVPR 2018); it keeps what it says of the first image of
    each batch.

    With a sigmoid head a library's cross-entropies and largest logits mean nothing. It sees two classes then:
    its target or first label, with how far the logit of the target or of the surest true class is above the
    threshold; and another at 0. So cross-entropy is the binary one, and the largest says what is seen.

    Args:
        labels: `(1, L)`. Where an image has several, the first of them stands for all: its probability is
            theirs together, and the others' is none.
        target: of a targeted attack.
    """

    def __init__(
        self,
        classifiers: Sequence[torch.nn.Module],
        labels: torch.Tensor,
        temperature: float,
        head: Head = SOFTMAX,
        target: int | None = None,
    ):
        super().__init__()
        self.classifiers, self.temperature = torch.nn.ModuleList(classifiers), temperature
        self.true = labels[0][labels[0] >= 0]
        self.head, self.target = head, target
        self.looks: list[torch.Tensor] = []  # (classifiers, 1, classes) each

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # behind random defences also without a gradient by the attack's draws, not by those of the judges
        logits = torch.stack([under_attack(one, images, len(self.looks)) for one in self.classifiers])
        self.looks.append(logits[:, :1].detach())
        logits = logits.mean(0)
        if self.head.threshold is not None:
            return self.of_two(logits)
        logits = logits / self.temperature
        if len(self.true) > 1:
            together = logits[:, self.true].logsumexp(1, keepdim=True)
            logits = logits.index_fill(1, self.true, OUT_OF_THE_WAY)
            logits = logits.index_copy(1, self.true[:1], together)
        return logits

    def of_two(self, logits: torch.Tensor) -> torch.Tensor:
        """What a sigmoid head says of one question, as logits `(N, classes)`, at least two."""
        classes_of = self.true if self.target is None else self.true.new_tensor([self.target])
        over = (logits[:, classes_of].amax(1, keepdim=True) - self.head.edge) / self.temperature
        classes = max(2, logits.shape[1])
        answers = logits.new_full((len(logits), classes), OUT_OF_THE_WAY)
        answers = answers.index_fill(1, (classes_of[:1] + 1) % classes, 0.0)
        return answers.index_copy(1, classes_of[:1], over)


class PixelAttack:
    """Attack on a classifier, or several at once, in pixels.

    Args:
        attack: its name, or what `load_attack` makes of it.
        classifier: maps images `(B, 3, H, W)` in [0, 1] to logits `(B, classes)`, differentiably.
        class_names: of the classifier's outputs.
        budget: within which each picture keeps, as it is written.
        contrast_limit, high_pass, colour: what limits the change at each place; see `Composition`.
        attack_through, draws: defences that the gradient goes through, and how often a random one is drawn.
        logit_temperature: that the attack sees logits divided by.
        head: of the classifiers; see `Surrogates` for what the attack sees of a sigmoid head.
        seed: of what the attack draws, the same for each image.
        diffusion: the model of defences that need one.
    Raises:
        InputError: there is no such attack, or it does not take these arguments.
    """

    checkpointing, dtype = True, torch.float32
    # in place of a controller of timestep weights, of which there are none
    controller = SimpleNamespace(state=lambda: torch.zeros(0), load_state=lambda state: None)

    def __init__(
        self,
        attack: str | Method,
        classifier: torch.nn.Module | Sequence[torch.nn.Module],
        class_names: Sequence[str] = IMAGENET_CLASSES,
        *,
        budget: Budget | None = None,
        contrast_limit: float = 0.0,
        high_pass: float = 0.0,
        colour: float = 1.0,
        attack_through: Sequence[str] = (),
        draws: int = 1,
        logit_temperature: float = 1.0,
        seed: int = 42,
        device: torch.device | str = "cpu",
        diffusion: LatentDiffusion | None = None,
        head: Head = SOFTMAX,
    ):
        if isinstance(attack, str):
            attack = load_attack(parse_attack(attack), len(class_names))
        self.method, self.class_names, self.head = attack, class_names, head
        self.budget, self.contrast_limit = budget, contrast_limit
        self.high_pass, self.colour = high_pass, colour
        self.temperature, self.seed, self.pipeline = logit_temperature, seed, diffusion and diffusion.pipeline
        self.device, self.diffusion = torch.device(device), diffusion
        self.classifiers = checked_classifiers(classifier)
        self.attacked = [defend(one, attack_through, diffusion, draws, head) for one in self.classifiers]

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | Sequence,
        targets: torch.Tensor | Sequence[int] | None = None,
        progress: Callable[[int, torch.Tensor], None] | None = None,
        masks: torch.Tensor | None = None,
    ) -> AttackResult:
        """As of `DiffAttack`."""
        return self.attack(self.invert(*checked_arguments(self, images, labels, targets, masks)), progress)

    def invert(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> GivenImages:
        """There is nothing to invert.

        Raises:
            InputError: there is a target, and the attack knows none.
        """
        targets = torch.full((len(images),), -1) if targets is None else targets
        if (targets >= 0).any() and not self.method.takes_targets:
            raise InputError(f"attack {self.method.name.text} is not targeted; give no targets")
        labels = labels.view(len(images), -1)
        given = (images.float(), labels, targets, masks)
        return GivenImages(*(None if part is None else part.to(self.device) for part in given))

    def attack(
        self, given: GivenImages, progress: Callable[[int, torch.Tensor], None] | None = None
    ) -> AttackResult:
        """Attacks one image after the other, as far as the budget allows; it says nothing on its way.

        Raises:
            NonFiniteLossError: what the attack returns is not finite.
            AttackError: the attack fails.
        """
        pictures, searches, looks = zip(*(self.attack_one(given, k) for k in range(len(given.images))))
        steps, record = torch.tensor([*map(len, looks)]), self.record(given, looks)
        return AttackResult(torch.cat(pictures), None, record, steps, None, {}, list(searches))

    def attack_one(
        self, given: GivenImages, k: int
    ) -> tuple[torch.Tensor, tuple[float | None, int], list[torch.Tensor]]:
        """The picture of the k-th image; the radius and how many runs it took to find it; and the surrogates'
        logits `(classifiers, 1, classes)` each time that the attack looked at them, of pictures as it looked
        at them, which may be transformed.
        """
        clean, first, runs = given.images[k : k + 1], self.method.radius, 1
        looks: dict[float | None, list[torch.Tensor]] = {}  # by the radius of the run

        def run(radius: float | None) -> torch.Tensor:
            picture, looks[radius] = self.run(given, k, radius)
            if not picture.isfinite().all():
                raise NonFiniteLossError(len(looks[radius]), "attack", k)
            return picture.clamp(0, 1)

        if self.budget is not None and first is not None:
            picture, radius, runs = strongest(run, clean, self.budget, first)
        else:
            picture, radius = run(None), None
            picture = picture if self.budget is None else self.budget.hold(clean, picture)
        return picture, (radius, runs), looks[radius]

    def run(
        self, given: GivenImages, k: int, radius: float | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The attack itself on the k-th image, `(1, 3, H, W)`, and what it saw."""
        images, labels, target = (part[k : k + 1] for part in (given.images, given.labels, given.targets))
        mask = None if given.masks is None else given.masks[k : k + 1]
        goal = int(target) if bool(target >= 0) else None
        seen = Surrogates(self.attacked, labels, self.temperature, self.head, goal)
        targets = None if goal is None else target
        composition = self.composition(images, mask)
        try:
            with seeded(self.seed, self.device), torch.enable_grad():
                picture = self.method(images, labels[:, 0], seen, radius, targets, composition)
        except (Exception, SystemExit) as error:  # a library's or a user's code raises whatever it likes
            if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
                raise
            raise AttackError(
                f"--attack {self.method.name.text} fails with {type(error).__name__} on images "
                f"{tuple(images.shape)} ({one_line(error)}); look at its arguments, or give another attack",
                k,
            ) from None
        return picture, seen.looks

    def composition(self, images: torch.Tensor, mask: torch.Tensor | None) -> Composition | None:
        """What limits the change of images `(B, 3, H, W)`, with the mask of the first `(1, 1, H, W)`."""
        if mask is None and (self.contrast_limit, self.high_pass, self.colour) == (0, 0, 1):
            return None
        limits = change_limits(images, self.contrast_limit)
        return Composition(images, images, limits, mask, self.high_pass, self.colour)

    def record(self, given: GivenImages, looks: Sequence[Sequence[torch.Tensor]]) -> AttackRecord:
        """What the record keeps of the looks at each image; of timesteps and attention there is nothing."""
        none, images, history = torch.zeros(1, 1, len(self.class_names), device=self.device), len(looks), []
        looks = [each or [none] for each in looks]
        for number in range(max(map(len, looks))):
            rows = torch.tensor([k for k, each in enumerate(looks) if number < len(each)])
            logits = torch.cat([looks[k][number] for k in rows.tolist()], 1)
            probabilities, labels = self.head.probabilities(logits).mean(0), given.labels[rows]
            look = {
                "attack_loss": self.head.cross_entropy(logits, labels, given.targets[rows], 1.0),
                "confidence": self.head.confidence(probabilities, marked(labels, logits.shape[-1])),
                "fooled": self.head.fooled(logits, labels, given.targets[rows]).all(0),
            }
            history.append((rows, look))
        arrays = stacked(history, images, len(history))
        unknown = ("self_attention_loss", "cross_attention_loss", "self_attention_factor", "distance")
        return AttackRecord(
            **arrays,
            **dict.fromkeys(unknown, torch.full_like(arrays["attack_loss"], torch.nan)),
            total_loss=arrays["attack_loss"],
            timesteps=torch.zeros(0, dtype=torch.long),
            layers=[],
            grids=[],
            class_tokens=[[]] * images,
            gradient_iterations=[],
            weights=torch.zeros(len(history), 0),
            layer_losses=torch.zeros(len(history), 0, 0, images),
            reference_squares=torch.zeros(0, 0, images),
            gradient_norms=torch.zeros(0, 3, images),
            class_attention=torch.zeros(2, 0, 0, 0, images),
            components=torch.zeros(2, 3, 0, 0, images),
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, all that attacks draw from begins at the seed; afterwards it is as it was."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
