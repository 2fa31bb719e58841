"""What attacks cost, an image: seconds, memory, and evaluations of networks, from the rows of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffattack.evaluation.stats import mean_over_images

# of results.json, and how a table calls them
EVALUATIONS = {
    "surrogate": "surrogate, forward",
    "surrogate, backward": "surrogate, backward",
    "UNet": "UNet",
    "decoder": "decoder",
}


def cost_dict(rows: Sequence[dict]) -> dict[str, float]:
    """Means over the images of a run; of memory the largest."""
    return {
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "peak_memory": max(row["peak_memory"] for row in rows),
        **{name: float(np.mean([row["evaluations"].get(name, 0) for row in rows])) for name in EVALUATIONS},
    }


def cost_rows(runs: Mapping[str, Sequence[dict]]) -> list[list[str]]:
    """A table with a line a run; rows of records by the run's name."""
    head = ["costs an image", "s", "peak memory GB", *EVALUATIONS.values(), "runs for the budget"]
    lines = []
    for name, rows in runs.items():
        costs = cost_dict(rows)
        tried = [row["attack_runs"] for row in rows if "attack_runs" in row]
        lines.append(
            [
                name,
                str(mean_over_images(np.array([row["seconds"] for row in rows]))),
                f"{costs['peak_memory'] / 1e9:.2f}",
                *(f"{costs[key]:.4g}" for key in EVALUATIONS),
                f"{np.mean(tried):.2g}" if tried else "1",
            ]
        )
    return [head, *lines]
