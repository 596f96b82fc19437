"""What hooks on any network need, whatever they do there: arguments, ownership, removal, copies."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..maths.token_map import TokenMap
from .family import submodule

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Record = TypeVar("Record")

# Folders of code that no user has written: of Python, and of what pip installs.
LIBRARIES = tuple(f"{path}{os.sep}" for path in (Path(os.__file__).parent, Path(torch.__file__).parents[1]))
# The attribute of a network that holds its patch.
OWNER = "_tomesd"
# Whose functions as hooks change no tokens.
PACKAGES = ("torch", "tomesd")


class Argument:
    """A parameter of a module's forward, which callers may pass by position or by keyword.

    `position` is where families have it, for a forward that names nothing (`*args, **kwargs`). Position 0 is
    the first parameter, whatever its name. Else a ValueError says that there is no such parameter.
    """

    def __init__(self, module: nn.Module, name: str, position: int | None = None) -> None:
        parameters = list(inspect.signature(type(module).forward).parameters.values())
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]  # self, which a forward of `*args` alone takes with the rest
        kinds = {parameter.kind for parameter in parameters}
        every = [parameter.name for parameter in parameters]
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if name in places:
            position = places.index(name)
        elif position == 0 and places and name not in every:
            name = places[0]
        elif position is None or name in every or inspect.Parameter.VAR_POSITIONAL not in kinds:
            position = None
            if name not in every and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise ValueError(
                    f"the forward of {type(module).__name__} has no parameter {name}, only {', '.join(every)}"
                )
        self.name = name
        self.position = position

    @classmethod
    def optional(cls, module: nn.Module, name: str | None, position: int | None = None) -> Argument | None:
        """The parameter, or None of a forward that has none of this name."""
        try:
            return None if name is None else cls(module, name, position)
        except ValueError:
            return None

    def get(self, args: Args, kwargs: Kwargs) -> Any:
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name)

    def put(self, args: Args, kwargs: Kwargs, value: Any) -> tuple[Args, Kwargs]:
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class PerThread(Generic[Record]):
    """A record for each thread that asks: one module may run in several threads, each on images of its own.

    Code of torch.compile has one record, and so has the thread that makes this: where a graph breaks, plain
    code goes on with what is known. `make` makes a record.
    """

    def __init__(self, make: Callable[[], Record]) -> None:
        self.make = make
        self.local = threading.local()
        self.compiled = self.local.record = make()

    def get(self) -> Record:
        """The record of this thread."""
        if torch.compiler.is_compiling():
            return self.compiled
        record: Record | None = getattr(self.local, "record", None)
        if record is None:
            record = self.local.record = self.make()
        return record

    def __reduce__(self) -> tuple[type[PerThread[Record]], tuple[Callable[[], Record]]]:
        return PerThread, (self.make,)  # copies start anew


class Listener(Protocol):
    """What is told about each plan that a patched network makes."""

    def begin(self) -> None:
        """A forward of the network begins."""

    def note(self, block: str, image: Any, batch: int, token_map: TokenMap) -> None:
        """A block will merge the tokens of `batch` images by a map."""


class Patch:
    """All that tomesd holds on one network: hooks, bound methods that copies take along, and who listens.

    `checks`: whether what is on its modules by now may be an error.
    """

    def __init__(self, checks: bool = True) -> None:
        self.checks = checks
        self.handles: list[RemovableHandle] = []
        self.listeners: list[Listener] = []
        self.warned: set[str] = set()
        self.owner: RemovableHandle | None = None  # of a hook on the network itself

    def __getstate__(self) -> dict[str, Any]:
        # Nobody listens to copies; and of a copy of a part there are handles whose modules are gone.
        handles = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]
        owner = self.owner if self.is_owned else None
        return {**vars(self), "handles": handles, "owner": owner, "listeners": []}

    @property
    def is_owned(self) -> bool:
        """Whether there is a network that it is on; that of a copy of a part has none."""
        return self.owner is not None and self.owner.hooks_dict_ref() is not None

    def before(self, module: nn.Module, hook: Callable[..., Any], kwargs: bool = True) -> None:
        """Calls `hook(module, args, kwargs)` before each call of a module; it may return other ones.

        Without `kwargs` it is `hook(module, args)`: what swaps layers copies such hooks alone.
        """
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs))

    def after(self, module: nn.Module, hook: Callable[..., Any], first: bool = False) -> None:
        """Calls `hook(module, args, kwargs, output)` after it; `first`: before the hooks that are there."""
        self.handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))

    def keep_inside(self, module: nn.Module | None) -> None:
        """Moves its hooks on a module next to the forward, inside of those that others have hung there since.

        So these are given all tokens, and what they change is as it would be without a patch.
        """
        if module is None or torch.compiler.is_compiling():
            return
        before: Any = module._forward_pre_hooks  # of both torch.nn only says that they are dicts
        after: Any = module._forward_hooks
        is_last = not before or is_ours(next(reversed(before.values())))
        is_first = not after or is_ours(next(iter(after.values())))
        if is_last and is_first:
            return
        own = {handle.id for handle in self.handles}
        for key in [key for key in before if key in own]:
            before.move_to_end(key)
        for key in [key for key in reversed(after) if key in own]:
            after.move_to_end(key, last=False)

    def look_for(self, module: nn.Module, inside: Mapping[str, Any]) -> None:
        """Warns of modules in one, given by paths and hooks on them, that are called no more."""
        if torch.compiler.is_compiling():
            return
        for path, hook in inside.items():
            if changed := fate(submodule(module, path), hook):
                self.warn(
                    f"{hook.__self__.name} {changed}: patch again, or it may run plain", about="changes"
                )

    def refuse_onnx(self) -> None:
        """Raises a ValueError while what runs is exported to ONNX."""
        if torch.onnx.is_in_onnx_export():
            raise ValueError(
                "tomesd: ONNX has no operators for what patches of networks that draw do: remove_patch "
                "first. torch.jit.trace and torch.export take them along"
            )

    def warn(self, message: str, about: str = "calls") -> None:
        """Warns once about each kind of thing that this patch meets."""
        if about not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(about)
            warnings.warn(f"tomesd: {message}", stacklevel=level_of_user())

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self.handles:
            handle.remove()


def level_of_user() -> int:
    """How far up the stack, from who asks, is code that is neither this package's nor a library's.

    It is the line that a warning is about, whoever called whom in between.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
        or frame.f_code.co_filename.startswith(LIBRARIES)
    ):
        level, frame = level + 1, frame.f_back
    return level


def hooks_before(module: nn.Module | None) -> list[Callable[..., Any]]:
    """What is called before each call of a module."""
    return [] if module is None else list(module._forward_pre_hooks.values())


def fate(module: nn.Module | None, hook: Any) -> str | None:
    """What has become of the module at a place where a hook was put before it, if that is called no more.

    A wrapper around the module will do, but not one that calls a copy of it: peft's `modules_to_save` does.
    """
    if module is None or hook in hooks_before(module):
        return None
    inside = [other for part in module.modules() for other in hooks_before(part)]
    copied = any(getattr(other, "__func__", None) is hook.__func__ and other != hook for other in inside)
    if hook in inside and not copied:
        return None
    return f"was {'copied' if copied else 'replaced'} after apply_patch, by a {type(module).__name__}"


def is_ours(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of this package."""
    return type(getattr(hook, "__self__", None)).__module__.partition(".")[0] == __name__.partition(".")[0]


def has_hooks_of_others(modules: Iterable[nn.Module]) -> bool:
    """Whether others have hung hooks on one of these modules; torch's own ones are about weights alone."""
    if torch.compiler.is_compiling():
        return False
    hung = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    return any(
        not is_ours(hook) and str(getattr(hook, "__module__", "")).partition(".")[0] not in PACKAGES
        for module in hung
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def take_off(model: nn.Module, wanted: Callable[[Any], bool]) -> None:
    """Takes hooks that are `wanted` off all modules of a model, whoever has put them there."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if wanted(hook)]:
                # Beside its hooks a module notes of each what it is to be given.
                for name, table in vars(module).items():
                    if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                        table.pop(key, None)


def has_other_forward(module: nn.Module) -> bool:
    """Whether somebody has put another forward on a module itself, but for offload, caches and compilers."""
    other = module.__dict__.get("forward")
    known = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    return other is not None and not known and not hasattr(other, "_torchdynamo_orig_callable")


def patch_of(network: nn.Module) -> Any:
    """The patch on a network, or None."""
    return vars(network).get(OWNER)


# Kinds of patches that models have had since torch.compile began with nothing.
_kinds: set[Hashable] = set()


def show_hooks_to_compile(kind: Hashable) -> None:
    """Makes torch.compile look at hooks from now on, and at times discards what it has made.

    By default it takes one module for another that differs in its hooks alone: a patched model would run
    the code of an unpatched one of its class. Once it looks at hooks, what it has made for a kind of patch
    serves again. But it makes no more than some programs for a module, so that many kinds need a fresh start.
    """
    import torch._dynamo

    config = torch._dynamo.config
    most = getattr(config, "recompile_limit", 8) // 2  # another name in older versions
    if config.skip_nnmodule_hook_guards or len(_kinds | {kind}) > most:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
        _kinds.clear()
    _kinds.add(kind)
