"""What a family of models looks like, as data, and how its networks are found in a model.

Classes are recognised by name along the MRO, so nothing third-party is imported to know a model. UNets and
vision transformers share these records; their rows are in `unets.py` and `vits.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from types import ModuleType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


@dataclass(frozen=True)
class Checked:
    """A record that checks the types of its fields, so that what is mistyped is found where it is written."""

    def __post_init__(self) -> None:
        kinds = type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_of(value, kinds[field.name]):
                raise TypeError(f"{type(self).__name__}: {field.name} must be {field.type}, got {value!r}")


def is_of(value: object, kind: Any) -> bool:
    """Whether a value, with what is in it, is of a type as the fields of these records have it."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(is_of(value, one) for one in inside)
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of(part, inside[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_of(part, one) for pair in value.items() for part, one in zip(pair, inside, strict=True)
        )
    return callable(value) if origin is Callable else isinstance(value, kind)


@dataclass(frozen=True)
class Part(Checked):
    """A module of a block that takes tokens and returns tokens. Parameters are those of its forward."""

    path: str  # where it is in the block
    tokens: str = "hidden_states"  # the parameter that is the tokens
    output: int | None = None  # which item of its output is the tokens, where that is a tuple
    # Of an attention, as far as it has them:
    keys: str | None = None  # the parameter of other tokens to take keys and values from
    values: str | None = None  # the parameter of other tokens to take values from, where a forward has one
    bias: str | None = None  # the parameter that is added to the logits of each key
    rope: str | None = None  # the parameter that holds rotary embeddings of the tokens
    key_layer: str | None = None  # the module in it that returns [B, heads, N, D] or [B, N, heads * D] keys
    processors: tuple[str, ...] = ()  # classes of diffusers' processors that attend in the plain way
    biased: tuple[str, ...] = ()  # others that add a bias of keys, if their kernels can
    orderless: tuple[str, ...] = ()  # others to which it makes no difference where in the image a token is
    cache: str | None = None  # an attribute in which hosts keep its output for other steps
    keepers: tuple[str, ...] = ()  # others that keep a map of attention, which hosts read as of all tokens
    # What it costs is known by the layers that make its queries, keys and values, which may be fewer than
    # three, the one after attention, and the attribute that is the number of its heads.
    layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    heads: str = "heads"
    # Whether it has the keys of the text, or the path of an attribute of the block that says so.
    sees_text: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) < 2:
            raise ValueError(
                f"Part: layers must name that of queries first and the last one, got {self.layers}"
            )


@dataclass(frozen=True)
class Block(Checked):
    """The parts of a transformer block. What a family's blocks do not have stays None."""

    input: str  # the module that is given the block's tokens first of all
    attn: Part
    cross: Part | None = None
    mlp: Part | None = None
    # The module that is given the tokens after attention, where ViTs merge. "", as all paths then, where
    # attention and the rest run beside each other in the block itself: what that is given merges.
    middle: str | None = None
    end: str | None = None  # the last module that sees what the second half adds to the tokens
    or_end: tuple[str, ...] = ()  # those before it, which are the last ones where a forward leaves it out
    tokens: str = "hidden_states"  # the parameter of the block's own forward that is the tokens

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that take tokens and return as many, by the name that options have for them."""
        named = {"attn": self.attn, "cross": self.cross, "mlp": self.mlp}
        return {name: part for name, part in named.items() if part is not None}


@dataclass(frozen=True)
class Family(Checked):
    """A family of networks: what people call it, and names of classes."""

    name: str
    networks: tuple[str, ...]  # classes of the whole network
    blocks: dict[str, Block]  # classes of its transformer blocks, and the parts of each

    def sites(self, network: nn.Module) -> Iterator[Site]:
        """The transformer blocks of a network, in the order of its forward pass.

        Raises:
            Misfit: it is not of this family, but for the name of its class.
        """
        raise NotImplementedError

    def block(self, module: nn.Module) -> Block | None:
        """The parts of a module that is a block of this family, else None."""
        return next((row for kind, row in self.blocks.items() if is_named(module, (kind,))), None)


# How deep in an object that is neither pipeline nor module one of these may be.
DEEP = 2


class Misfit(ValueError):
    """What tells a network whose class has one of the names of a family from one of that family."""


AnyFamily = TypeVar("AnyFamily", bound=Family)


@dataclass(frozen=True)
class Site:
    """A transformer block of a network, and where in it."""

    name: str  # its path in the network
    module: nn.Module
    block: Block
    container: nn.Module  # whose input is the image of the block's tokens
    level: int = 0  # how often the resolution was halved before it

    @property
    def downsample(self) -> int:
        """How many times smaller its image is than the network's input."""
        return 1 << self.level

    def part(self, name: str) -> nn.Module | None:
        """The module of one of `attn`, `cross` and `mlp`, if this block has one."""
        part = self.block.parts.get(name)
        return None if part is None else submodule(self.module, part.path)

    def sees_text(self, name: str) -> bool:
        """Whether `attn` or `cross` of this block takes its keys from the text."""
        where = self.block.parts[name].sees_text
        if not isinstance(where, str):
            return where
        try:
            return bool(attrgetter(where)(self.module))
        except AttributeError:  # attention of another make
            return name == "cross"


@dataclass(frozen=True, eq=False)
class Network(Generic[AnyFamily]):
    """A network in a model: its path there, itself, its row and its blocks."""

    name: str
    module: nn.Module
    family: AnyFamily
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        return self.name or type(self.module).__name__

    def path(self, site: Site) -> str:
        """The path of one of its blocks in the model."""
        return f"{self.name}.{site.name}" if self.name else site.name


def is_named(module: object, names: tuple[str, ...]) -> bool:
    """Whether a class of this name is among the ancestors of `module`."""
    return any(ancestor.__name__ in names for ancestor in type(module).__mro__)


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path in another one, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def find(model: object, families: Sequence[AnyFamily]) -> list[Network[AnyFamily]]:
    """Every network of some families in a pipeline, a module or what holds one.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: a network is only named as one of a family, and has none in it.
    """
    found: dict[int, Network[AnyFamily]] = {}
    misfits: list[tuple[nn.Module, str]] = []
    for name, module in named_modules_of(model):
        rows = [row for row in families if is_named(module, row.networks)]
        if not rows or id(module) in found:
            continue
        reasons: dict[str, None] = {}
        for row in rows:
            try:
                found[id(module)] = Network(name, module, row, tuple(row.sites(module)))
                break
            except Misfit as misfit:
                reasons[str(misfit)] = None
        else:
            kind, names = type(module), " or ".join(row.name for row in rows)
            says = f"{name or 'the model'} is a {kind.__name__} as of {names}, but not one that tomesd knows"
            misfits.append((module, f"{says} (it is from {kind.__module__}): {' and '.join(reasons)}"))
    for module, why in misfits:
        # In older versions of some packages a wrapper has the name that the network has now.
        if not any(id(part) in found for part in module.modules()):
            raise ValueError(why)
    return list(found.values())


def paths_of_parts(block: Block) -> list[str]:
    """Where the parts of a block are in it."""
    return [part.path for part in block.parts.values()]


def refuse_shared(
    network: str, sites: Iterable[Site], paths: Callable[[Block], Iterable[str]] = paths_of_parts
) -> None:
    """Raises a ValueError where a block, or a part of one, is in two places: calls do not say which it is."""
    places: dict[int, str] = {}
    for site in sites:
        for path in ("", *paths(site.block)):
            module, name = submodule(site.module, path), ".".join(filter(None, (site.name, path)))
            if module is not None and places.setdefault(id(module), name) != name:
                raise ValueError(
                    f"{places[id(module)]} and {name} of {network} are one and the same module, so it cannot "
                    "be told where in the network it is called: give each place one of its own"
                )


def known(families: Sequence[Family]) -> str:
    """Families and their classes, for an error."""
    return "; ".join(f"{family.name} ({', '.join(family.networks)})" for family in families)


def named_modules_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """Every module in a model, with its path there.

    Raises:
        TypeError: the model is neither module nor pipeline.
    """
    for prefix, part in modules_of(model):
        yield from part.named_modules(prefix=prefix)


def modules_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """A module itself, or the modules that a pipeline, a dict of its components or a wrapper of it has.

    Raises:
        TypeError: the model is neither module nor pipeline.
    """
    if isinstance(model, type):
        raise TypeError(
            f"expected a pipeline or a torch module, got the class {model.__name__}: make one first"
        )
    if not isinstance(model, nn.Module | Mapping | list | tuple) and not hasattr(model, "__dict__"):
        kind = type(model).__name__
        given = f"{model!r} ({kind})" if isinstance(model, (str, int, float, type(None))) else kind
        raise TypeError(f"expected a pipeline or a torch module, got {given}")
    yield from _parts("", model, set(), DEEP)


def _parts(name: str, value: Any, seen: set[int], deep: int) -> Iterator[tuple[str, nn.Module]]:
    """`deep`: how many more objects in one another to look into, which may be of any kind."""
    if isinstance(value, nn.Module):
        yield name, value
        return
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, (list, tuple)):  # MultiControlNet may be a plain list of networks
        inside = enumerate(value)
    # Pipelines, and managers of what several have in common. What others call so may fail if it is asked for.
    elif hasattr(value, "__dict__") and inspect.getattr_static(value, "components", None) is not None:
        inside, deep = vars(value).items(), 0
    elif hasattr(value, "__dict__") and (not name or (deep and not isinstance(value, type | ModuleType))):
        inside, deep = vars(value).items(), deep - bool(name)
        if name:  # not its tables, which may be large
            inside = [(key, part) for key, part in inside if not isinstance(part, Mapping | list | tuple)]
    if id(value) not in seen:
        seen.add(id(value))
        for key, part in list(inside):
            yield from _parts(f"{name}.{key}" if name else str(key), part, seen, deep)
