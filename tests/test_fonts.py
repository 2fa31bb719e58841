"""Names in any script are shown in a font that has them, or by a number, and never as boxes."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffattack.plotting import fonts
from diffattack.plotting.draw import captions, save_figure
from diffattack.plotting.image_figures import plot_contact_sheet, short

NAMES = ("大熊猫", "قطة", "꙰ \U0001f43c️ panda", "tabby", "\U000f1234")


@pytest.fixture
def alone(monkeypatch):
    """A system without fonts."""
    monkeypatch.setattr(fonts, "installed", lambda: ())
    fonts.fonts_for.cache_clear()
    yield
    fonts.fonts_for.cache_clear()


class Record:
    row = {
        "file": "猫.png",
        "psnr": 36.0,
        "success": True,
        "before": {"class": "大熊猫", "confidence": 0.9, "label": 389},
        "after": {"class": "tabby", "confidence": 0.8, "label": 282},
    }
    outcome = "fooled"


def drawn(names, path: Path) -> list[str]:
    """The texts as they are shown, with every warning an error."""
    figure = Figure(figsize=(4, 3))
    texts = [figure.text(0.1, 0.1 + 0.15 * k, name) for k, name in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, path)
    assert path.with_suffix(".png").stat().st_size and path.with_suffix(".pdf").stat().st_size
    return [text.get_text() for text in texts]


def test_each_character_has_a_font_that_has_it(tmp_path, capfd):
    shown = drawn(NAMES, tmp_path / "figure")
    assert capfd.readouterr().err == ""  # matplotlib logs what it does not find
    for name, text in zip(NAMES, shown):
        assert text == (name if fonts.can_draw(name) else text) and "tabby" in shown
        families = fonts.fonts_for(fonts.lacking(text))
        for character in fonts.lacking(text):
            assert any(character in fonts.characters_of(path) for path in families)
    assert shown[-1] == "?" and shown[2].endswith(" panda")


def test_a_font_that_is_installed_is_taken(tmp_path):
    chinese = [path for path in fonts.installed() if "猫" in fonts.characters_of(path)]
    if not chinese:
        pytest.skip("no font here has Chinese: apt-get install fonts-noto-cjk")
    assert drawn(["大熊猫"], tmp_path / "figure") == ["大熊猫"]
    assert captions(Record)[0].endswith("大熊猫 0.90")


def test_without_one_a_class_is_its_number(alone, tmp_path, capfd):
    before, after = captions(Record)
    assert before.endswith("\nclass 389 0.90") and after.endswith("\ntabby 0.80")
    picture = np.zeros((8, 8, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(plot_contact_sheet([(picture, picture, before, after)]), tmp_path / "sheet")
    assert drawn(["大熊猫 \\$", short("قطة")], tmp_path / "figure") == ["??? \\$", "قطة"]
    assert capfd.readouterr().err == ""
