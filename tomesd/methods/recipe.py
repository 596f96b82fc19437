"""Recipe: a method for each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .method import Method


@dataclass(frozen=True)
class Recipe:
    """A method for each block of a model, by the block's name as `tomesd.explain` lists it.

        recipe = tomesd.Recipe({"unet.mid_block.attentions.0.transformer_blocks.0": tomesd.Merge(0.25)})
        tomesd.apply_patch(pipe, recipe)

    Blocks that it does not name are left alone.

    Args:
        methods: the method of each block.

    Raises:
        TypeError: these are no names and methods.
        ValueError: there are none.
    """

    methods: Mapping[str, Method]

    def __post_init__(self) -> None:
        if not isinstance(self.methods, Mapping):
            raise TypeError(f"methods must be a dict of block names, got {type(self.methods).__name__}")
        for name, method in self.methods.items():
            if not isinstance(name, str) or not isinstance(method, Method):
                raise TypeError(
                    "methods must map names of blocks to methods, {name: Merge(0.5)}, got "
                    f"{{{name!r}: {method!r}}}"
                )
        if not self.methods:
            raise ValueError("a recipe needs a method for one block at least")
        object.__setattr__(self, "methods", MappingProxyType(dict(self.methods)))

    def __reduce__(self) -> tuple[type[Recipe], tuple[dict[str, Method]]]:
        return Recipe, (dict(self.methods),)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON, for `Recipe.from_dict`."""
        return {"blocks": {name: method.to_dict() for name, method in self.methods.items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Raises:
            TypeError, ValueError: it is none, or one of its methods is wrong.
        """
        if not isinstance(data, dict) or not isinstance(data.get("blocks"), dict):
            raise TypeError(f'a recipe is described by {{"blocks": {{name: method}}}}, got {data!r:.80}')
        return Recipe({name: Method.from_dict(method) for name, method in data["blocks"].items()})
