import numpy as np
import pytest

from evaluate import Prediction, accuracy, attack_success, psnr


def test_psnr_against_its_closed_form():
    clean = np.zeros((8, 8, 3), np.uint8)
    assert psnr(clean, clean + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(clean, clean) == np.inf


def test_success_counts_only_images_that_were_right_before():
    labels = np.array([3, 3, 3, 3])
    before = [Prediction(label, 0.9, 0.9) for label in (3, 3, 3, 7)]
    after = [Prediction(label, 0.9, 0.1) for label in (3, 5, 6, 8)]
    assert attack_success(before, after, labels) == (2, 3)
    assert accuracy(before, labels) == 0.75 and accuracy(after, labels) == 0.25
