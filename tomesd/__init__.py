"""tomesd: merges similar tokens before attention and gives them back after it."""

from . import merge
from .maths.token_map import TokenMap
from .methods.merge import Merge
from .methods.merge_keys import MergeKeys
from .methods.method import Method
from .methods.recipe import Recipe
from .methods.sample_keys import SampleKeys
from .methods.shrink import DeepShrink
from .methods.stage import MergeStage
from .patch import apply_patch, patched, remove_patch
from .token_merger import TokenMerger
from .tools.explain import Explanation, explain
from .tools.trace import Plan, trace
from .tools.tune import tune
from .tools.vis import make_visualization

__version__ = "1.0.0.dev0"

__all__ = [
    "DeepShrink",
    "Explanation",
    "Merge",
    "MergeKeys",
    "MergeStage",
    "Method",
    "Plan",
    "Recipe",
    "SampleKeys",
    "TokenMap",
    "TokenMerger",
    "apply_patch",
    "explain",
    "make_visualization",
    "merge",
    "patched",
    "remove_patch",
    "trace",
    "tune",
]
