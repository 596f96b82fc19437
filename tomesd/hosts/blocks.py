"""Blocks while they run: their own calls, and the plan that the parts of a block share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.devices import constant, is_traced
from ..maths.token_map import TokenMap
from .family import Site, submodule
from .hooks import OWNER, Args, Argument, Kwargs, Patch, PerThread, fate
from .image import Call, ContainerHooks, Planner
from .unets import ImageFamily


@dataclass(eq=False)
class BlockCall:
    """What is known of a block during one call of it."""

    x: Tensor | None = None  # its input, until the plan is made
    call: Call | None = None  # of its container
    map: TokenMap | None = None  # the plan
    planned: Call | None = None  # the container's call that this plan is for
    given: Any = None  # what a method keeps of a part while it runs
    sample: TokenMap | None = None  # the keys that the attention that runs is to make
    keys: int = 0  # how often its layer of keys has been given them
    values: int = 0  # and that of values


class BlockHooks:
    """A block while it runs: its own call, and the call of the container that it is part of.

    `plan` is the planner of its method, if it has one. It holds no module, so that a copy of a block does not
    take the whole model along.
    """

    def __init__(self, patch: Patch, container: ContainerHooks, site: Site, family: ImageFamily) -> None:
        self.patch = patch
        self.container = container
        self.name = site.name
        self.own = PerThread(BlockCall)
        self.plan: Planner | None = None
        self.tokens = Argument(site.module, site.block.tokens, 0)
        self.carrier = Argument(site.module, family.carrier) if family.carrier else None
        self.inside: dict[str, Any] = {site.block.attn.path: self.receive}  # parts that it needs
        self.parts = [part.path for part in site.block.parts.values()]
        self.plans = False  # whether its own parts ask for a plan
        patch.before(site.module, self.enter)
        for part in filter(None, (site.part("attn"), site.part("cross"))):
            patch.before(part, self.receive)
        patch.after(site.module, self.forget)

    def plan_by_input(self, site: Site) -> None:
        """From now on keeps the block's input, from which the first part that asks for a plan has it made."""
        # Not at the block itself: what CompVis' checkpointing recomputes begins after it.
        self.plans = True
        first = site.module.get_submodule(site.block.input)
        self.given = Argument(first, "", 0)
        self.patch.before(first, self.keep)

    def keep(self, part: nn.Module, args: Args, kwargs: Kwargs) -> None:
        own = self.own.get()
        own.x, own.map = self.given.get(args, kwargs), None

    def map_of(self, x: Tensor, name: str) -> TokenMap | None:
        """The plan of this block for tokens `x` `[B, N, C]` that one of its parts is given.

        None where they are not those of the block: hosts also call parts for some of the samples, for windows
        of the image, or for all samples as one. There the part is to do what it is asked to.

        Args:
            name: of the part.
        """
        own = self.own.get()
        call = own.call or self.container.unpassed()
        if own.map is None or own.planned is not call:
            # Of a host that goes around the block's own first module the part's tokens have to do.
            own.map = self.make_plan(x if own.x is None else own.x, call)
            own.planned, own.x = call, None
        token_map = own.map
        if token_map is None or call is None:
            return None
        shared = token_map.index.shape[0] < call.batch  # the same for all samples
        if x.shape[1:2] != (token_map.tokens,) or (x.shape[0] != call.batch and not shared):
            self.patch.warn(
                f"{name} was called with {list(x.shape[:2])} tokens, not with its block's "
                f"[{call.batch}, {token_map.tokens}]: such calls are left as they are"
            )
            return None
        return token_map

    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        own = self.own.get()
        own.call, own.planned = self.call_of(args, kwargs), None
        if torch.compiler.is_compiling() or not self.patch.is_owned:
            return
        for path, hook in self.inside.items():
            if changed := fate(submodule(block, path), hook):
                raise RuntimeError(f"tomesd: {path} of {self.name} {changed}: patch again")
        for path in self.parts:
            self.patch.keep_inside(submodule(block, path))

    def receive(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Takes the container's call out of what attention is given, where a host hands it on."""
        call = kwargs.get(OWNER)
        own = self.own.get()
        own.call = call or own.call or self.container.unpassed()
        if call is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != OWNER}
        return args, kwargs

    def forget(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        own = self.own.get()
        if self.plans and own.call is not None and own.planned is None:
            self.patch.warn(f"{self.name} ran plain: the host called none of the parts that were to merge")
        own.x = own.call = own.map = own.planned = own.given = own.sample = None

    def call_of(self, args: Args, kwargs: Kwargs) -> Call | None:
        """The container's call, from what the block itself is given."""
        if self.carrier is None:
            return self.container.unpassed()
        return (self.carrier.get(args, kwargs) or {}).get(OWNER)

    def make_plan(self, x: Tensor, call: Call | None) -> TokenMap | None:
        """Plans what to merge of the tokens `x` `[B, N, C]` of this block, and tells who listens.

        None where they are not those of its container's image.
        """
        if call is None and not self.patch.is_owned:
            return None  # a copy of a part
        if call is None:
            raise RuntimeError(
                f"tomesd: {self.name} was called outside of its network, so it is not known which image its "
                f"{x.shape[1]} tokens are: call the whole network, not a part of it or a copy of a part, "
                "or remove_patch first"
            )
        image = call.image
        if x.shape[:2] != (call.batch, image.h * image.w):
            self.patch.warn(
                f"{self.name} was given {list(x.shape[:2])} tokens of {call.batch} images of {image.h} x "
                f"{image.w}: such calls are left as they are"
            )
            return None
        assert self.plan is not None
        h, w = constant(image.h), constant(image.w)  # blocks may be compiled alone
        if is_traced():  # for one size: at another one the trace is to stop here
            x = x.reshape(-1, h * w, x.shape[-1])
        token_map = self.plan(x, image)
        for listener in self.patch.listeners:
            listener.note(self.name, image, x.shape[0], token_map)
        return token_map
