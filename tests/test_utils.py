import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffattack.data.images import read_image, write_result
from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS, layer_names, read_run
from diffattack.data.summaries import loss_sums, timestep_rows, timestep_shares
from diffattack.evaluation.statistics import Estimate
from diffattack.plotting.draw import draw_folders
from diffattack.plotting.figures import (
    plot_average_loss_per_timestep,
    plot_layer_shares,
    plot_loss_heatmap,
    plot_loss_per_timestep,
    plot_losses,
    plot_overlay,
    plot_tradeoff,
    plot_weight_curves,
)
from diffattack.plotting.image_figures import plot_attention, plot_contact_sheet, short
from timestep_weights import named_schedules


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 32:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 64)
    assert image[10, 10].tolist() == [255, 255, 255] and image[10, 50].tolist() == [255, 0, 0]


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.paste(0, (0, 0, 32, 64))
    image.save(tmp_path / "a.png", transparency=0)
    read = read_image(tmp_path / "a.png", 64)
    assert read[10, 10].tolist() == [255, 255, 255] and read[10, 50].tolist() == [0, 255, 0]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((64, 64), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    assert np.unique(read_image(tmp_path / "a.png", 96)).tolist() == [128]


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise, so the white upper half becomes the right half
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 64)
    assert image[32, 60].tolist() == [255, 255, 255] and image[32, 4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("content", [b"not an image", b""])
def test_files_that_are_no_images_are_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(OSError, match="broken.png is not a readable image"):
        read_image(tmp_path / "broken.png", 64)


def test_truncated_files_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "whole.png"
    )
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(OSError, match="cut.png is not a readable image"):
        read_image(tmp_path / "cut.png", 64)


def test_results_have_the_original_names_and_contents(tmp_path):
    clean = np.full((32, 32, 3), 100, np.uint8)
    adversarial = clean.copy()
    adversarial[:16], adversarial[16:] = 90, 120
    write_result(Layout(tmp_path, 8), 7, clean, adversarial, "net", success=False)
    write_result(Layout(tmp_path, 8), 7, clean, adversarial, "net", success=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0007_adv_image.png",
        "0007_diff_absolute.png",
        "0007_diff_net_image_ATKSuccess.png",
        "0007_diff_relative.png",
        "0007_originImage.png",
    ]
    absolute, relative = (
        read_image(tmp_path / f"0007_diff_{kind}.png", 32) for kind in ("absolute", "relative")
    )
    assert absolute[0, 0, 0] == 10 and absolute[20, 0, 0] == 20
    assert relative[0, 0, 0] == 0 and relative[20, 0, 0] == 255


# ---------------------------------------------------------------- figures, tested through what they draw

SIZES = [(1, 4, 3), (5, 30, 16), (12, 1, 2)]  # timesteps, iterations, layers


def made_up(images: int, timesteps: int, iterations: int, layers: int) -> np.ndarray:
    """Losses by layer, (images, iterations, timesteps, layers), zero in the first iteration."""
    losses = (
        np.random.default_rng(0)
        .uniform(1e-7, 1e-5, (images, iterations, timesteps, layers))
        .astype(np.float32)
    )
    losses[:, 0] = 0
    return losses


def steps(count: int) -> list[int]:
    return [1 + 50 * i for i in range(count)][::-1]


def run_of(losses: np.ndarray | None = None, weights: np.ndarray | None = None) -> SimpleNamespace:
    """What is drawn of a Run, from losses by layer or from weights."""
    structure = None if losses is None else loss_sums(losses)
    count = (weights if losses is None else losses).shape[2]
    return SimpleNamespace(
        timesteps=steps(count),
        layers=[] if losses is None else [f"up {k} x {k}" for k in range(losses.shape[3])],
        configuration={"layer_norm": "mse"},
        summary=SimpleNamespace(structure=structure, weights=weights),
    )


def drawn(figure) -> None:
    """Draws it, as saving does, so that what cannot be drawn is noticed."""
    figure.draw_without_rendering()


@pytest.mark.parametrize("count, iterations", [(1, 30), (5, 1), (12, 60)])
def test_weight_curves_are_the_weights(count, iterations):
    weights = np.random.default_rng(0).dirichlet(np.ones(count), iterations)
    schedule = np.full(count, 1 / count)
    shown = {"a": run_of(weights=weights[None]), "b": run_of(weights=weights[None, ::-1])}
    figure = plot_weight_curves(shown, {"uniform": schedule})
    drawn(figure)
    for panel, expected in zip(figure.axes, (weights, weights[::-1])):
        lines = panel.lines[: 2 * count]
        for i, (curve, reference) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            assert np.array_equal(curve.get_ydata(), expected[:, i])
            assert list(curve.get_xdata()) == list(range(1, iterations + 1))
            assert list(reference.get_ydata()) == [1 / count] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *(f"t = {t}" for t in steps(count)),
        "uniform",
    ]


@pytest.mark.parametrize("count, iterations, layers", SIZES)
def test_loss_per_timestep_is_the_median_at_three_iterations(count, iterations, layers):
    losses = made_up(3, count, iterations, layers)
    figure = plot_loss_per_timestep({"a": run_of(losses)})
    losses = losses.sum(-1)
    drawn(figure)
    panel = figure.axes[0]
    assert panel.get_yscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == list(map(str, steps(count)))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    if iterations == 1:
        assert labels == ["iteration 1"] and np.isnan(panel.lines[0].get_ydata()).all()
    else:
        expected = sorted({2, (iterations + 1) // 2, iterations})
        assert labels == [f"iteration {k}" for k in expected]
        for line, k in zip(panel.lines, expected):
            np.testing.assert_allclose(line.get_ydata(), np.median(losses[:, k - 1], axis=0), rtol=1e-6)


@pytest.mark.parametrize("count, iterations, layers", SIZES)
def test_heatmap_is_the_mean_over_images(count, iterations, layers):
    losses = made_up(3, count, iterations, layers)
    figure = plot_loss_heatmap({"a": run_of(losses), "b": run_of(2 * losses)})
    losses = losses.sum(-1)
    drawn(figure)
    for panel, factor in zip(figure.axes, (1, 2)):
        array = panel.images[0].get_array()
        assert (
            array.shape == (count, iterations) and array.mask[:, 0].all()
        )  # the first iteration is zero: nothing on a log scale
        np.testing.assert_allclose(array[:, 1:].filled(), factor * losses.mean(0).T[:, 1:], rtol=1e-6)
    assert figure.axes[0].images[0].norm is figure.axes[1].images[0].norm  # one scale for both


@pytest.mark.parametrize("count, iterations, layers", SIZES)
@pytest.mark.parametrize("images", [1, 4])
def test_average_shares_are_means_with_deviations_and_labels(count, iterations, layers, images):
    losses = made_up(images, count, iterations, layers)
    figure = plot_average_loss_per_timestep({"a": run_of(losses)})
    drawn(figure)
    for panel, of in zip(figure.axes, (losses.sum(-1), losses[..., 0])):
        if iterations == 1:
            assert not any(text.get_text() for text in panel.texts)
            continue
        shares = of.sum(1) / of.sum((1, 2))[:, None]
        np.testing.assert_allclose(
            [bar.get_height() for bar in panel.patches], 100 * shares.mean(0), rtol=1e-5
        )
        assert [text.get_text() for text in panel.texts] == [
            f"{count * share:.1f}x" for share in shares.mean(0)
        ]
        ends = np.array(panel.collections[0].get_segments())[:, :, 1]  # of the error bars
        np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, 100 * shares.std(0), rtol=1e-4, atol=1e-4)
        assert panel.lines[-1].get_ydata()[0] == 100 / count


@pytest.mark.parametrize("count, iterations, layers", SIZES)
def test_layer_shares_add_up_to_all(count, iterations, layers):
    losses = made_up(2, count, iterations, layers)
    names = [f"up {k} x {k}" for k in range(layers)]
    figure = plot_layer_shares({"a": run_of(losses)})
    drawn(figure)
    panel = figure.axes[0]
    array = panel.images[0].get_array()
    assert (
        array.shape == (layers, count + 1)
        and [label.get_text() for label in panel.get_yticklabels()] == names
    )
    assert [label.get_text() for label in panel.get_xticklabels()] == [*map(str, steps(count)), "all"]
    if iterations > 1:
        np.testing.assert_allclose(array.sum(0), 100, rtol=1e-5)
        expected = np.mean([image.sum((0, 1)) / image.sum() for image in losses], axis=0)
        np.testing.assert_allclose(array[:, -1], 100 * expected, rtol=1e-5)
        assert len(panel.texts) == layers * (count + 1)


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


@pytest.mark.parametrize("iterations", [1, 30])
def test_losses_of_an_image_are_drawn_before_and_after_their_factors(iterations):
    image = curves(1, iterations)
    figure = plot_losses({"a": image})
    drawn(figure)
    raw, weighted, gradients, last = figure.axes
    for k in range(4):
        assert np.array_equal(raw.lines[k].get_ydata(), image.summary.losses[0, k])
    for line, k in zip(weighted.lines, (0, 2, 3)):
        np.testing.assert_allclose(line.get_ydata(), image.factors[0, k] * image.summary.losses[0, k])
    for k in range(2):
        np.testing.assert_allclose(
            gradients.lines[k].get_ydata(), 100 * image.gradient_shares_by_image[0, :, k]
        )
    assert np.array_equal(last.lines[0].get_ydata(), image.summary.confidence[0])
    assert list(last.lines[1].get_ydata()).index(1) == iterations // 2


def test_losses_of_an_image_that_ends_before_gradients_are_measured_are_drawn():
    image = curves(1, 6)
    image.gradient_shares_by_image[:] = np.nan
    figure = plot_losses({"a": image})
    drawn(figure)
    assert np.isnan(figure.axes[2].lines[0].get_ydata()).all()


def test_losses_of_many_images_show_the_share_that_was_fooled():
    images = curves(4, 10)
    images.summary.fooled[1, 2] = True  # fooled once, and then right again
    figure = plot_losses({"a": images, "b": images})
    drawn(figure)
    assert len(figure.axes) == 8
    assert figure.axes[6].lines[-1].get_ydata().tolist() == [0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert np.array_equal(figure.axes[6].lines[0].get_ydata(), np.median(images.summary.confidence, axis=0))


def test_values_that_are_missing_are_gaps():
    losses = made_up(2, 5, 6, 3)
    losses[0, 3], losses[:, 4, 2] = np.nan, np.nan
    run = run_of(losses)
    image = curves(1, 6)
    image.summary.losses[0, :, 3], image.summary.confidence[0, 3] = np.nan, np.nan
    line = plot_losses({"a": image}).axes[0].lines[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, False, True, False, False]
    assert plot_loss_heatmap({"a": run}).axes[0].images[0].get_array().mask[2, 4]
    for figure in (
        plot_loss_per_timestep({"a": run}),
        plot_average_loss_per_timestep({"a": run_of(losses[:1])}),
        plot_average_loss_per_timestep({"a": run}),
        plot_layer_shares({"a": run}),
        plot_overlay({"a": image}),
    ):
        drawn(figure)
    assert np.isfinite(timestep_shares(losses)).all()
    assert all("nan" not in cell for row in timestep_rows(loss_sums(losses), steps(5)) for cell in row)


def test_two_hundred_images():
    run = run_of(made_up(200, 5, 30, 16))
    images = curves(200, 30)
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (200, 30))
    for figure in (
        plot_weight_curves({"a": run_of(weights=weights)}),
        plot_loss_per_timestep({"a": run}),
        plot_average_loss_per_timestep({"a": run}),
        plot_losses({"a": images}),
        plot_overlay({"a": images, "b": images}),
    ):
        drawn(figure)


def pictures_of(figure) -> list[np.ndarray]:
    drawn(figure)
    return [image.get_array() for image in figure.axes[0].images]


def test_attention_is_drawn_on_one_scale_for_before_and_after():
    picture = np.full((32, 32, 3), 100, np.uint8)
    attention, components = np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 4, 4))
    attention[0, 0, :4], attention[1, 0, :4], components[0, 0, 0], components[1, 0, 0] = 0.1, 0.05, 3, -3
    figure = plot_attention(picture, picture, ["c$t"], attention, components)
    above, component, below, component_below = pictures_of(figure)
    assert (above[0, 0] != below[0, 0]).any() and (above[-1, 0] == below[-1, 0]).all()
    assert component[0, 0].argmax() == 0 and component_below[0, 0].argmax() == 2  # red, and blue
    titles = [text.get_text() for text in figure.axes[0].texts]
    assert titles == ['"c\\$t"\n0 to 0.1', "component 1\n±3", "", ""]


def test_contact_sheet_shows_signed_differences_on_a_symmetric_scale():
    clean = np.full((16, 16, 3), 100, np.uint8)
    up, down = clean.copy(), clean.copy()
    up[:4] += 9
    down[:4] -= 30
    figure = plot_contact_sheet([(clean, up, "one $.png", "x"), (clean, down, "two", "y")])
    (shown, after, above, absolute), (_, _, below, absolute_below) = np.reshape(
        pictures_of(figure), (2, 4, 16, 16, 3)
    )
    assert np.array_equal(shown, clean) and np.array_equal(after, up)
    assert above[0, 0].argmax() == 0 and below[0, 0].argmax() == 2  # red, and blue
    assert above[0, 0].min() > below[0, 0].min() and (above[-1] == below[-1]).all()
    assert "blue −30 to red +30 of 255" in figure.axes[0].texts[2].get_text()
    assert absolute[0, 0].tolist() == [72] * 3 and absolute_below[0, 0].tolist() == [240] * 3


def rates(ssim, l2, success, half=0.1):
    shares = {"net": Estimate(success, success - half, success + half, is_share=True)}
    return shares | {"SSIM": Estimate(ssim, ssim - 0.05, ssim + 0.02), "L2": Estimate(l2, l2, l2)}


def test_a_sweep_is_drawn_in_the_order_of_visibility():
    sweeps = {"uniform": [rates(0.8, 20, 0.9), rates(0.7, 30, 1.0), rates(0.9, 10, 0.4)]}
    figure = plot_tradeoff(sweeps | {"fixed": [rates(0.8, 20, 0.8)] * 3}, "by structure_share")
    drawn(figure)
    by_ssim, by_l2 = figure.axes
    assert by_l2.lines[0].get_xydata().tolist() == [[10, 40], [20, 90], [30, 100]]
    assert by_ssim.lines[0].get_xydata().tolist() == [[0.7, 100], [0.8, 90], [0.9, 40]]


def test_a_single_point_has_both_intervals():
    points = {"uniform": [rates(0.9, 20, 1.0)], "fixed": [rates(0.8, 30, 0.5)]}
    for of_run in points.values():
        del of_run[0]["L2"]
    figure = plot_tradeoff(points, "Attack success against SSIM")
    drawn(figure)
    panel = figure.axes[0]
    assert panel.get_title() == "net" and "higher" in panel.get_xlabel()
    assert panel.containers[1].lines[0].get_xydata().tolist() == [[0.8, 50]]
    segments = [np.array(lines.get_segments()[0]) for lines in panel.containers[1].lines[2]]
    np.testing.assert_allclose(segments[0][:, 0], [0.75, 0.82])
    np.testing.assert_allclose(segments[1][:, 1], [40, 60])


def test_layers_that_are_normalised_are_shown_before_and_after(whole):
    run = read_run(whole("fixed"))
    figure = plot_layer_shares(
        {"a": replace(run, configuration=run.configuration | {"layer_norm": "relative"})}
    )
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
    for _ in range(2):
        draw_folders([run], named_schedules)
        drawn.append({path.name: path.read_bytes() for path in (run.folder / ANALYSIS).glob("*.png")})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6 + 1 + 2 * len(run.records)


def test_layer_names_say_place_and_grid():
    layers = [
        "down_blocks.0.attentions.0.attn1",
        "down_blocks.0.attentions.1.attn1",
        "mid_block.attentions.0.attn1",
        "up_blocks.1.attentions.0.attn1",
    ]
    assert layer_names(layers, [28, 28, 7, 28]) == [
        "down 28 x 28 (1)",
        "down 28 x 28 (2)",
        "mid 7 x 7",
        "up 28 x 28",
    ]


def test_matplotlib_is_left_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_loss_heatmap({"a": run_of(made_up(2, 5, 3, 2))})
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "name, shown",
    [
        ("cat.png", "cat.png"),
        ("$x$.png", r"\$x\$.png"),
        ("_out", " _out"),
        ("a" * 40 + ".png", "a" * 16 + "..." + "aaaaa.png"),
        ("\udcff.png", "?.png"),
    ],
)
def test_names_are_shortened_and_never_taken_for_formulas(name, shown):
    assert short(name) == shown


def test_the_table_of_timesteps():
    losses = np.zeros((2, 3, 2, 2), np.float32)
    losses[0, 1:] = [[1, 1], [3, 3]]
    losses[1, 1:] = [[2, 2], [2, 2]]
    rows = timestep_rows(loss_sums(losses), [51, 1])
    mean, deviation = (
        (2 * 2 / 3 + 4 * 2 / 3) / 2,
        (4 - 2) * 2 / 3 / 2,
    )  # of each image's mean over its three iterations
    assert rows[1] == ["0: t = 51", f"{mean:.3g}", f"{deviation:.2g}", "37.5", "12.5", "0.75"] and rows[2][
        3:
    ] == ["62.5", "12.5", "1.25"]
