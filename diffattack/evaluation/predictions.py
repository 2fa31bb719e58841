"""What a classifier says of pictures, and whether it is right or fooled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch

from diffattack.classifiers.certificates import ALPHA, Certificate
from diffattack.classifiers.defences import Smoothed, split_name
from diffattack.classifiers.heads import SOFTMAX, Head, marked
from diffattack.data.images import Pictures, to_tensor
from diffattack.evaluation.precision import Precision, average_precision
from diffattack.evaluation.stats import Estimate, share


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image."""

    label: int  # of the largest logit
    confidence: float  # probability of that label
    # probability of the true label; of several, of all of them together, with a sigmoid head the largest
    true_confidence: float
    target_confidence: float | None = None  # probability of the target, None without one

    def described(self, class_names: Sequence[str], base: int) -> dict:
        """For results.json: the label counted from `base`, and its class."""
        told = {**asdict(self), "label": self.label + base, "class": class_names[self.label]}
        return {key: value for key, value in told.items() if value is not None}

    @classmethod
    def of_description(cls, description: dict, base: int) -> Prediction:
        """The prediction that `described` described."""
        return cls(
            description["label"] - base,
            description["confidence"],
            description["true_confidence"],
            description.get("target_confidence"),
        )

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """A row of `Predictions.of_columns`."""
        target = np.nan if self.target_confidence is None else self.target_confidence
        return self.label, self.confidence, self.true_confidence, target


class Predictions(Sequence[Prediction]):
    """What a classifier says of images, as arrays `(B,)`: fifty thousand take little room so."""

    def __init__(self, predictions: Iterable[Prediction] = (), logits: np.ndarray | None = None):
        self.take(np.array([p.numbers for p in predictions]).reshape(-1, 4), logits)

    def take(self, columns: np.ndarray, logits: np.ndarray | None) -> None:
        self.labels = columns[:, 0].astype(np.int64)
        self.confidences, self.true_confidences, self.target_confidences = columns[:, 1:].T
        self.logits = logits  # (B, classes), kept of a sigmoid head alone

    @classmethod
    def of_columns(cls, columns: np.ndarray, logits: np.ndarray | None = None) -> Predictions:
        """Of labels, confidences, true and target confidences (NaN without one), `(B, 4)`."""
        found = cls()
        found.take(columns, logits)
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> Prediction:
        target = self.target_confidences[k]
        return Prediction(
            int(self.labels[k]),
            float(self.confidences[k]),
            float(self.true_confidences[k]),
            None if np.isnan(target) else float(target),
        )


@torch.no_grad()
def predict(
    classifier: torch.nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    batch: int = 16,
    head: Head = SOFTMAX,
    targets: np.ndarray | None = None,
) -> Predictions:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)` or `(B, L)`, and whose targets
    `(B,)`, -1 for none.
    """
    predictions, every = [], []
    labels = labels.reshape(len(labels), -1)
    for start in range(0, len(images), batch):
        some = slice(start, start + batch)
        logits = classifier(to_tensor(images[some]).to(device)).cpu()
        probabilities, predicted = head.probabilities(logits), logits.argmax(-1)
        goals = None if targets is None else torch.as_tensor(targets[some])
        sure_of = [
            probabilities.gather(-1, predicted[:, None])[:, 0],
            head.confidence(probabilities, marked(torch.as_tensor(labels[some]), logits.shape[-1])),
            torch.full((len(logits),), torch.nan)
            if goals is None
            else probabilities.gather(-1, goals.clamp(min=0)[:, None])[:, 0].where(goals >= 0, torch.nan),
        ]
        predictions.append(torch.stack([predicted.double(), *(each.double() for each in sure_of)], 1))
        if head.threshold is not None:
            every.append(logits.float())
    columns = torch.cat([torch.zeros(0, 4), *predictions]).numpy()
    return Predictions.of_columns(columns, torch.cat(every).numpy() if every else None)


def correct(predictions: Predictions, labels: np.ndarray, head: Head = SOFTMAX) -> np.ndarray:
    """Whether each prediction says the label, or one of them: `(B,)`."""
    return head.sees(predictions.labels, labels.reshape(len(labels), -1), predictions.true_confidences)


def at_target(predictions: Predictions, targets: np.ndarray | None, head: Head) -> np.ndarray:
    """Whether each prediction says its target `(B,)`, -1 or None where there is none: `(B,)`."""
    if targets is None:
        return np.zeros(len(predictions), bool)
    return (targets >= 0) & head.sees(predictions.labels, targets[:, None], predictions.target_confidences)


def fooled(
    predictions: Predictions, labels: np.ndarray, targets: np.ndarray | None, head: Head = SOFTMAX
) -> np.ndarray:
    """Whether each prediction says the target, or, where there is none, no true label: `(B,)`."""
    wrong = ~correct(predictions, labels, head)
    return wrong if targets is None else np.where(targets >= 0, at_target(predictions, targets, head), wrong)


@dataclass(frozen=True)
class ClassifierResult:
    """What one classifier says of the clean, reconstructed and adversarial images."""

    name: str
    labels: np.ndarray  # (B,) or (B, L)
    before: Predictions
    after: Predictions
    reconstructed: Predictions | None
    targets: np.ndarray | None = None  # (B,)
    # behind smoothing, of the clean and of the adversarial images
    certificates: tuple[list[Certificate], list[Certificate]] | None = None
    head: Head = SOFTMAX

    @property
    def sides(self) -> dict[str, Predictions]:
        """What it says of each kind of picture that there is."""
        sides = {"before": self.before, "reconstructed": self.reconstructed, "after": self.after}
        return {side: said for side, said in sides.items() if said is not None}

    @property
    def network(self) -> str:
        """Its name without defences."""
        return split_name(self.name)[0]

    @property
    def is_defended(self) -> bool:
        return self.name != self.network

    @property
    def correct_before(self) -> np.ndarray:
        """Right before, so that an attack can fool it: `(B,)`. A sigmoid head can say the target beside a
        true class already, which is not right either.
        """
        right = correct(self.before, self.labels, self.head)
        return right & ~at_target(self.before, self.targets, self.head)

    @property
    def misled(self) -> np.ndarray:
        """After the attack wrong, or as the target says, whatever it was before: `(B,)`."""
        return fooled(self.after, self.labels, self.targets, self.head)

    @property
    def fooled(self) -> np.ndarray:
        """Right before, and misled by the attack: `(B,)`."""
        return self.correct_before & self.misled

    @property
    def fooled_by_reconstruction(self) -> np.ndarray:
        """The same of the reconstruction, without any attack."""
        return self.correct_before & fooled(self.reconstructed, self.labels, self.targets, self.head)

    @property
    def correct_reconstructed(self) -> np.ndarray:
        """Right before and on the reconstruction, so that the attack alone can have fooled it: `(B,)`."""
        already = at_target(self.reconstructed, self.targets, self.head)
        return self.correct_before & correct(self.reconstructed, self.labels, self.head) & ~already

    @property
    def accuracy_before(self) -> Estimate:
        return share(correct(self.before, self.labels, self.head).sum(), len(self.labels))

    @property
    def accuracy_reconstructed(self) -> Estimate | None:
        return (
            None
            if self.reconstructed is None
            else share(correct(self.reconstructed, self.labels, self.head).sum(), len(self.labels))
        )

    @property
    def accuracy_after(self) -> Estimate:
        return self.rate("accuracy_after")

    @property
    def success(self) -> Estimate:
        """Attack success rate: misclassified among those classified correctly before."""
        return self.rate("success")

    @property
    def success_of_all(self) -> Estimate:
        """Attack success rate as TransferAttack counts it: misclassified, or given their targets, among all
        images, whether they were classified correctly before or not.
        """
        return self.rate("success_of_all")

    @property
    def success_of_attack_alone(self) -> Estimate | None:
        """`success` without the images that are misclassified on the reconstruction already."""
        return None if self.reconstructed is None else self.rate("success_of_attack_alone")

    @cached_property
    def precisions(self) -> dict[str, Precision]:
        """Of a sigmoid head, how well it tells each class of each kind of picture; else nothing."""
        return {
            side: average_precision(said.logits, self.labels)
            for side, said in self.sides.items()
            if said.logits is not None
        }

    @property
    def mean_precisions(self) -> dict[str, Estimate]:
        """mAP by kind of picture, as results.json names it."""
        return {f"mAP_{side}": precision.mean for side, precision in self.precisions.items()}

    def counts(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Which images a rate counts, by its name here, and which of these it finds: `(B,)` each."""
        everything = np.ones(len(self.labels), bool)
        if figure == "success":
            return self.correct_before, self.fooled
        if figure == "success_of_attack_alone":
            return self.correct_reconstructed, self.fooled & self.correct_reconstructed
        return everything, {
            "success_of_all": self.misled,
            "accuracy_after": correct(self.after, self.labels, self.head),
        }[figure]

    def rate(self, figure: str) -> Estimate:
        counted, found = self.counts(figure)
        return share(found.sum(), counted.sum())

    def described(self, k: int, class_names: Sequence[str], base: int) -> dict[str, dict]:
        """The predictions of the k-th image, for results.json."""
        described = {side: said[k].described(class_names, base) for side, said in self.sides.items()}
        for side, said in self.sides.items():
            if said.logits is not None:
                described[side]["of_classes"] = self.of_classes(k, said.logits[k], class_names)
        return described

    def of_classes(self, k: int, logits: np.ndarray, class_names: Sequence[str]) -> list[list]:
        """Of the k-th image the names and probabilities of its target, if it has one, and its true classes,
        the surest first: the first of all is what decides.
        """
        probabilities = self.head.probabilities(torch.from_numpy(logits)).tolist()
        own = self.labels.reshape(len(self.labels), -1)[k]
        classes = sorted(own[own >= 0].tolist(), key=lambda label: -probabilities[label])
        if self.targets is not None and self.targets[k] >= 0:
            classes.insert(0, int(self.targets[k]))
        return [[class_names[label], probabilities[label]] for label in classes]

    def figures(self) -> dict[str, Estimate | None]:
        return {
            name: getattr(self, name)
            for name in (
                "accuracy_before",
                "accuracy_reconstructed",
                "accuracy_after",
                "success",
                "success_of_all",
                "success_of_attack_alone",
            )
        } | self.mean_precisions


def evaluate_classifier(
    name: str,
    classifier: torch.nn.Module,
    pictures: Pictures,
    device: torch.device,
    of_clean: ClassifierResult | None = None,
    batch: int = 16,
    head: Head = SOFTMAX,
) -> ClassifierResult:
    """Classifies all pictures of a run.

    Args:
        of_clean: what it has said before of the same clean pictures.
        batch: pictures at once.
    """

    def certified_by(images: np.ndarray) -> list[Certificate]:
        return [c for chunk in to_tensor(images).split(batch) for c in classifier.certify(chunk.to(device))]

    def said(images: np.ndarray) -> Predictions:
        return predict(classifier, images, pictures.labels, device, batch, head, pictures.targets)

    after, reconstructed = (
        None if images is None else said(images) for images in (pictures.adversarial, pictures.reconstructed)
    )
    before = of_clean.before if of_clean else said(pictures.clean)
    certificates = None
    if isinstance(classifier, Smoothed):
        clean = of_clean.certificates[0] if of_clean else certified_by(pictures.clean)
        certificates = (clean, certified_by(pictures.adversarial))
    return ClassifierResult(
        name, pictures.labels, before, after, reconstructed, pictures.targets, certificates, head
    )


def certified(result: ClassifierResult) -> dict[str, dict]:
    """What smoothing certifies, of the clean and the adversarial images: how many it abstains on, and the
    median radius of the others.
    """
    told = {}
    for picture, certificates in zip(("clean", "adversarial"), result.certificates):
        radii = [c.radius for c in certificates if not c.abstains]
        told[picture] = {
            "abstains": len(certificates) - len(radii),
            "images": len(certificates),
            "median_radius": float(np.median(radii)) if radii else None,
        }
    return told


def certified_line(result: ClassifierResult) -> str:
    parts = [
        f"abstains on {told['abstains']}/{told['images']} {picture} images"
        + (
            ""
            if told["median_radius"] is None
            else f" and certifies the others at a median radius of {told['median_radius']:.2f}"
        )
        for picture, told in certified(result).items()
    ]
    return f"{result.name}: {', '.join(parts)} (L2, values in [0, 1]; Clopper-Pearson at {1 - ALPHA:.1%})"
