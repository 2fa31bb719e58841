"""Imports torchvision, before diffusers, transformers, torchmetrics and timm do.

One that was built for another torch, as one with CUDA beside a torch for CPUs, ends at compiled operators
that are missing. They are declared, without any code: only its transforms and networks are used here.
"""

import re
import sys

import torch

from diffattack.common.errors import note, one_line

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what it declares lasts as long as it does
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> None:
    """Declares what is missing, which the import names one by one; else torchvision is hidden."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
        if missing:
            OPERATORS.define(missing[1] + SIGNATURE)
            return import_torchvision()
        sys.modules["torchvision"] = None
        note(
            f"torchvision does not go with torch {torch.__version__} ({one_line(error, 80)}) and is not "
            f"used; install both as requirements.txt has them"
        )


import_torchvision()
