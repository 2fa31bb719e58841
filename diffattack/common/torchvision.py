"""Imported before diffusers and transformers, which import torchvision: see `mend_torchvision`."""

from diffattack.common.environment import mend_torchvision

mend_torchvision()
