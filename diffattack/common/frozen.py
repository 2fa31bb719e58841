"""Networks whose weights do not move: nothing is computed for a gradient on them; and what is computed once
more on the way back instead of being kept.

with frozen(unet, vae, classifier):
    loss(unet(latents, t, embeddings).sample).backward()        # on the latents alone
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint

# recompute(function, *arguments): what it returns; its graph is not kept, but computed on the way back
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def frozen(*networks: torch.nn.Module) -> Iterator[None]:
    """No parameter gradients, and eval mode; all of it is put back afterwards, also after an error."""
    training = [(module, module.training) for network in networks for module in network.modules()]
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    try:
        for network in networks:
            network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, was_training in training:
            module.training = was_training
