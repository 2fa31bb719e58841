"""What randomised smoothing guarantees of an image (Cohen, Rosenfeld and Kolter, "Certified Adversarial
Robustness via Randomized Smoothing", ICML 2019), from the classes that were seen under noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMOOTHING_CHOICE = 10  # draws that choose the class which the others certify
ALPHA = 0.001  # of a certificate, as in Cohen et al.


@dataclass(frozen=True)
class Certificate:
    """What smoothing guarantees of one image: its class within an L2 ball, with probability 1 - ALPHA."""

    label: int
    radius: float  # L2 with values in [0, 1]; 0 where it abstains
    abstains: bool


def certificate(votes: np.ndarray, sigma: float) -> Certificate:
    """The radius `sigma * Phi^-1(p)`, p the Clopper-Pearson bound below the share of the class that the first
    draws choose among the others; it abstains where p is not above a half.

    Args:
        votes: `(draws,)`, classes.
    """
    from scipy.stats import beta, norm

    label = int(np.bincount(votes[:SMOOTHING_CHOICE]).argmax())
    others = votes[SMOOTHING_CHOICE:]
    count = int((others == label).sum())
    bound = beta.ppf(ALPHA, count, len(others) - count + 1) if count else 0.0
    abstains = not bound > 0.5
    return Certificate(label, 0.0 if abstains else float(sigma * norm.ppf(bound)), abstains)
