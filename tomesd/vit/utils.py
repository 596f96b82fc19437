"""The names of `tome.utils`."""

from ..methods.schedule import parse_r
from .benchmark import benchmark

__all__ = ["benchmark", "parse_r"]
