"""What all methods for networks that draw images have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..hosts.blocks import BlockHooks
from ..hosts.family import Site
from ..hosts.hooks import Patch
from ..hosts.image import Image
from ..maths.token_map import TokenMap
from . import options
from .cost import Work


@dataclass(frozen=True, repr=False)
class Method:
    """A way to make a model compute less, such as `Merge(0.5)`. Immutable, equal by value."""

    ratio: float = 0.5

    known: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, known: bool = True) -> None:
        other = Method.known.get(cls.__name__, cls)
        if other.__module__ != cls.__module__:
            raise TypeError(f"there is a method {cls.__name__} already, in {other.__module__}")
        if known:
            Method.known[cls.__name__] = cls

    def __repr__(self) -> str:
        """The options that differ from the defaults: `Merge(0.5, prop_attn=True)`."""
        given = {option.name: getattr(self, option.name) for option in fields(self)}
        changed = [f"{o.name}={given[o.name]!r}" for o in fields(self)[1:] if given[o.name] != o.default]
        return f"{type(self).__name__}({', '.join([repr(self.ratio), *changed])})"

    def to_dict(self) -> dict[str, Any]:
        """The method as plain JSON, for `Method.from_dict`."""
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"method": type(self).__name__, **given}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Method:
        """The method that `to_dict` described. Options that are not named have their defaults.

            Method.from_dict({"method": "Merge", "ratio": 0.5})  # == Merge(0.5)

        Raises:
            ValueError: an unknown method or option, or an option out of range.
            TypeError: this is no dict, or an option is of the wrong type.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a method is described by a dict, got {type(data).__name__}")
        given = dict(data)
        name = given.pop("method", None)
        if not isinstance(name, str) or name not in Method.known:
            raise ValueError(
                f"the method must be one of {', '.join(Method.known)}, got {options.shown(name)}"
            )
        kind = Method.known[name]
        names = [option.name for option in fields(kind)]
        unknown = [options.shown(option) for option in given if option not in names]
        if unknown:
            raise ValueError(f"{name} has no option {', '.join(unknown)}, only {', '.join(names)}")
        return kind(**given)

    def __post_init__(self) -> None:
        raise TypeError(f"Method is what all methods have in common: take {', '.join(Method.known)}")

    def _set(self, **checked: Any) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def why_skipped(self, site: Site) -> str | None:
        """What a block lacks for this method, or None."""
        raise NotImplementedError

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        """Raises a ValueError if the `sites` chosen of all blocks of a `container` cannot be patched."""

    def groups(self, sites: Sequence[Site]) -> list[Sequence[Site]]:
        """Which of the chosen blocks of a container share one plan: by default each has its own."""
        return [[site] for site in sites]

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch) -> None:
        """Registers what this method does at blocks that share a plan."""
        raise NotImplementedError

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        """Which of the tokens `x` `[B, h * w, C]` of an image merge, or which of them are sampled."""
        raise NotImplementedError

    def left(self, h: int, w: int) -> int:
        """How many tokens, or keys, are left of an image of `h` x `w` tokens."""
        raise NotImplementedError

    def work(self, sites: Sequence[Site]) -> Work:
        """What runs on fewer tokens, or with fewer keys, in blocks that share a plan."""
        raise NotImplementedError
