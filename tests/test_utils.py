import numpy as np
import pytest
from PIL import Image

from utils import image_grid, plot_weights, read_image, write_result


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
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(OSError, match="cut.png is not a readable image"):
        read_image(tmp_path / "cut.png", 64)


def test_results_have_the_original_names_and_contents(tmp_path):
    clean = np.full((32, 32, 3), 100, np.uint8)
    adversarial = clean.copy()
    adversarial[:16], adversarial[16:] = 90, 120
    write_result(tmp_path, 7, clean, adversarial, "net", success=False)
    write_result(tmp_path, 7, clean, adversarial, "net", success=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0007_adv_image.png", "0007_diff_absolute.png", "0007_diff_net_image_ATKSuccess.png", "0007_diff_relative.png", "0007_originImage.png"]
    absolute, relative = (read_image(tmp_path / f"0007_diff_{kind}.png", 32) for kind in ("absolute", "relative"))
    assert absolute[0, 0, 0] == 10 and absolute[20, 0, 0] == 20
    assert relative[0, 0, 0] == 0 and relative[20, 0, 0] == 255


def test_image_grid_places_every_picture():
    pictures = [np.full((10, 10, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    grid = image_grid([pictures[:2], pictures[2:]], gap=1)
    assert grid.shape == (24, 24, 3) and [grid[6, 6, 0], grid[6, 18, 0], grid[18, 6, 0], grid[18, 18, 0]] == [10, 20, 30, 40]


def test_weight_curves_are_the_weights():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), 30)
    figure = plot_weights({"a": weights, "b": weights[::-1]}, [201, 151, 101, 51, 1])
    for panel, expected in zip(figure.axes, (weights, weights[::-1])):
        for i in range(5):
            assert np.array_equal(panel.lines[i].get_ydata(), expected[:, i])
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["t = 201", "t = 151", "t = 101", "t = 51", "t = 1"]
