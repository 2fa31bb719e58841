"""How far the timesteps' weights moved: in a run, and in a comparison of weight modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffattack.data.records import Run
from diffattack.data.summaries import mean_and_deviation
from diffattack.evaluation.comparison import Report

# reported for Stable Diffusion 2, at the first self-attention layer
STUDY_REMARK = (
    "the study that this tool extends reports 2-6, 5-8, 10-15, 20-28, 47-57 % by timestep at the first layer "
    "alone, which holds 0.1 % of the loss in its model"
)
COLLAPSED_BELOW = 1.5  # effective number of timesteps
HARDLY = 0.01  # change of a weight that nobody sees
# by mode, what would move weights further
REMEDIES = {
    "learnable": "a higher --weight_lr or more images",
    "minimax": "a larger --weight_step or a smaller --weight_pull",
    "uncertainty": "a larger --weight_step",
    "balanced": "no flag, since the gradients are of about the same length",
}


def weight_movement(run: Run, end: np.ndarray) -> dict:
    """How far the weights of a run moved, by its record, as JSON has it: `largest_change` of a weight and
    `steps` that moved them over the run or, where each image has its own, over an image, of which the others
    are means; `effective` timesteps at the end.

    Args:
        end: `(N,)`, the weights after the last step, means over the images where each has its own.
    """
    mode, weights = run.configuration["weight_mode"], run.summary.weights  # (images, K, N)
    if mode in ("learnable", "learnable_detached"):  # one network's, over all images
        weights = np.concatenate([weights.reshape(-1, len(end)), end[None].astype(weights.dtype)])[None]
    start, last = (weights[:, k].astype(np.float64) for k in (0, -1))
    effective = effective_timesteps(end)
    return {
        "mode": mode,
        "start": start.mean(0).tolist(),
        "end": end.tolist(),
        "largest_change": float(np.abs(last - start).max(1).mean()),
        "steps": int((np.diff(weights, axis=1) != 0).any(-1).sum(1).max()),
        "effective": effective,
        "collapsed": effective < COLLAPSED_BELOW,
    }


def towards(movement: dict) -> int | None:
    """The timestep whose weight rose most; None where none moved."""
    rise = np.subtract(movement["end"], movement["start"])
    return int(rise.argmax()) if movement["largest_change"] > 0 else None


def lines_about_weights(movement: dict, run: Run) -> list[str]:
    """How far the weights moved and what that means; nothing of modes whose weights are given."""
    mode, steps, timestep = movement["mode"], movement["steps"], towards(movement)
    if mode == "learnable_detached":
        return [
            "mode learnable_detached: the weight is detached in the loss, so no gradient reaches the weight "
            "network and unchanged weights are expected; it equals --weight_schedule increasing"
        ]
    if mode not in REMEDIES:
        return []
    each, (start, end) = " of an image" * (mode != "learnable"), numbers(movement, ", ")
    line = (
        f"mode {mode}: in {steps} step{'s' * (steps != 1)} the weights{each} moved from {start} to {end}, by "
        f"{movement['largest_change']:.2g} at most"
    )
    if timestep is not None:
        line += f", most towards timestep {timestep} (t = {run.timesteps[timestep]})"
    if movement["collapsed"]:
        return [
            f"{line}; they have collapsed: the loss is linear in them, and least with all weight on the "
            f"smallest L_i; use --weight_mode fixed"
        ]
    if movement["largest_change"] < HARDLY:
        line += f"; what would move them further: {REMEDIES[mode]}"
    return [line, *lines_about_equal_losses(run)]


def lines_about_equal_losses(run: Run) -> list[str]:
    """Whether the timesteps' shares of the loss differ by no more than chance, by Friedman's test over
    images, in one line if so: then weights have nothing to follow.
    """
    from scipy.stats import friedmanchisquare

    shares = run.summary.structure.timestep_shares  # (images, N), NaN where nothing changed
    shares = shares[np.isfinite(shares).all(1)]
    p = friedmanchisquare(*shares.T).pvalue if len(shares) >= 2 and shares.shape[1] >= 3 else 0.0
    means = ", ".join(f"{100 * share:.1f}" for share in shares.mean(0)) if p >= 0.05 else ""
    stronger = "" if run.configuration["structure_share"] else "; --structure_share 1 makes structure count"
    line = (
        f"the timesteps' losses are equal but for noise, as far as {len(shares)} images tell (shares {means} "
        f"%, Friedman's p {p:.2g}), so that weights may have nothing to follow but rounding{stronger}"
    )
    return [line] if p >= 0.05 else []


def effective_timesteps(weights: Sequence[float]) -> float:
    """exp(entropy) of weights `(N,)` that sum to 1: N when they are equal, 1 when all the weight is on one
    timestep.
    """
    from scipy.stats import entropy

    return float(np.exp(entropy(weights)))


def numbers(movement: dict, between: str) -> tuple[str, str]:
    """The weights at the start and at the end."""
    return tuple(between.join(f"{w:.3f}" for w in movement[which]) for which in ("start", "end"))


def add_weights(report: Report, runs: Mapping[str, Run], movements: Sequence[dict]) -> None:
    """Adds what there is to say of timesteps and their weights, with the shares of the first mode's run."""
    first = next(iter(runs.values()))
    structure = first.summary.structure
    # of the self-attention loss before weights, by image: (images, N) or (images, layers), rows of sum 1
    shares = {
        "timesteps, all layers": structure.timestep_shares,
        "timesteps, first layer": structure.first_layer_shares,
        "layers": structure.layer_shares,
    }
    means = {name: mean_and_deviation(values) for name, values in shares.items()}
    *by_timestep, by_layer = means
    report.sections[1:1] = [
        ("Weights", weight_rows(list(runs), movements)),
        (
            "Shares of the self-attention loss by timestep, %",
            [["", *(f"i = {i}" for i in range(len(first.timesteps)))]]
            + [[name, *percentages(*means[name], ".0f")] for name in by_timestep],
        ),
        (
            "Shares of the self-attention loss by layer, %",
            [["layer", "share"], *map(list, zip(first.layers, percentages(*means[by_layer], ".2g")))],
        ),
    ]
    report.remarks.extend(x for run, w in zip(runs.values(), movements) for x in lines_about_weights(w, run))
    report.remarks.append(STUDY_REMARK)
    report.results.update(
        weights=dict(zip(runs, movements)),
        layers=first.layers,
        shares={
            name: {"mean": mean, "standard_deviation": deviation, "by_image": shares[name]}
            for name, (mean, deviation) in means.items()
        },
    )


def weight_rows(names: Sequence[str], movements: Sequence[dict]) -> list[list[str]]:
    rows = [["mode", "start", "end", "largest change", "towards", "effective timesteps", ""]]
    for name, moved in zip(names, movements):
        timestep = "" if towards(moved) is None else f"i = {towards(moved)}"
        change, effective = f"{moved['largest_change']:.3f}", f"{moved['effective']:.2f}"
        rows.append(
            [name, *numbers(moved, " "), change, timestep, effective, "collapsed" * moved["collapsed"]]
        )
    return rows


def percentages(means: np.ndarray, deviations: np.ndarray, form: str) -> list[str]:
    return [f"{100 * mean:{form}} +- {100 * deviation:{form}}" for mean, deviation in zip(means, deviations)]
