"""Figures of runs of thousands of images: what is chosen, deleted and kept in memory."""

import gc
import json
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS, AttackRecord, Records, read_run, run_identity, write_record
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
from diffattack.plotting.draw import (
    delete_others,
    draw_folders,
    draw_runs,
)
from diffattack.plotting.figures import plot_weight_curves
from diffattack.plotting.run_page import IMAGE_FIGURES

ITERATIONS, TIMESTEPS, LAYERS = 6, [51, 26, 1], ["down_blocks.0.attn1", "mid_block.attn1"]


def made_up_record(random: np.random.Generator, weights: np.ndarray) -> AttackRecord:
    """Of one image, zero in the first iteration."""

    def numbers(*shape: int, low: float = 1e-6, high: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(random.uniform(low, high, shape).astype(np.float32))

    layer_losses = numbers(ITERATIONS, len(TIMESTEPS), len(LAYERS), 1, high=1e-4)
    layer_losses[0] = 0
    of_iterations = ("attack_loss", "self_attention_loss", "cross_attention_loss", "total_loss", "confidence")
    of_iterations += ("distance", "self_attention_factor")
    return AttackRecord(
        timesteps=torch.tensor(TIMESTEPS),
        layers=LAYERS,
        grids=[7, 4],
        class_tokens=[["cat"]],
        gradient_iterations=[2, ITERATIONS],
        weights=torch.from_numpy(weights),
        layer_losses=layer_losses,
        reference_squares=numbers(len(TIMESTEPS), len(LAYERS), 1),
        fooled=torch.from_numpy(random.random((ITERATIONS, 1)) < 0.2),
        gradient_norms=numbers(2, 3, 1),
        class_attention=numbers(2, 1, 4, 4, 1),
        components=numbers(2, 3, 4, 4, 1),
        **{name: numbers(ITERATIONS, 1) for name in of_iterations},
    )


def made_up_run(folder: Path, images: int, own_weights: bool = False):
    """A finished run, as far as figures are drawn from it."""
    random, layout = np.random.default_rng(images), Layout(folder, images)
    configuration = {"images": [f"img{k}.png" for k in range(images)], "seed": 42, "layer_norm": "relative"}
    configuration |= {"attack_loss_weight": 10.0, "cross_attn_loss_weight": 100.0}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(configuration))
    weights = np.full((ITERATIONS, len(TIMESTEPS)), 1 / len(TIMESTEPS))
    said = {"class": "cat", "confidence": 0.5, "true_confidence": 0.5}
    for index in range(images):
        if own_weights:
            weights = np.vstack([weights[:1], random.dirichlet(np.ones(len(TIMESTEPS)), ITERATIONS - 1)])
        row = {"index": index, "file": f"img{index}.png", "psnr": random.uniform(30, 40), "success": True}
        clean = random.integers(0, 255, (32, 32, 3), np.uint8)
        for kind in ("originImage", "adv_image"):
            Image.fromarray(clean).save(layout.file(index, f"{kind}.png"))
        record, row = made_up_record(random, weights), row | {"before": said, "after": said}
        write_record(record, torch.zeros(1), row, layout.record(index), run_identity(folder))
    return read_run(folder)


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


@pytest.mark.parametrize("count", [1, 4, 7, 99, 1_000])
def test_a_sample_has_as_many_as_it_should_each_once(count):
    psnr = [np.inf, np.nan, *np.full(98, 30.0)]  # equal ones, and two pictures in which nothing has changed
    sample = choose(psnr, count, seed=0)
    assert len(sample) == min(count, 100) and set(sample) <= set(range(100))
    if count >= 100:
        assert list(sample) == list(range(100)) and set(sample.values()) == {""}
    elif count > 4:
        assert {sample[0], sample[1]} == {LEAST} and sample[2] == MOST


def test_figures_that_no_longer_belong_are_deleted_and_no_others(tmp_path):
    run = made_up_run(tmp_path / "run", 8)
    folder, sample = run.folder / ANALYSIS, {1: MOST, 4: LEAST}
    folder.mkdir()
    gone = {f"0002_{name}.{ending}" for name in IMAGE_FIGURES for ending in ("png", "pdf")}
    gone |= {"contact_sheet_2.png", "contact_sheet_3.pdf"}
    kept = {"0001_attention.png", "0002_mine.png", "0002_attention.svg", "x0002_attention.png"}
    kept |= {"2_attention.png", "contact_sheet_1.png", "contact_sheet_02.png", "contact_sheet_mine.png"}
    kept |= {"losses.png", "compared_losses.pdf"}
    for name in gone | kept:
        (folder / name).write_bytes(b"")
    delete_others(run, sample)
    assert {path.name for path in folder.iterdir()} == kept


def test_a_run_draws_its_sample_and_says_which(tmp_path, capsys):
    run = made_up_run(tmp_path / "run", 30)
    draw_folders([run], no_schedules, figure_images=4)
    names = [path.name for path in (run.folder / ANALYSIS).iterdir()]
    sample = choose(run.summary.psnr, 4, seed=42)
    drawn = Counter(int(match[1]) for name in names if (match := re.match(r"(\d{4,})_", name)))
    assert drawn == dict.fromkeys(sample, len(IMAGE_FIGURES)) and "contact_sheet_1.png" in names
    assert "figures of 4 of 30 images, the most and the least visible" in capsys.readouterr().err


# ---------------------------------------------------------------- one pass over the records


def no_schedules(timesteps: int) -> dict:
    return {}


@pytest.mark.parametrize("own_weights", [False, True])
def test_what_is_pooled_is_what_all_records_say(tmp_path, own_weights):
    run = made_up_run(tmp_path / "run", 5, own_weights)
    records, found = list(run.records), run.summary

    def stacked(name):
        return np.stack([getattr(record, name) for record in records])

    losses = stacked("layer_losses")
    close = {"rtol": 1e-6, "atol": 1e-12}
    np.testing.assert_allclose(found.structure.by_timestep, losses.sum(-1), **close)
    np.testing.assert_allclose(found.structure.by_layer, losses.sum(1), **close)
    for name in ("losses", "confidence", "fooled", "self_attention_factor", "gradient_norms", "weights"):
        np.testing.assert_allclose(getattr(found, name), stacked(name), **close)
    np.testing.assert_allclose(found.reference_squares, stacked("reference_squares"))
    assert found.psnr.tolist() == [record.row["psnr"] for record in records]
    assert found.indices.tolist() == [record.index for record in records]
    np.testing.assert_allclose(found.structure.timestep_shares, timestep_shares(losses), **close)
    np.testing.assert_allclose(found.structure.first_layer_shares, timestep_shares(losses[..., :1]), **close)
    by_layer = losses.sum((1, 2), dtype=np.float64)
    np.testing.assert_allclose(
        found.structure.layer_shares, by_layer / by_layer.sum(-1, keepdims=True), **close
    )
    assert timestep_rows(found.structure, TIMESTEPS) == timestep_rows(loss_sums(losses), TIMESTEPS)
    first = [record.fooled.argmax() + 1.0 if record.fooled.any() else np.nan for record in records]
    np.testing.assert_array_equal(found.first_fooled, first)


def test_records_that_differ_are_named(tmp_path):
    run = made_up_run(tmp_path / "run", 2)
    first, second = run.records
    names = ("attack_loss", "self_attention_loss", "cross_attention_loss", "layer_losses", "weights")
    shorter = replace(second, **{name: getattr(second, name)[:3] for name in names})
    with pytest.raises(ValueError, match="0001_record.npz has other iterations"):
        summary_of([first, shorter])


def test_attacks_without_timesteps_may_look_at_each_image_as_often_as_they_like(tmp_path):
    records = []
    for record, looks in zip(made_up_run(tmp_path / "run", 3).records, (2, 5, 3)):
        fooled = np.arange(looks) == looks - 1
        nothing = {"timesteps": np.zeros(0, np.int64), "layers": [], "layer_losses": np.zeros((looks, 0, 0))}
        of_looks = {"weights": np.zeros((looks, 0)), "fooled": fooled, "distance": np.arange(looks) / 10}
        terms = ("attack_loss", "self_attention_loss", "cross_attention_loss")
        losses = dict.fromkeys(terms, np.ones(looks)) | {"gradient_norms": np.zeros((0, 3))}
        records.append(replace(record, **nothing, **of_looks, **losses))
    found = summary_of(records)
    assert found.first_fooled.tolist() == [2, 5, 3] and found.distance_then.tolist() == [0.1, 0.4, 0.2]
    assert found.losses.shape == (3, 4, 0) and found.gradient_norms.shape == (3, 0, 3)


def test_memory_does_not_hold_the_records(tmp_path):
    """Ten times as many images add their numbers, and nothing of their attention maps. A figure refers to
    itself, so that it stays until garbage is collected, which else is at another time on every machine.
    """
    run = made_up_run(tmp_path / "run", 20)

    def peak(images: int) -> int:
        paths = [run.records.paths[k % 20] for k in range(images)]
        many = replace(run, records=Records(paths, run.records.identity))
        gc.collect()
        tracemalloc.start()
        for _ in draw_runs({"a": many}, no_schedules):
            gc.collect()
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()

    list(draw_runs({"a": run}, no_schedules))  # what is imported and cached stays
    few, many = peak(60)[0], peak(600)[0]
    assert many - few < 540 * 2_000


# ---------------------------------------------------------------- weights of many images


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
