"""A family of vision transformers, as a record, and how its blocks are found in a network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.torch_version import TorchVersion as Version

from .family import Block, Family, Misfit, Site, refuse_shared, submodule


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
        super().__post_init__()
        for field in ("name", "networks", "blocks", "path"):
            if not getattr(self, field):
                raise ValueError(f"a family needs a name, networks, blocks and a path: {field} is empty")
        for name, block in self.blocks.items():
            needed = {"middle": block.middle, "end": block.end}
            if self.prop_attn:
                needed["attn's bias (or prop_attn=False)"] = block.attn.bias
            lacks = [part for part, given in needed.items() if given is None]
            if lacks:
                raise ValueError(f"the row of {name} in {self.name} lacks {', '.join(lacks)}")
            paths = (block.input, block.attn.path, block.middle, block.end)
            if "" in paths and any(paths):
                raise ValueError(
                    f'the row of {name} in {self.name} has "" for some of input, attn, middle and end: all '
                    'of them are "" where attention and the rest run beside each other, or none'
                )

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
        sites: list[Site] = []
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
            block = replace(block, end=last_called(module, block))
            for part in (block.input, block.attn.path, block.middle, block.end):
                if part is not None and submodule(module, part) is None:
                    raise ValueError(
                        f"{name} of {type(network).__name__} has no {part}, at which tomesd merges the "
                        f"tokens of {self.name}{self.too_old(module)}"
                    )
            sites.append(Site(name, module, block, container))
        # `end` may be a module that the first half calls too.
        refuse_shared(type(network).__name__, sites, lambda row: (row.input, row.attn.path, row.middle or ""))
        return iter(sites)


def last_called(module: nn.Module, block: Block) -> str | None:
    """Which of the parts that may be the last the code of a block's forward names."""
    forward: Any = inspect.unwrap(module.forward)
    code = getattr(getattr(forward, "func", forward), "__code__", None)  # it may be a partial
    names = () if code is None else code.co_names
    return next((path for path in (block.end, *block.or_end) if path in names), block.end)
