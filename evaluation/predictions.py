"""What a classifier says of pictures, and whether it is right or fooled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from classifiers.certificates import ALPHA, Certificate
from classifiers.defences import Smoothed, split_name
from data.images import Pictures, to_tensor
from evaluation.stats import Estimate, share


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image."""

    label: int
    confidence: float  # probability of that label
    true_confidence: float  # probability of the true label, or of all of them

    def described(self, class_names: Sequence[str], base: int) -> dict:
        """For results.json: the label counted from `base`, and its class."""
        return {**asdict(self), "label": self.label + base, "class": class_names[self.label]}

    @classmethod
    def of_description(cls, description: dict, base: int) -> Prediction:
        """The prediction that `described` described."""
        return cls(description["label"] - base, description["confidence"], description["true_confidence"])


class Predictions(Sequence[Prediction]):
    """What a classifier says of images, as arrays `(B,)`: fifty thousand take little room so."""

    def __init__(self, predictions: Iterable[Prediction] = ()):
        columns = np.array([(p.label, p.confidence, p.true_confidence) for p in predictions]).reshape(-1, 3)
        self.labels = columns[:, 0].astype(np.int64)
        self.confidences, self.true_confidences = columns[:, 1], columns[:, 2]

    @classmethod
    def of_columns(cls, columns: np.ndarray) -> Predictions:
        """Of labels, confidences and true confidences, `(B, 3)`."""
        found = cls()
        found.labels = columns[:, 0].astype(np.int64)
        found.confidences, found.true_confidences = columns[:, 1], columns[:, 2]
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> Prediction:
        return Prediction(int(self.labels[k]), float(self.confidences[k]), float(self.true_confidences[k]))


@torch.no_grad()
def predict(
    classifier: torch.nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device, batch: int = 16
) -> Predictions:
    """Classifies 8-bit images `(B, H, W, 3)`, whose true labels are `(B,)` or `(B, L)`."""
    predictions = []
    for start in range(0, len(images), batch):
        probabilities = classifier(to_tensor(images[start : start + batch]).to(device)).softmax(-1)
        confidences, predicted = probabilities.max(-1)
        for row, c, p, label in zip(
            probabilities, confidences, predicted, labels.reshape(len(labels), -1)[start : start + batch]
        ):
            predictions.append(Prediction(int(p), float(c), float(row[label[label >= 0]].sum())))
    return Predictions(predictions)


def correct(predictions: Predictions, labels: np.ndarray) -> np.ndarray:
    """Whether each prediction is the label, or one of them: `(B,)`."""
    return (predictions.labels[:, None] == labels.reshape(len(labels), -1)).any(1)


def fooled(predictions: Predictions, labels: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
    """Whether each prediction is the target, or, where there is none, no true label: `(B,)`."""
    wrong = ~correct(predictions, labels)
    return wrong if targets is None else np.where(targets >= 0, predictions.labels == targets, wrong)


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

    @property
    def network(self) -> str:
        """Its name without defences."""
        return split_name(self.name)[0]

    @property
    def is_defended(self) -> bool:
        return self.name != self.network

    @property
    def correct_before(self) -> np.ndarray:
        return correct(self.before, self.labels)

    @property
    def misled(self) -> np.ndarray:
        """After the attack wrong, or as the target says, whatever it was before: `(B,)`."""
        return fooled(self.after, self.labels, self.targets)

    @property
    def fooled(self) -> np.ndarray:
        """Right before, and misled by the attack: `(B,)`."""
        return self.correct_before & self.misled

    @property
    def fooled_by_reconstruction(self) -> np.ndarray:
        """The same of the reconstruction, without any attack."""
        return self.correct_before & fooled(self.reconstructed, self.labels, self.targets)

    @property
    def correct_reconstructed(self) -> np.ndarray:
        """Right before and on the reconstruction, so that the attack alone can have fooled it: `(B,)`."""
        return self.correct_before & correct(self.reconstructed, self.labels)

    @property
    def accuracy_before(self) -> Estimate:
        return share(self.correct_before.sum(), len(self.labels))

    @property
    def accuracy_reconstructed(self) -> Estimate | None:
        return (
            None
            if self.reconstructed is None
            else share(correct(self.reconstructed, self.labels).sum(), len(self.labels))
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

    def counts(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Which images a rate counts, by its name here, and which of these it finds: `(B,)` each."""
        everything = np.ones(len(self.labels), bool)
        if figure == "success":
            return self.correct_before, self.fooled
        if figure == "success_of_attack_alone":
            return self.correct_reconstructed, self.fooled & self.correct_reconstructed
        return everything, {
            "success_of_all": self.misled,
            "accuracy_after": correct(self.after, self.labels),
        }[figure]

    def rate(self, figure: str) -> Estimate:
        counted, found = self.counts(figure)
        return share(found.sum(), counted.sum())

    def described(self, k: int, class_names: Sequence[str], base: int) -> dict[str, dict]:
        """The predictions of the k-th image, for results.json."""
        predictions = {"before": self.before, "reconstructed": self.reconstructed, "after": self.after}
        return {
            picture: of_images[k].described(class_names, base)
            for picture, of_images in predictions.items()
            if of_images is not None
        }

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
        }


def evaluate_classifier(
    name: str,
    classifier: torch.nn.Module,
    pictures: Pictures,
    device: torch.device,
    of_clean: ClassifierResult | None = None,
    batch: int = 16,
) -> ClassifierResult:
    """Classifies all pictures of a run.

    Args:
        of_clean: what it has said before of the same clean pictures.
        batch: pictures at once.
    """

    def certified_by(images: np.ndarray) -> list[Certificate]:
        return [c for chunk in to_tensor(images).split(batch) for c in classifier.certify(chunk.to(device))]

    after, reconstructed = (
        None if images is None else predict(classifier, images, pictures.labels, device, batch)
        for images in (pictures.adversarial, pictures.reconstructed)
    )
    before = (
        of_clean.before if of_clean else predict(classifier, pictures.clean, pictures.labels, device, batch)
    )
    certificates = None
    if isinstance(classifier, Smoothed):
        clean = of_clean.certificates[0] if of_clean else certified_by(pictures.clean)
        certificates = (clean, certified_by(pictures.adversarial))
    return ClassifierResult(
        name, pictures.labels, before, after, reconstructed, pictures.targets, certificates
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
