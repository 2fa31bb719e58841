"""Figures of runs of thousands of images: what is chosen, deleted and kept in memory."""

import gc
import re
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from multiplied import multiply

from diffattack.data.records import ANALYSIS, Records, read_run
from diffattack.data.summaries import (
    DRAWN,
    LEAST,
    MOST,
    choose,
    loss_sums,
    summary_of,
    timestep_rows,
    timestep_shares,
)
from diffattack.plotting.draw import delete_others, draw_folders, draw_runs
from diffattack.plotting.figures import plot_weight_curves
from diffattack.plotting.run_page import IMAGE_FIGURES


def run_of_many(whole, folder, images: int):
    """A run of copies of four images, which differ in their PSNR alone."""
    psnr = np.random.default_rng(images).uniform(30, 40, images)
    change = lambda k, row: row | {"psnr": float(psnr[k])}  # noqa: E731
    return read_run(multiply(whole("fixed"), folder / "run", images, change))


def no_schedules(timesteps: int) -> dict:
    return {}


# ---------------------------------------------------------------- which images are drawn


def test_a_sample_is_the_extremes_and_some_of_the_rest():
    psnr = np.random.default_rng(0).permutation(5_000) / 100
    sample = choose(psnr, 50, seed=42)
    assert Counter(sample.values()) == {MOST: 17, LEAST: 17, DRAWN: 16}
    by_reason = {reason: [k for k, why in sample.items() if why == reason] for reason in (MOST, LEAST)}
    assert psnr[by_reason[MOST]].tolist() == [k / 100 for k in range(17)]
    assert psnr[by_reason[LEAST]].tolist() == [k / 100 for k in range(4_999, 4_982, -1)]
    assert sample == choose(psnr, 50, seed=42)
    other = choose(psnr, 50, seed=43)
    assert [k for k, why in other.items() if why != DRAWN] == by_reason[MOST] + by_reason[LEAST]
    assert set(other) != set(sample)
    # equal ones, and two pictures in which nothing has changed
    sample = choose([np.inf, np.nan, *np.full(98, 30.0)], 7, seed=0)
    assert len(sample) == 7 and {sample[0], sample[1]} == {LEAST} and sample[2] == MOST
    assert choose([30.0] * 5, 1, seed=0) == {0: MOST}
    assert choose([30.0] * 3, 3, seed=0) == dict.fromkeys(range(3), "")


def test_figures_that_no_longer_belong_are_deleted_and_no_others(whole, tmp_path):
    run = run_of_many(whole, tmp_path, 8)
    folder, sample = run.folder / ANALYSIS, {1: MOST, 4: LEAST}
    folder.mkdir()
    gone = {f"0002_{name}.{ending}" for name in IMAGE_FIGURES for ending in ("png", "pdf")}
    gone |= {"contact_sheet_2.png", "contact_sheet_3.pdf"}
    kept = {"0001_attention.png", "0002_mine.png", "0002_attention.svg", "x0002_attention.png"}
    kept |= {"2_attention.png", "contact_sheet_1.png", "contact_sheet_mine.png", "losses.png"}
    for name in gone | kept:
        (folder / name).write_bytes(b"")
    delete_others(run, sample)
    assert {path.name for path in folder.iterdir()} == kept


def test_a_run_draws_its_sample_and_says_which(whole, tmp_path, capsys):
    run = run_of_many(whole, tmp_path, 30)
    draw_folders([run], no_schedules, figure_images=4)
    names = [path.name for path in (run.folder / ANALYSIS).iterdir()]
    sample = choose(run.summary.psnr, 4, seed=42)
    drawn = Counter(int(match[1]) for name in names if (match := re.match(r"(\d{4,})_", name)))
    assert drawn == dict.fromkeys(sample, len(IMAGE_FIGURES)) and "contact_sheet_1.png" in names
    assert "figures of 4 of 30 images, the most and the least visible" in capsys.readouterr().err


# ---------------------------------------------------------------- one pass over the records


@pytest.mark.parametrize("mode", ["fixed", "learnable"])
def test_what_is_pooled_is_what_all_records_say(whole, mode):
    fooled = np.random.default_rng(0).random((4, 3)) < 0.3
    records = [replace(record, fooled=row) for record, row in zip(read_run(whole(mode)).records, fooled)]
    found = summary_of(records)

    def stacked(name):
        return np.stack([getattr(record, name) for record in records])

    losses = stacked("layer_losses")
    timesteps = list(range(losses.shape[2]))
    close = {"rtol": 1e-6, "atol": 1e-12}
    np.testing.assert_allclose(found.structure.by_timestep, losses.sum(-1), **close)
    np.testing.assert_allclose(found.structure.by_layer, losses.sum(1), **close)
    names = ("losses", "confidence", "fooled", "self_attention_factor", "gradient_norms", "weights")
    for name in (*names, "reference_squares"):
        np.testing.assert_allclose(getattr(found, name), stacked(name), **close)
    assert found.psnr.tolist() == [record.row["psnr"] for record in records]
    assert found.indices.tolist() == [record.index for record in records]
    np.testing.assert_allclose(found.structure.timestep_shares, timestep_shares(losses), **close)
    np.testing.assert_allclose(found.structure.first_layer_shares, timestep_shares(losses[..., :1]), **close)
    by_layer = losses.sum((1, 2), dtype=np.float64)
    by_layer /= by_layer.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.structure.layer_shares, by_layer, **close)
    assert timestep_rows(found.structure, timesteps) == timestep_rows(loss_sums(losses), timesteps)
    first = [row.argmax() + 1.0 if row.any() else np.nan for row in fooled]
    np.testing.assert_array_equal(found.first_fooled, first)


def test_records_that_differ_are_named(whole):
    first, second, *_ = read_run(whole("fixed")).records
    names = ("attack_loss", "self_attention_loss", "cross_attention_loss", "layer_losses", "weights")
    shorter = replace(second, **{name: getattr(second, name)[:2] for name in names})
    with pytest.raises(ValueError, match="0001_record.npz has other iterations"):
        summary_of([first, shorter])


def test_attacks_without_timesteps_may_look_at_each_image_as_often_as_they_like(whole):
    records = []
    for record, looks in zip(read_run(whole("fixed")).records, (2, 5, 3)):
        fooled = np.arange(looks) == looks - 1
        nothing = {"timesteps": np.zeros(0, np.int64), "layers": [], "layer_losses": np.zeros((looks, 0, 0))}
        of_looks = {"weights": np.zeros((looks, 0)), "fooled": fooled, "distance": np.arange(looks) / 10}
        terms = ("attack_loss", "self_attention_loss", "cross_attention_loss")
        losses = dict.fromkeys(terms, np.ones(looks)) | {"gradient_norms": np.zeros((0, 3))}
        records.append(replace(record, **nothing, **of_looks, **losses))
    found = summary_of(records)
    assert found.first_fooled.tolist() == [2, 5, 3] and found.distance_then.tolist() == [0.1, 0.4, 0.2]
    assert found.losses.shape == (3, 4, 0) and found.gradient_norms.shape == (3, 0, 3)


def test_memory_does_not_hold_the_records(whole):
    """Ten times as many images add their numbers, and nothing of their attention maps. A figure refers to
    itself, so that it stays until garbage is collected, which else is at another time on every machine.
    """
    run = read_run(whole("fixed"))

    def peak(images: int) -> int:
        paths = [run.records.paths[k % 4] for k in range(images)]
        many = replace(run, records=Records(paths, run.records.identity))
        gc.collect()
        tracemalloc.start()
        for _ in draw_runs({"a": many}, no_schedules):
            gc.collect()
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()

    list(draw_runs({"a": run}, no_schedules))  # what is imported and cached stays
    few, many = peak(60)[0], peak(600)[0]
    assert many - few < 540 * 2_000


def weights_of(images: int, goes_on: bool) -> np.ndarray:
    weights = np.random.default_rng(0).dirichlet(np.ones(3), (images, 6))
    return weights if goes_on else np.concatenate([np.full((images, 1, 3), 1 / 3), weights[:, 1:]], 1)


def test_weights_of_many_images_are_medians_or_those_at_the_end_of_each():
    on, anew = weights_of(60, goes_on=True), weights_of(60, goes_on=False)
    first, second = plot_weight_curves({"goes on": on, "starts anew": anew}, [241, 121, 1]).axes
    for i in range(3):
        assert np.array_equal(first.lines[i].get_ydata(), on[:, -1, i])
        np.testing.assert_allclose(second.lines[i].get_ydata(), np.median(anew[..., i], 0))
    assert first.get_xlabel() == "at the end of each of 60 images"
    assert second.get_xlabel() == "iteration, median over 60 images" and len(second.collections) == 3
