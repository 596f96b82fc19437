"""tomesd: merges similar tokens before attention and gives them back after it."""

from . import merge
from .explain import Explanation, explain
from .patch import apply_patch, patched, remove_patch
from .token_map import TokenMap
from .token_merger import TokenMerger
from .trace import Plan, trace
from .vis import make_visualization

__version__ = "1.0.0.dev0"

__all__ = [
    "Explanation",
    "Plan",
    "TokenMap",
    "TokenMerger",
    "apply_patch",
    "explain",
    "make_visualization",
    "merge",
    "patched",
    "remove_patch",
    "trace",
]
