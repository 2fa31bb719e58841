"""Imports torchvision, before diffusers, transformers, torchmetrics and timm do.

One that was built for another torch, as one with CUDA beside a torch for CPUs, ends at compiled operators
that are missing. They are declared, without any code: only its transforms and networks are used here.
"""

import sys

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what it declares lasts as long as it does

try:
    import torchvision
except (ImportError, RuntimeError, OSError) as error:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import torchvision  # noqa: F401
    except Exception:
        told = f"torchvision does not go with torch {torch.__version__}"
        raise ImportError(f"{told}; install both as requirements.txt has them") from error
