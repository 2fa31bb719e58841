"""Results of the slow reference, kept as small files so that a fresh clone need not compute them.

    expected, history = stored.result_of(reference.attack, pipeline, scheduler, classifier, image, 1, "cat")

A result is known by a digest of reference.py, of all that it was given (networks by their weights, schedulers
by their timesteps and configuration) and of the versions of the libraries; what is not known is computed.
`pytest -m nightly` computes everything, compares it with what is kept, and keeps what is not known: after a
change of the reference one deletes the folder and runs that. Histories of losses are kept in float64,
pictures in float32.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "reference_results"
ANEW = False  # whether everything is computed


def described(value: object) -> object:
    """What JSON can say of an argument, by which two that compute the same are told from others."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().numpy().tobytes().hex()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, torch.nn.Module):
        return [type(value).__name__, {name: described(part) for name, part in value.state_dict().items()}]
    if isinstance(value, torch.optim.Optimizer):
        return [type(value).__name__, value.defaults["lr"]]
    if isinstance(value, diffusers.DiffusionPipeline):
        parts = (value.unet, value.vae, value.text_encoder)
        return [[described(part), described(dict(part.config))] for part in parts[:2]] + [described(parts[2])]
    if isinstance(value, diffusers.SchedulerMixin):
        return [described(dict(value.config)), value.timesteps.tolist()]
    if callable(value):
        return value.__name__
    if isinstance(value, dict):  # of a configuration without where it lies
        return {str(key): described(part) for key, part in value.items() if not str(key).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, (str, int, float, type(None))):
        return value
    return [type(value).__name__, described(vars(value))]


def result_of(function: Callable[..., tuple], *arguments, **options) -> tuple[torch.Tensor, np.ndarray]:
    """A picture and a history of losses, as `function` of reference.py returns them; a network that it trains
    and a list that it is given as `visited` are as it leaves them.
    """
    versions = [library.__version__ for library in (torch, diffusers, transformers)]
    source = Path(__file__).with_name("reference.py").read_text()
    key = json.dumps([source, versions, function.__name__, described(arguments), described(options)])
    path = FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    trained = [a for a in arguments if isinstance(a, torch.nn.Module) and options.get("learning")]
    visited = options.get("visited", [])
    if not ANEW and not path.exists():
        return function(*arguments, **options)
    if ANEW:
        picture, history = function(*arguments, **options)
        arrays = {"picture": picture.numpy().astype(np.float32), "history": history}
        for k, network in enumerate(trained):
            arrays |= {f"{k}.{name}": part.numpy() for name, part in network.state_dict().items()}
        if visited:
            arrays |= {"nulls": torch.stack(visited[0]).numpy(), "latents": torch.stack(visited[1:]).numpy()}
        if path.exists():
            # in float32 two machines part with the first step
            rows, rtol = (slice(None), 1e-6) if picture.dtype == torch.float64 else (slice(1), 1e-4)
            with np.load(path) as kept:
                np.testing.assert_allclose(history[rows], kept["history"][rows], rtol=rtol, atol=1e-18)
        else:
            FOLDER.mkdir(exist_ok=True)
            np.savez_compressed(path, **arrays)
        return picture, history
    with np.load(path) as arrays:
        for k, network in enumerate(trained):
            parts = {name: torch.from_numpy(arrays[f"{k}.{name}"]) for name in network.state_dict()}
            network.load_state_dict(parts)
        if "visited" in options:
            visited += [list(torch.from_numpy(arrays["nulls"])), *torch.from_numpy(arrays["latents"])]
        return torch.from_numpy(arrays["picture"]).double(), arrays["history"]
