"""A family of vision transformers, as a record, and how its blocks are found in a network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any

from torch import nn
from torch.torch_version import TorchVersion as Version

from .family import Block, Family, Misfit, Part, Site, submodule

# What a row says of attention.
ATTENTION = ("path", "tokens", "bias", "rope", "key_layer")


@dataclass(frozen=True)
class VisionFamily(Family):
    """A family of networks whose blocks are `x = x + attn(norm1(x)); x = x + mlp(norm2(x))`."""

    package: str = "transformers"  # the function of `tomesd.vit.patch` that patches it
    path: str = "encoder.layers"  # the list of its blocks
    prefix: Callable[[Any], int] = lambda network: 1  # how many tokens before the patches never merge
    suffix: Callable[[Any], int] = lambda network: 0  # how many after the patches
    prop_attn: bool = True  # whether a merged token counts as many times as it has tokens, by default
    distilled: Callable[[Any], bool] = lambda network: False  # whether one of those is a distillation token
    since: str = ""  # the first version of the package whose classes are as this row says

    def __post_init__(self) -> None:
        self._check_types()
        for name, block in self.blocks.items():
            needed = {"middle": block.middle, "end": block.end}
            if self.prop_attn:
                needed["attn's bias (or prop_attn=False)"] = block.attn.bias
            lacks = [part for part, given in needed.items() if given is None]
            if lacks:
                raise ValueError(f"the row of {name} in {self.name} lacks {', '.join(lacks)}")

    def _check_types(self) -> None:
        for name in ("name", "path", "package", "since"):
            check_type(name, getattr(self, name), str, "a string")
        check_type("networks", self.networks, tuple, "a tuple of names of classes")
        check_type("blocks", self.blocks, dict, "a dict of Blocks by names of classes")
        check_type("prop_attn", self.prop_attn, bool, "a bool")
        for name in (*self.networks, *self.blocks):
            check_type("the name of a class", name, str, "a string")
        for name, block in self.blocks.items():
            check_type(f"blocks[{name!r}]", block, Block, "a Block")
            check_type(f"attn of {name}", block.attn, Part, "a Part")
            check_type(f"or_end of {name}", block.or_end, tuple, "a tuple of paths")
            paths = {"input": block.input, "middle": block.middle, "end": block.end, "tokens": block.tokens}
            paths |= {f"attn's {part}": getattr(block.attn, part) for part in ATTENTION}
            for part, path in paths.items():
                check_type(f"{part} of {name}", path, str | None, "a string")
        for name in ("prefix", "suffix", "distilled"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function of the network, got {getattr(self, name)!r}")

    def count(self, name: str, network: nn.Module) -> int:
        """What `prefix` or `suffix` says of a network."""
        number = getattr(self, name)(network)
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} of {self.name} must return a number of tokens, got {number!r}")
        return number

    def too_old(self, module: nn.Module) -> str:
        """What to say of a module that is not as this row says, if its package is too old for that."""
        package = type(module).__module__.split(".")[0]
        installed = getattr(sys.modules.get(package), "__version__", "")
        if package != self.package or not self.since or Version(installed) >= Version(self.since):
            return ""
        return f" (tomesd needs {self.package} >= {self.since} for it, installed is {installed})"

    def sites(self, network: nn.Module) -> Iterator[Site]:
        container = submodule(network, self.path)
        if container is None:
            raise Misfit(f"it has no {self.path} as {self.name}{self.too_old(network)}")
        used: dict[int, str] = {}
        # Not named_children: that leaves out what is there twice.
        for child, module in container._modules.items():
            block = None if module is None else self.block(module)
            name = f"{self.path}.{child}"
            if module is None or block is None:
                inside = module is not None and any(map(self.block, module.modules()))
                raise ValueError(
                    f"{name} of {type(network).__name__} is a {type(module).__name__}; of {self.name} tomesd "
                    f"knows {', '.join(self.blocks)}"
                    + (": patch the model first, and then wrap its blocks" if inside else "")
                )
            attn = block.attn
            block = replace(block, end=last_called(module, block))
            for part in (block.input, attn.path, block.middle, block.end):
                if part is not None and submodule(module, part) is None:
                    raise ValueError(
                        f"{name} of {type(network).__name__} has no {part}, at which tomesd merges the "
                        f"tokens of {self.name}{self.too_old(module)}"
                    )
            for path in dict.fromkeys(("", block.input, attn.path, block.middle or "")):
                place = f"{name}.{path}" if path else name
                other = used.setdefault(id(module.get_submodule(path)), place)
                if other != place:
                    raise ValueError(
                        f"{other} and {place} of {type(network).__name__} are one and the same module, so it "
                        "cannot be told where in the network it is called: give each place one of its own"
                    )
            yield Site(name, module, block, container)


def check_type(name: str, value: object, kind: type | UnionType, words: str) -> None:
    """A TypeError that names what was given, if it is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, got {value!r}")


def last_called(module: nn.Module, block: Block) -> str | None:
    """Which of the parts that may be the last the code of a block's forward names."""
    forward: Any = inspect.unwrap(module.forward)
    code = getattr(getattr(forward, "func", forward), "__code__", None)  # it may be a partial
    names = () if code is None else code.co_names
    return next((path for path in (block.end, *block.or_end) if path in names), block.end)
