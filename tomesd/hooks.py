"""What hooks on a host's modules need, whatever is merged there."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Argument:
    """A parameter of a module's forward, which callers may pass by position or by keyword."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.position = list(inspect.signature(type(module).forward).parameters).index(name) - 1

    def get(self, args: Args, kwargs: Kwargs) -> Any:
        return args[self.position] if self.position < len(args) else kwargs.get(self.name)

    def put(self, args: Args, kwargs: Kwargs, value: Any) -> tuple[Args, Kwargs]:
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


def is_named(module: object, names: tuple[str, ...]) -> bool:
    """Whether a class of this name is among the ancestors of `module`."""
    return any(ancestor.__name__ in names for ancestor in type(module).__mro__)


def recompile() -> None:
    """Discards what torch.compile has made, and makes it look at hooks from now on.

    By default it takes one module for another that differs in its hooks alone: a patched model would run
    the code of an unpatched one of its class.
    """
    import torch
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
