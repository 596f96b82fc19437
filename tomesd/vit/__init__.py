"""Token merging for vision transformers by the names of the ToMe package: `import tomesd.vit as tome`."""

from ..hosts.family import Block, Part
from ..hosts.networks import register
from ..hosts.vision import VisionFamily
from ..methods.schedule import parse_r
from . import merge, patch, utils
from .patch import apply_patch, remove_patch, set_r, source
from .reduction import Reduced, keep, reduce
from .schedules import Schedule
from .tuning import tune
from .vis import make_visualization

__all__ = [
    "Block",
    "Part",
    "Reduced",
    "Schedule",
    "VisionFamily",
    "apply_patch",
    "keep",
    "make_visualization",
    "merge",
    "parse_r",
    "patch",
    "reduce",
    "register",
    "remove_patch",
    "set_r",
    "source",
    "tune",
    "utils",
]
