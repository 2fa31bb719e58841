"""What makes a classifier the one that it was: its weights as they are loaded, and its answer to two images.
Not the text of a file, in which a comment may change; nor its name, behind which weights may be replaced.

    identity = load_classifier("clf.py:make", class_names).identity
    difference(saved, identity)                 # None, or what is other than it was
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from diffattack.classifiers.examination import HALF, Examined, answer, comparable, fixed_images
from diffattack.classifiers.sources import Program, Script
from diffattack.common.errors import InputError

NUMBERS = 8  # that an answer is kept as
TOLERANCE = 1e-3  # of the largest of them: another machine, or another number of threads


def identity_of(classifier: torch.nn.Module, examined: Examined, side: int, is_embedded: bool) -> dict:
    """As JSON holds it: `weights`, a digest; `answer`, the logits of `fixed_images` as sums with fixed random
    signs, None where it is another each time; and the `tolerance` of these.

    Args:
        classifier: as it is used, its outputs in order.
        is_embedded: of weights that come in a package, and are changed here before they are used, so that
            they end in other last digits elsewhere.
    """
    numbers = None
    if examined.is_steady:
        with torch.no_grad():
            logits = comparable(answer(classifier, fixed_images(side)).double()).flatten()
        signs = (
            torch.randint(0, 2, (NUMBERS, len(logits)), generator=torch.Generator().manual_seed(0)) * 2 - 1
        )
        numbers = [float(f"{number:.7g}") for number in (signs.double() @ logits).tolist()]
    half = examined.precision in (torch.float16, torch.bfloat16)
    return {
        "weights": "" if is_embedded else weights_digest(classifier),
        "answer": numbers,
        "tolerance": HALF if half else TOLERANCE,
    }


def weights_digest(classifier: torch.nn.Module) -> str:
    """A digest of all parameters, and of all buffers that are saved with them, in whatever order; a gigabyte
    takes about a second.
    """
    digests = sorted(tensor_digest(tensor) for tensor in tensors_of(classifier))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def tensor_digest(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(classifier: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Its weights, wherever they are kept: those of a program may lie in its graph."""
    for module in classifier.modules():
        yield from module.parameters(recurse=False)
        computed = getattr(module, "_non_persistent_buffers_set", ())
        yield from (b for name, b in module.named_buffers(recurse=False) if name not in computed)
        if isinstance(module, Program):
            held = (*module.program.state_dict.values(), *module.program.constants.values())
            yield from (value for value in held if isinstance(value, torch.Tensor))
        elif isinstance(module, Script):
            graph = module.program.inlined_graph  # kept while its nodes are looked at
            for node in graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t":
                    yield node.t("value")


def difference(known: object, found: dict) -> str | None:
    """What of an identity is other than was known, None where nothing is; `known` may be anything, as a file
    has it.
    """
    if known == found:
        return None
    if not isinstance(known, dict):
        return "nothing is known of what it was"
    if known.get("diffusion", "") != found.get("diffusion", ""):
        return "the diffusion model that its defence runs is another"
    if known.get("weights") != found.get("weights"):
        return "its weights are others"
    before, now = known.get("answer"), found.get("answer")
    if before is None and now is None:  # random: of the same weights, nothing more can be told
        return None
    if not are_numbers(before) or not are_numbers(now):
        return "it answers the same image always alike, or did"
    furthest = max(abs(a - b) for a, b in zip(before, now))
    largest = max(map(abs, (*before, *now)))
    if not furthest <= found["tolerance"] * largest:
        return (
            f"it answers otherwise with the same weights, by {100 * furthest / largest:.2g} %: its code, its "
            f"preprocessing or the order of its classes is another"
        )
    return None


def check_unchanged(name: str, known: dict, found: dict) -> None:
    """Raises InputError where a classifier that is loaded again in a run is another than before."""
    change = difference(known, found)
    if change:
        raise InputError(
            f"the classifier {name} has changed since this run began ({change}); it must be the same each "
            f"time that it is loaded, so leave its files alone meanwhile, and seed what it draws"
        )


def are_numbers(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == NUMBERS
        and all(isinstance(number, float | int) and math.isfinite(number) for number in value)
    )
