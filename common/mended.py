"""Imported for what it does: after it, torchvision can be imported, or is hidden. It comes before what
imports that at once, as transformers and diffusers do.
"""

from common.environment import mend_torchvision

mend_torchvision()
