"""apply_patch and remove_patch for vision transformers, and the names of the ToMe package for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from torch import nn

from ..hosts.hooks import OWNER, patch_of, recompile
from ..hosts.vits import find_networks
from ..maths.token_map import TokenMap
from ..methods.layers import LayersPatch, MergeLayers, Metric, Mode

Model = TypeVar("Model", bound=nn.Module)


def apply_patch(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
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

    Returns:
        The same model.

    Raises:
        TypeError: the model is no module, or an option is of the wrong type.
        ValueError: it holds no vision transformer of a known family, or one whose tokens cannot be merged,
            or an option is none of those above.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    return _apply(model, None, MergeLayers(trace_source, prop_attn, metric, mode))


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
    ) -> Model: ...


def _verb(package: str, models: str, weigh: bool | None = None) -> Verb:
    def patch_package(
        model: Model,
        trace_source: bool = False,
        prop_attn: bool | None = weigh,
        *,
        metric: Metric = "tokens",
        mode: Mode = "mlerp",
    ) -> Model:
        return _apply(model, package, MergeLayers(trace_source, prop_attn, metric, mode))

    patch_package.__doc__ = f"`apply_patch` for models of {models}."
    return patch_package


timm = _verb("timm", "timm")
swag = _verb("swag", "SWAG and torchvision")
mae = _verb("timm", "MAE, which are timm's, without proportional attention by default", weigh=False)
transformers = _verb("transformers", "transformers")


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; unpatched models are left as they are.

    Raises:
        TypeError: the model is no module.
        ValueError: it holds no vision transformer of a known family.
    """
    for network in find_networks(model):
        _detach(network.module)
    return model


def source(model: nn.Module, layer: int = -1) -> TokenMap:
    """Which of the original tokens, class token and all, each token held after a layer of the last forward.

    Args:
        layer: counted from 0, or from the last one backwards.

    Raises:
        ValueError: the model is not patched, or not with `trace_source=True`, or has several networks, or no
            such layer.
        RuntimeError: it did not run yet.
    """
    patches: list[LayersPatch | None] = [patch_of(network.module) for network in find_networks(model)]
    if len(patches) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(patches)} vision transformers: pass one of them")
    patch = patches[0]
    if patch is None or not patch.trace_source:
        raise ValueError("no sources are kept: patch the model with trace_source=True")
    return patch.source(layer)


def _apply(model: Model, package: str | None, method: MergeLayers) -> Model:
    networks = find_networks(model, package)
    holder = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if hasattr(holder, "r") and not any(True for _ in _patches_of(holder)):
        raise ValueError(
            f"{type(holder).__name__} has an attribute r of its own, which tomesd would overwrite"
        )
    patches = [LayersPatch(holder, network, method) for network in networks]
    try:
        for patch, network in zip(patches, networks, strict=True):
            patch.attach(network)
    except BaseException:
        for patch in patches:
            patch.remove()
        raise
    for network in networks:
        _detach(network.module)
    for patch in patches:
        setattr(patch.network, OWNER, patch)
        holder._tome_info = patch  # what users of the ToMe package know it as
    holder.r = 0
    recompile(method)
    return model


def _patches_of(holder: nn.Module) -> Iterator[LayersPatch]:
    """The patches in a model that read its `r`."""
    for module in holder.modules():
        patch = patch_of(module)
        if isinstance(patch, LayersPatch) and holder in (patch.model, module):
            yield patch


def _detach(network: nn.Module) -> bool:
    """Takes the patch off a network; whether there was one."""
    patch = patch_of(network)
    if patch is None:
        return False
    patch.remove()
    delattr(network, OWNER)
    vars(network).pop("r", None)
    if not any(True for _ in _patches_of(patch.model)):
        for name in ("r", "_tome_info"):
            vars(patch.model).pop(name, None)
    return True
