"""apply_patch and remove_patch for vision transformers, and the names of the ToMe package for them."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import nn

from ..hosts.hooks import OWNER, patch_of, show_hooks_to_compile, take_off
from ..hosts.networks import checked, find_networks
from ..maths.token_map import TokenMap
from ..methods.layers import attach
from ..methods.layers_patch import Holder, LayersPatch, MergeLayers, Metric, Mode, is_copy
from ..methods.layers_state import Unmerge

Model = TypeVar("Model", bound=nn.Module)


def apply_patch(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
    unmerge: Unmerge = "copy",
) -> Model:
    """Makes the vision transformers in a model merge `model.r` tokens in each layer.

        tome.apply_patch(model)
        model.r = 8

    `model.r` is 0 after each `apply_patch` and may be set at any time; `parse_r` has its forms. At most half
    of the tokens that may merge do so in one layer. Class, distillation and register tokens never merge. A
    patched model is patched anew.

    Args:
        model: a module of timm, torchvision, SWAG, MAE or transformers, or one that holds such.
        trace_source: keep which tokens merged, for `source`.
        prop_attn: let attention count a merged token as many times as it has tokens; by default True, but for
            MAE. False is for models that are trained with merging.
        metric: compare the tokens as they are after attention (their first 128 channels), or the keys of
            attention, as ToMe does.
        mode: give a merged token the mean of its tokens, as ToMe does, or (`"mlerp"`; Kim et al., Token
            Fusion, 2024) the direction of the mean with the largest of their norms. ToMe's two choices are
            for training and for models that were trained with it; the defaults lose less accuracy without.
        unmerge: give back to each token what its group became, or (`"residual"`) that and what told it from
            the group when they merged. For those who read patches and not the class token: dense features are
            6 to 12 % nearer to plain ones, and no longer alike within groups.

    Returns:
        The same model.

    Raises:
        TypeError: the model is no module, or an option is of the wrong type.
        ValueError: it holds no vision transformer of a known family, or one whose tokens cannot be merged,
            or an option is none of those above.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    return _apply(model, None, MergeLayers(trace_source, prop_attn, metric, mode, unmerge))


class Verb(Protocol):
    """`apply_patch` for the models of one package."""

    def __call__(
        self,
        model: Model,
        trace_source: bool = False,
        prop_attn: bool | None = None,
        *,
        metric: Metric = "tokens",
        mode: Mode = "mlerp",
        unmerge: Unmerge = "copy",
    ) -> Model: ...


def _verb(package: str, models: str, weigh: bool | None = None) -> Verb:
    def patch_package(
        model: Model,
        trace_source: bool = False,
        prop_attn: bool | None = weigh,
        *,
        metric: Metric = "tokens",
        mode: Mode = "mlerp",
        unmerge: Unmerge = "copy",
    ) -> Model:
        return _apply(model, package, MergeLayers(trace_source, prop_attn, metric, mode, unmerge))

    patch_package.__doc__ = f"`apply_patch` for models of {models}."
    return patch_package


timm = _verb("timm", "timm")
swag = _verb("swag", "SWAG and torchvision")
mae = _verb("timm", "MAE, which are timm's, without proportional attention by default", weigh=False)
transformers = _verb("transformers", "transformers")


def set_r(module: Model, r: Any) -> Model:
    """Sets how many tokens merge in each layer, for every patch in a module or below a wrapper of one.

        tome.apply_patch(model)
        wrapped = torch.nn.DataParallel(model)  # or DDP, FSDP, a PeftModel
        tome.set_r(wrapped, 8)  # as model.r = 8; wrapped.r = 8 would reach nobody

    Args:
        r: `parse_r` has its forms.

    Returns:
        The same module.

    Raises:
        TypeError: `module` is no module, or `r` is of the wrong type.
        ValueError: nothing there is patched, or `r` is out of range for one of the networks.
    """
    patches = _patches_in(module)
    if not patches:
        raise ValueError(f"{type(module).__name__} holds no patched vision transformer: apply_patch first")
    for patch in patches:
        patch.parse(r)
    inside = {id(part) for part in module.modules()}
    for patch in patches:
        holder = None if patch.holder is None else patch.holder.model
        if holder is not None and id(holder) in inside:
            if holder is not patch.network:
                vars(patch.network).pop("r", None)
            holder.r = r
        else:
            patch.network.r = r
    return module


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; unpatched models are left as they are.

    Raises:
        TypeError: the model is no module.
    """
    for patch in _patches_in(model):
        _detach(patch)
    take_off(model, is_copy)
    return model


def source(model: nn.Module, layer: int = -1) -> TokenMap:
    """Which of the original tokens, class token and all, each token held after a layer of the last forward.

        tome.apply_patch(model, trace_source=True)
        model.r = 8
        model(images)
        tome.source(model).index  # group of each token, [B, N]

    Args:
        layer: counted from 0, or from the last one backwards.

    Raises:
        TypeError: the model is no module, or `layer` no integer.
        ValueError: the model is not patched, or not with `trace_source=True`, or has several networks, or no
            such layer.
        RuntimeError: it did not run yet.
    """
    patches = _patches_in(model)
    if len(patches) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(patches)} vision transformers: pass one of them")
    if not patches:
        raise ValueError(f"{type(model).__name__} is not patched: patch it with trace_source=True")
    return patches[0].source(layer)


def _apply(model: Model, package: str | None, method: MergeLayers) -> Model:
    networks = find_networks(model, package)
    holder: Any = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    ours = "_tome_info" in vars(holder) or patch_of(holder) is not None
    if not ours and _has_own_r(holder):
        raise ValueError(
            f"{type(holder).__name__} has an attribute r of its own, which tomesd would overwrite: if it is "
            "yours, `del model.r`, and set it after apply_patch (below a wrapper by tome.set_r)"
        )
    patches = [LayersPatch(network, method) for network in networks]
    try:
        for patch, network in zip(patches, networks, strict=True):
            attach(patch, network)
    except BaseException:
        for patch in patches:
            patch.remove()
        raise
    for network in networks:
        _detach(patch_of(network.module))
    take_off(model, is_copy)
    # Networks of other packages in it keep their patches.
    others = vars(holder)["_tome_info"].patches if "_tome_info" in vars(holder) else []
    holder._tome_info = Holder(holder, [*others, *patches])  # what users of the ToMe package know it as
    for patch in patches:
        setattr(patch.network, OWNER, patch)
    holder.r = 0
    show_hooks_to_compile(method)
    return model


def _patches_in(model: object) -> list[LayersPatch]:
    """The patches of all networks in a module."""
    found = (patch_of(module) for module in checked(model).modules())
    return [patch for patch in found if isinstance(patch, LayersPatch)]


def _has_own_r(model: nn.Module) -> bool:
    """Whether a module has an r, and not only shows that of a module that it wraps."""
    tables = vars(model), model._parameters, model._buffers, model._modules
    return hasattr(type(model), "r") or any("r" in table for table in tables)


def _detach(patch: LayersPatch | None) -> None:
    """Takes a patch off its network, and with the last one `r` off the model that holds it."""
    if patch is None:
        return
    patch.remove()
    delattr(patch.network, OWNER)
    vars(patch.network).pop("r", None)
    holder = patch.holder
    if holder is None:
        return
    holder.patches.remove(patch)
    if not holder.patches:
        for name in ("r", "_tome_info"):
            vars(holder.model).pop(name, None)
