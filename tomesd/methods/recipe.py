"""Recipe: a method for each block, as one value that can be kept in a file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import path_of, read_json, write_json
from .method import Method
from .options import shown, wrong_type


class Recipe(Mapping[str, Method]):
    """A method for each block of a model, by the block's name as `tomesd.explain` lists it.

        recipe = tomesd.Recipe({"unet.mid_block.attentions.0.transformer_blocks.0": tomesd.Merge(0.25)})
        tomesd.apply_patch(pipe, recipe)

    Blocks that it does not name are left alone. It cannot be changed. `print` shows it as a table.

    Args:
        methods: the method of each block.
        about: what is known of it, such as what `tune` has measured: plain JSON.

    Raises:
        TypeError: these are no names and methods.
        ValueError: there are none.
    """

    def __init__(self, methods: Mapping[str, Method], about: Mapping[str, Any] | None = None) -> None:
        if not isinstance(methods, Mapping):
            raise TypeError(f"methods must be a dict of block names, got {type(methods).__name__}")
        for name, method in methods.items():
            if not isinstance(name, str) or not isinstance(method, Method):
                raise TypeError(f"a recipe maps names of blocks to methods, got {shown({name: method})}")
        if not methods:
            raise ValueError("a recipe needs a method for one block at least")
        if not isinstance(about, Mapping | None) or not all(isinstance(key, str) for key in about or ()):
            raise wrong_type("about", "a dict of what is known of a recipe", about)
        self._methods = dict(methods)
        self._about = copy.deepcopy(dict(about or {}))

    @property
    def about(self) -> dict[str, Any]:
        """What is known of it: a copy."""
        return copy.deepcopy(self._about)

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __repr__(self) -> str:
        return f"Recipe({self._methods!r})"

    def __str__(self) -> str:
        wide = max(map(len, self._methods))
        lines = [f"{name:{wide}}  {method}" for name, method in self.items()]
        if self.about:
            lines.append(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.about.items()))
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes the recipe to a file, as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written.
            TypeError: `path` is none, or `about` holds what is no plain JSON.
        """
        path = path_of(path)
        try:
            write_json(self.to_dict(), path, indent=1)
        except TypeError as error:
            raise TypeError(f"about must be plain JSON to be kept in a file: {error}") from None

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads what `save` has written. Files of strangers are safe: there is no code in them.

        Raises:
            OSError, ValueError, TypeError: it cannot be read, is no JSON, or no recipe.
        """
        return Recipe.from_dict(read_json(path, "a recipe"))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON, for `Recipe.from_dict`."""
        about = {"about": self.about} if self.about else {}
        return {"blocks": {name: method.to_dict() for name, method in self.items()}, **about}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Raises:
            TypeError, ValueError: it is none, or one of its methods is wrong.
        """
        known = isinstance(data, dict) and set(data) <= {"blocks", "about"}
        if not known or not isinstance(data.get("blocks"), dict):
            raise TypeError(f'a recipe is described by {{"blocks": {{name: method}}}}, got {shown(data)}')
        methods: dict[str, Method] = {}
        for name, method in data["blocks"].items():
            try:
                methods[name] = Method.from_dict(method)
            except (TypeError, ValueError) as error:
                raise type(error)(f"block {shown(name)} of the recipe: {error}") from None
        return Recipe(methods, data.get("about"))
