"""The names of `tome.utils`."""

from .benchmark import benchmark
from .schedule import parse_r

__all__ = ["benchmark", "parse_r"]
