"""apply_patch, remove_patch and patched: which blocks of a model get which method, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .hosts.blocks import BlockHooks
from .hosts.family import Site, named_modules_of, refuse_shared
from .hosts.hooks import OWNER, Patch, is_ours, patch_of, show_hooks_to_compile, take_off
from .hosts.image import ContainerHooks, NetworkHooks, Planner
from .hosts.refused import why_bare
from .hosts.unets import find_networks
from .merge import compute_merge as compute_merge  # where tomesd 0.1.3 has it
from .methods import cost, options
from .methods.choice import ByKey, Chosen, ImageNetwork, UpTo
from .methods.cost import PlanIfItPays
from .methods.merge import Merge
from .methods.method import Method
from .methods.recipe import Recipe
from .methods.shrink import DeepShrink

Model = TypeVar("Model")
P = ParamSpec("P")


def apply_patch(
    model: Model,
    ratio: float | Method | Recipe | Mapping[Any, float | Method] = 0.5,
    max_downsample: int | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    *,
    auto: bool = False,
    shrink: DeepShrink | None = None,
) -> Model:
    """Makes a model that draws images compute less: by default, by merging similar tokens before attention.

        tomesd.apply_patch(pipe, 0.5)  # as tomesd 0.1.3: Merge(0.5)
        tomesd.apply_patch(pipe, tomesd.SampleKeys(0.5))  # nearer to the plain picture for the same time
        tomesd.apply_patch(pipe, tomesd.MergeStage(0.5), max_downsample=4)
        tomesd.apply_patch(pipe, {1: tomesd.SampleKeys(0.75), 2: tomesd.Merge(0.5)})  # by downsample

    A patched model is patched anew. Everything is checked before anything is touched: if there is an error,
    the model is as it was.

    Args:
        model: a diffusers pipeline (its ControlNets are patched too), a bare network, or a CompVis LDM.
        ratio: the share of the tokens that merge away, for `Merge`; or a method: `Merge`, `SampleKeys`,
            `MergeKeys`, `MergeStage`; or a dict of them by downsample of the image (1, 2, 4, 8) or by the
            name of a block; or a `Recipe`.
        max_downsample: work at levels up to this downsampling of the latent image: 1, 2, 4 or 8; None for
            the finest level at which each network has attention (1 in SD 1.5 and 2, 2 in SDXL). A dict and a
            `Recipe` say it by themselves.
        sx: this and those down to `merge_mlp` are the other options of tomesd 0.1.3, for `Merge`; a method
            has options of its own. Its `sx`.
        sy: its `sy`.
        use_rand: whether it has a `seed`.
        merge_attn: whether `"attn"` is in its `parts`.
        merge_crossattn: whether `"cross"` is.
        merge_mlp: whether `"mlp"` is.
        auto: leave blocks alone where the method would be slower, which is measured once for each shape of
            tokens, in about a second; `explain` says where. So the picture may depend on the machine.
        shrink: a `DeepShrink`, for one subject in pictures far above the model's own size.

    Returns:
        The same model.

    Raises:
        TypeError: an option of the wrong type, or one beside a method that has it itself; or a model that is
            neither module nor pipeline.
        ValueError: an option out of range, an unknown model, or a network with nothing to merge.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """
    legacy = {
        "sx": sx,
        "sy": sy,
        "use_rand": use_rand,
        "merge_attn": merge_attn,
        "merge_crossattn": merge_crossattn,
        "merge_mlp": merge_mlp,
    }
    options.boolean("auto", auto)
    if not isinstance(shrink, DeepShrink | None):
        raise options.wrong_type("shrink", "a DeepShrink or None", shrink)
    choice = _choice(ratio, max_downsample, legacy)
    chosen = {network: choice.choose(network) for network in find_networks(model)}
    if not any(chosen.values()):
        kinds = ", ".join(type(network.module).__name__ for network in chosen)
        reason = why_bare(network.module for network in chosen)
        raise ValueError(f"nothing to merge: no transformer blocks that tomesd knows in {kinds}{reason}")
    choice.check(chosen)
    _put([(network, NetworkPatch(methods, auto, shrink)) for network, methods in chosen.items()])
    return model


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; what has none is left as it is.

    Raises:
        TypeError: the model is neither module nor pipeline.
    """
    for _, module in named_modules_of(model):
        if isinstance(patch_of(module), NetworkPatch):
            _detach(module)
            # What copies of parts have brought into it, of which its patch knows nothing.
            take_off(module, is_ours)
    return model


def _as_context(apply: Callable[P, Model]) -> Callable[P, AbstractContextManager[Model]]:
    """A context manager of the signature of `apply_patch`, for people and for type checkers."""

    @contextmanager
    def patched(*args: P.args, **kwargs: P.kwargs) -> Iterator[Model]:
        """Patches a model inside of a `with` block, and leaves it after as it was before.

            with tomesd.patched(pipe, 0.5):
                pipe("a cat")

        Takes the arguments of `apply_patch`. A patch that was on the model before is put back.
        """
        try:
            model: Any = inspect.signature(apply).bind(*args, **kwargs).arguments["model"]
        except TypeError as error:
            raise TypeError(f"patched() {error}") from None
        before = [(network, patch_of(network.module)) for network in find_networks(model)]
        apply(*args, **kwargs)
        try:
            yield model
        finally:
            # The networks of then: the model may hold others by now.
            for network in (network for network, patch in before if not patch):
                _detach(network.module)
            # As it was, whatever has come on its modules since: what is wrong with that, calls say.
            _put([(network, patch.anew()) for network, patch in before if patch])

    patched.__qualname__ = "patched"
    patched.__signature__ = inspect.signature(apply)  # type: ignore[attr-defined]
    return patched


patched = _as_context(apply_patch)
"""`apply_patch` for a `with` block: `with tomesd.patched(pipe, 0.5): ...`. Then what was there comes back."""


class NetworkPatch(Patch):
    """All that tomesd holds on one network that draws images. As its hooks, it holds no module."""

    def __init__(self, chosen: Chosen, auto: bool, shrink: DeepShrink | None, checks: bool = True) -> None:
        super().__init__(checks)
        self.chosen, self.auto, self.shrink = chosen, auto, shrink
        self.plans: dict[str, Planner] = {}  # the planner of each block that has a method

    def anew(self) -> NetworkPatch:
        """One of the same options, on no network, which takes that as it is."""
        return NetworkPatch(self.chosen, self.auto, self.shrink, checks=False)

    @property
    def kind(self) -> Hashable:
        """What programs of torch.compile depend on."""
        return (*self.chosen.values(), self.shrink)

    def attach(self, network: ImageNetwork) -> None:
        """Registers the hooks of all methods; a ValueError if one cannot be had there."""
        if self.shrink is None and not any(isinstance(method, Method) for method in self.chosen.values()):
            return
        refuse_shared(str(network), network.sites)
        hooks = NetworkHooks(self, network.module, network.family)
        if self.shrink is not None:
            self.shrink.attach(network, hooks, self)
        paths = {module: path for path, module in network.module.named_modules()}
        for container in dict.fromkeys(site.container for site in network.sites):
            sites = [site for site in network.sites if site.container is container]
            methods = dict.fromkeys(self.chosen[site.name] for site in sites if self._has_method(site))
            if not methods:
                continue
            inside = ContainerHooks(self, hooks, paths[container], container, network.family, sites)
            blocks = {site: BlockHooks(self, inside, site, network.family) for site in sites}
            hooks.inside[inside.name] = inside.enter
            inside.inside = {site.name.removeprefix(f"{inside.name}."): blocks[site].enter for site in sites}
            for method in methods:
                assert isinstance(method, Method)
                own = [site for site in sites if self.chosen[site.name] == method]
                method.check(str(network), own, sites)
                for group in method.groups(own):
                    plan = PlanIfItPays(method, method.work(group)) if self.auto else method.plan
                    for site in group:
                        blocks[site].plan = self.plans[site.name] = plan
                    method.attach({site: blocks[site] for site in group}, self)

    def _has_method(self, site: Site) -> bool:
        return isinstance(self.chosen[site.name], Method)


def _put(patches: Sequence[tuple[ImageNetwork, NetworkPatch]]) -> None:
    """Patches networks in place of what is on them: all of them or, if there is an error, none."""
    try:
        for network, patch in patches:
            patch.attach(network)
    except BaseException:
        for _, patch in patches:
            patch.remove()
        raise
    for network, patch in patches:
        old = patch_of(network.module)
        if old is not None:
            patch.listeners = old.listeners
        _detach(network.module)
        if patch.handles:
            setattr(network.module, OWNER, patch)
    # Compiled programs take the answer as a constant. Marked here, as marking it loads torch._dynamo.
    torch.compiler.assume_constant_result(cost.pays)
    if patches:
        show_hooks_to_compile(tuple(patch.kind for _, patch in patches))


def _detach(network: nn.Module) -> bool:
    """Takes the patch off a network; whether there was one."""
    patch = patch_of(network)
    if patch is None:
        return False
    patch.remove()
    delattr(network, OWNER)
    return True


def _choice(given: Any, max_downsample: Any, legacy: dict[str, Any]) -> UpTo | ByKey:
    """What the first arguments of `apply_patch` ask for. `legacy`: the other options of tomesd 0.1.3."""
    if not isinstance(given, Method | Mapping):
        return UpTo(_merge(given, **legacy), max_downsample)
    kind = type(given).__name__
    parameters = inspect.signature(apply_patch).parameters
    for name, value in legacy.items():
        if type(value) is not type(parameters[name].default) or value != parameters[name].default:
            raise TypeError(
                f"{name}={value!r} goes with a ratio that is a number, not with a {kind}: methods have "
                "options of their own"
            )
    if isinstance(given, Method):
        return UpTo(given, max_downsample)
    if max_downsample is not None:
        raise TypeError(
            f"max_downsample={max_downsample!r} goes with one method for all blocks, not with a {kind}, "
            "which says by itself where to work"
        )
    return ByKey.of(given)


def _merge(ratio: Any, sx: Any, sy: Any, use_rand: Any, **parts: Any) -> Merge:
    """The method that the options of tomesd 0.1.3 name."""
    if isinstance(ratio, type) and issubclass(ratio, Method):
        raise TypeError(f"ratio must be a number or a method, got the class {ratio.__name__}: make one first")
    options.number(
        "ratio", ratio, "a number, a method such as SampleKeys(0.5), or a dict or Recipe of methods"
    )
    for name, value in (("use_rand", use_rand), *parts.items()):
        options.boolean(name, value)
    names = {"merge_attn": "attn", "merge_crossattn": "cross", "merge_mlp": "mlp"}
    chosen: Any = tuple(names[name] for name, merge in parts.items() if merge)
    if not chosen:
        raise ValueError(f"nothing to merge: {', '.join(names)} are all False")
    return Merge(ratio, chosen, sx, sy, 0 if use_rand else None)  # pyright: ignore[reportArgumentType]
