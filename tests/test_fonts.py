"""Names in any script are drawn, in a font that has them where there is one, and without a word otherwise."""

import warnings

import pytest
from matplotlib.figure import Figure

from diffattack.plotting.draw import save_figure
from diffattack.plotting.figures import new_figure, styled


@styled
def figure_of(name: str) -> Figure:
    return new_figure(name, [name], [""])[0]


@pytest.mark.parametrize("name", ["大熊猫", "قطة", "꙰ \U0001f43c️ panda", "\U000f1234"])
def test_a_name_in_another_script_is_drawn(name, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure_of(name), tmp_path / "figure", pdf=True)
    assert (tmp_path / "figure.png").stat().st_size and (tmp_path / "figure.pdf").stat().st_size
    assert capfd.readouterr().err == ""  # matplotlib logs what it does not find
