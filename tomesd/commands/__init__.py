"""`tomesd COMMAND`: what users run on their own models. `import tomesd` imports none of it."""

from .torchvision import mend_torchvision

__all__ = ["mend_torchvision"]
