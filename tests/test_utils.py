import shutil
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from diffattack.data.images import read_image, write_result
from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS, layer_names, read_run
from diffattack.data.summaries import loss_sums, timestep_rows, timestep_shares
from diffattack.evaluation.statistics import Estimate
from diffattack.plotting import figures
from diffattack.plotting.draw import draw_folders
from diffattack.plotting.image_figures import plot_attention, plot_contact_sheet, short
from timestep_weights import named_schedules


def test_results_have_the_original_names_and_contents(tmp_path):
    clean = np.full((32, 32, 3), 100, np.uint8)
    adversarial = clean.copy()
    adversarial[:16], adversarial[16:] = 90, 120
    write_result(Layout(tmp_path, 8), 7, clean, adversarial, "net", success=False)
    write_result(Layout(tmp_path, 8), 7, clean, adversarial, "net", success=True)
    kinds = ["adv_image", "diff_absolute", "diff_net_image_ATKSuccess", "diff_relative", "originImage"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0007_{kind}.png" for kind in kinds]
    found = [read_image(tmp_path / f"0007_{kind}.png", 32)[[0, 20], 0, 0].tolist() for kind in kinds]
    assert found[1] == [10, 20] and found[3] == [0, 255]


# ---------------------------------------------------------------- figures, tested through what they draw


def made_up(images: int, timesteps: int, iterations: int, layers: int) -> np.ndarray:
    """Losses by layer, (images, iterations, timesteps, layers), zero in the first iteration."""
    random = np.random.default_rng(0)
    losses = random.uniform(1e-7, 1e-5, (images, iterations, timesteps, layers)).astype(np.float32)
    losses[:, 0] = 0
    return losses


def steps(count: int) -> list[int]:
    return [1 + 50 * i for i in range(count)][::-1]


def run_of(losses: np.ndarray) -> SimpleNamespace:
    """What is drawn of a Run, from losses by layer."""
    return SimpleNamespace(
        timesteps=steps(losses.shape[2]),
        layers=[f"up {k} x {k}" for k in range(losses.shape[3])],
        configuration={"layer_norm": "mse"},
        summary=SimpleNamespace(structure=loss_sums(losses)),
    )


def drawn(figure):
    """The figure, drawn as saving does, so that what cannot be drawn is noticed."""
    figure.draw_without_rendering()
    return figure


def texts(of) -> list[str]:
    return [one.get_text() for one in of]


@pytest.mark.parametrize("count, iterations", [(1, 30), (5, 1), (12, 60)])
def test_weight_curves_are_the_weights(count, iterations):
    weights = np.random.default_rng(0).dirichlet(np.ones(count), iterations)
    shown = {"a": weights[None], "b": weights[None, ::-1]}
    references = {"uniform": np.full(count, 1 / count)}
    figure = drawn(figures.plot_weight_curves(shown, steps(count), references))
    for panel, expected in zip(figure.axes, (weights, weights[::-1])):
        lines = panel.lines[: 2 * count]
        for i, (curve, reference) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            assert np.array_equal(curve.get_ydata(), expected[:, i])
            assert list(curve.get_xdata()) == list(range(1, iterations + 1))
            assert list(reference.get_ydata()) == [1 / count] * 2


@pytest.mark.parametrize("count, iterations, layers", [(1, 4, 3), (5, 30, 16), (12, 1, 2)])
def test_figures_of_the_self_attention_loss(count, iterations, layers):
    by_layer = made_up(3, count, iterations, layers)
    losses, is_known = by_layer.sum(-1), iterations > 1  # all are zero in the first iteration
    run = run_of(by_layer)

    (panel,) = drawn(figures.plot_loss_per_timestep({"a": losses}, steps(count))).axes
    assert panel.get_yscale() == "log" and texts(panel.get_xticklabels()) == list(map(str, steps(count)))
    expected = sorted({2, (iterations + 1) // 2, iterations}) if is_known else [1]
    assert texts(panel.figure.legends[0].get_texts()) == [f"iteration {k}" for k in expected]
    for line, k in zip(panel.lines, expected):  # medians at three iterations
        middle = np.median(losses[:, k - 1], axis=0) if is_known else np.full(count, np.nan)
        np.testing.assert_allclose(line.get_ydata(), middle, rtol=1e-6)

    (panel,) = drawn(figures.plot_layer_shares({"a": run})).axes
    array = panel.images[0].get_array()
    assert array.shape == (layers, count + 1) and texts(panel.get_yticklabels()) == run.layers
    figure = drawn(figures.plot_average_loss_per_timestep({"a": run}))  # means with deviations
    if not is_known:
        return
    np.testing.assert_allclose(array.sum(0), 100, rtol=1e-5)
    expected = np.mean([image.sum((0, 1)) / image.sum() for image in by_layer], axis=0)
    np.testing.assert_allclose(array[:, -1], 100 * expected, rtol=1e-5)
    for panel, of in zip(figure.axes, (losses, by_layer[..., 0])):
        shares = of.sum(1) / of.sum((1, 2))[:, None]
        bars = [bar.get_height() for bar in panel.patches]
        np.testing.assert_allclose(bars, 100 * shares.mean(0), rtol=1e-5)
        ends = np.array(panel.collections[0].get_segments())[:, :, 1]  # of the error bars
        half = (ends[:, 1] - ends[:, 0]) / 2
        np.testing.assert_allclose(half, 100 * shares.std(0), rtol=1e-4, atol=1e-4)


def curves(images: int, iterations: int) -> SimpleNamespace:
    """What is drawn of a Run."""
    random = np.random.default_rng(1)
    fooled = np.zeros((images, iterations), bool)
    fooled[0, iterations // 2 :] = True
    losses, confidence = random.uniform(1e-6, 1, (images, 4, iterations)), random.random((images, iterations))
    return SimpleNamespace(
        summary=SimpleNamespace(losses=losses, confidence=confidence, fooled=fooled),
        factors=random.uniform(1, 100, (images, 4, iterations)),
        gradient_shares_by_image=random.uniform(1e-3, 1, (images, 2, 2)),
        gradient_iterations=[1, iterations],
    )


def test_losses_are_drawn_before_and_after_their_factors_with_the_share_that_was_fooled():
    image = curves(1, 30)
    image.summary.confidence[0, 3] = np.nan
    raw, weighted, gradients, last = drawn(figures.plot_losses({"a": image})).axes
    for k in range(4):
        assert np.array_equal(raw.lines[k].get_ydata(), image.summary.losses[0, k])
    for line, k in zip(weighted.lines, (0, 2, 3)):
        np.testing.assert_allclose(line.get_ydata(), image.factors[0, k] * image.summary.losses[0, k])
    for k in range(2):
        shares = 100 * image.gradient_shares_by_image[0, :, k]
        np.testing.assert_allclose(gradients.lines[k].get_ydata(), shares)
    assert np.array_equal(last.lines[0].get_ydata(), image.summary.confidence[0], equal_nan=True)
    assert list(last.lines[1].get_ydata()).index(1) == 15
    many = curves(4, 10)
    many.summary.fooled[1, 2] = True  # fooled once, and then right again
    panels = drawn(figures.plot_losses({"a": many, "b": many})).axes
    assert panels[6].lines[-1].get_ydata().tolist() == [0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert np.array_equal(panels[6].lines[0].get_ydata(), np.median(many.summary.confidence, axis=0))


def test_values_that_are_missing_are_in_no_share():
    losses = made_up(2, 5, 6, 3)
    losses[0, 3], losses[:, 4, 2] = np.nan, np.nan
    drawn(figures.plot_loss_per_timestep({"a": losses.sum(-1)}, steps(5)))
    for plot in (figures.plot_average_loss_per_timestep, figures.plot_layer_shares):
        drawn(plot({"a": run_of(losses)}))
    assert np.isfinite(timestep_shares(losses)).all()
    assert all("nan" not in cell for row in timestep_rows(loss_sums(losses), steps(5)) for cell in row)


def pictures_of(figure) -> list[np.ndarray]:
    return [image.get_array() for image in drawn(figure).axes[0].images]


def test_attention_is_drawn_on_one_scale_for_before_and_after():
    picture = np.full((32, 32, 3), 100, np.uint8)
    attention, components = np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 4, 4))
    attention[0, 0, :4], attention[1, 0, :4], components[0, 0, 0], components[1, 0, 0] = 0.1, 0.05, 3, -3
    figure = plot_attention(picture, picture, ["c$t"], attention, components)
    above, component, below, component_below = pictures_of(figure)
    assert (above[0, 0] != below[0, 0]).any() and (above[-1, 0] == below[-1, 0]).all()
    assert component[0, 0].argmax() == 0 and component_below[0, 0].argmax() == 2  # red, and blue
    assert texts(figure.axes[0].texts) == ['"c\\$t"\n0 to 0.1', "component 1\n±3", "", ""]


def test_contact_sheet_shows_signed_differences_on_a_symmetric_scale():
    clean = np.full((16, 16, 3), 100, np.uint8)
    up, down = clean.copy(), clean.copy()
    up[:4] += 9
    down[:4] -= 30
    figure = plot_contact_sheet([(clean, up, "one $.png", "x"), (clean, down, "two", "y")])
    of_both = np.reshape(pictures_of(figure), (2, 4, 16, 16, 3))
    (shown, after, above, absolute), (_, _, below, absolute_below) = of_both
    assert np.array_equal(shown, clean) and np.array_equal(after, up)
    assert above[0, 0].argmax() == 0 and below[0, 0].argmax() == 2  # red, and blue
    assert above[0, 0].min() > below[0, 0].min() and (above[-1] == below[-1]).all()
    assert "blue −30 to red +30 of 255" in figure.axes[0].texts[2].get_text()
    assert absolute[0, 0].tolist() == [72] * 3 and absolute_below[0, 0].tolist() == [240] * 3


def rates(ssim, l2, success):
    shares = {"net": Estimate(success, success - 0.1, success + 0.1, is_share=True)}
    return shares | {"SSIM": Estimate(ssim, ssim - 0.05, ssim + 0.02), "L2": Estimate(l2, l2, l2)}


def test_a_tradeoff_is_drawn_in_the_order_of_visibility_and_with_both_intervals():
    runs = {"uniform": [rates(0.8, 20, 0.9), rates(0.7, 30, 1.0), rates(0.9, 10, 0.4)]}
    runs |= {"fixed": [rates(0.8, 20, 0.8)] * 3}
    by_ssim, by_l2 = drawn(figures.plot_tradeoff(runs, "by structure_share")).axes
    assert by_l2.lines[0].get_xydata().tolist() == [[10, 40], [20, 90], [30, 100]]
    assert by_ssim.lines[0].get_xydata().tolist() == [[0.7, 100], [0.8, 90], [0.9, 40]]
    across, up = (np.array(lines.get_segments()[0]) for lines in by_ssim.containers[1].lines[2])
    np.testing.assert_allclose(across[:, 0], [0.75, 0.82])
    np.testing.assert_allclose(up[:, 1], [70, 90])


def test_layers_that_are_normalised_are_shown_before_and_after(whole):
    run = read_run(whole("fixed"))
    normalised = replace(run, configuration=run.configuration | {"layer_norm": "relative"})
    figure = figures.plot_layer_shares({"a": normalised})
    assert [panel.get_title() for panel in figure.axes] == ["a, mse", "a, relative"]
    squares = np.stack([record.reference_squares for record in run.records])
    by_layer = np.stack([record.layer_losses for record in run.records]).sum(1)
    assert (squares > 0).all()
    for panel, losses in zip(figure.axes, (by_layer * squares, by_layer)):
        shares = (losses / losses.sum(-1, keepdims=True)).mean(0).T
        np.testing.assert_allclose(panel.images[0].get_array()[:, :-1], 100 * shares, rtol=1e-4)


def test_figures_do_not_depend_on_what_was_drawn_before(whole, tmp_path):
    shutil.copytree(whole("fixed"), tmp_path / "out")
    run = read_run(tmp_path / "out")
    drawn = []
    before = dict(matplotlib.rcParams)
    for _ in range(2):
        draw_folders([run], named_schedules)
        drawn.append({path.name: path.read_bytes() for path in (run.folder / ANALYSIS).glob("*.png")})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5 + 1 + 2 * len(run.records)
    assert dict(matplotlib.rcParams) == before


def test_layer_names_say_place_and_grid():
    layers = ["down_blocks.0.attn1", "down_blocks.1.attn1", "mid_block.attn1", "up_blocks.1.attn1"]
    names = ["down 28 x 28 (1)", "down 28 x 28 (2)", "mid 7 x 7", "up 28 x 28"]
    assert layer_names(layers, [28, 28, 7, 28]) == names


def test_names_are_shortened_and_never_taken_for_formulas():
    names = {"$x$.png": r"\$x\$.png", "_out": " _out", "\udcff.png": "?.png"}
    names |= {"a" * 40 + ".png": "a" * 16 + "..." + "aaaaa.png"}
    assert all(short(name) == shown for name, shown in names.items())


def test_the_table_of_timesteps():
    losses = np.zeros((2, 3, 2, 2), np.float32)
    losses[0, 1:] = [[1, 1], [3, 3]]
    losses[1, 1:] = [[2, 2], [2, 2]]
    _, first, second = timestep_rows(loss_sums(losses), [51, 1])
    # of each image's mean over its three iterations, 4 / 3 and 8 / 3
    assert first == ["0: t = 51", "2", "0.67", "37.5", "12.5", "0.75"]
    assert second[3:] == ["62.5", "12.5", "1.25"]
