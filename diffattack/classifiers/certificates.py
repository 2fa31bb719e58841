"""What randomised smoothing guarantees of an image (Cohen, Rosenfeld and Kolter, "Certified Adversarial
Robustness via Randomized Smoothing", ICML 2019), from the classes that were seen under noise.
"""

from __future__ import annotations

import numpy as np

SMOOTHING_CHOICE = 10  # draws that choose the class which the others certify
ALPHA = 0.001  # of a certificate, as in Cohen et al.


# what smoothing guarantees of one image: its class within an L2 ball, with probability 1 - ALPHA
CERTIFICATE = np.dtype(
    [
        ("label", np.int64),
        ("radius", np.float64),  # L2 with values in [0, 1]; 0 where it abstains
        ("abstains", np.bool_),
    ]
)
NO_CERTIFICATE = np.array((-1, 0.0, True), CERTIFICATE)


def certificate(votes: np.ndarray, sigma: float) -> np.ndarray:
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
    return np.array((label, 0.0 if abstains else sigma * norm.ppf(bound), abstains), CERTIFICATE)
