"""Token merging for vision transformers by the names of the ToMe package: `import tomesd.vit as tome`."""

from .. import merge
from ..methods.schedule import parse_r
from ..tools.vis import visualize_patches as make_visualization
from . import patch, utils
from .patch import apply_patch, remove_patch, source

__all__ = [
    "apply_patch",
    "make_visualization",
    "merge",
    "parse_r",
    "patch",
    "remove_patch",
    "source",
    "utils",
]
