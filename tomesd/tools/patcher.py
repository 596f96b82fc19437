"""tomesd through a model patcher, as ComfyUI and Forge have one: patches of self-attention, for one clone.

Nothing is put on the network, which all clones share. `comfyui` and `examples/webui` stand on this.

A block calls `enter` with what goes into its self-attention, and `leave` with what came out. What these two
share travels in the dict that the block gives both. What blocks share is kept for one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hosts.family import Network, Site
from ..hosts.hooks import PerThread
from ..hosts.image import Image
from ..hosts.unets import FAMILIES
from ..maths.attention import key_bias
from ..maths.linear import unmerge_linear
from ..maths.probes import add_missed
from ..maths.token_map import TokenMap, take
from ..methods.choice import ByKey, UpTo
from ..methods.keys import KeysMethod
from ..methods.merge import Merge
from ..methods.merge_keys import MergeKeys
from ..methods.method import Method
from ..methods.recipe import Recipe
from ..methods.sample_keys import SampleKeys
from ..methods.stage import MergeStage

# ComfyUI and Forge keep CompVis' layout of a UNet.
UNET = next(family for family in FAMILIES if "UNetModel" in family.networks)
# Where a network is in the objects that recipes are made on.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.")
# How patches know a block: part of the network, number in it, number of the block in its transformer.
Place = tuple[str, int, int]


def patch(
    patcher: Any,
    methods: Method | Recipe,
    max_downsample: int | None = None,
    sigmas: tuple[float, float] | None = None,
    weighs: bool = False,
) -> Any:
    """A clone of a model patcher whose self-attention is given fewer tokens or keys.

    Args:
        patcher: ComfyUI's ModelPatcher or Forge's UnetPatcher, of a UNet.
        methods: `Merge`, `SampleKeys` or `MergeKeys`; or a `Recipe` of these, made with the same UNet in
            diffusers or in CompVis' layout.
        max_downsample: of a method: as in `tomesd.apply_patch`.
        sigmas: the largest and the smallest noise to work at; None for all of sampling.
        weighs: whether the host lets `optimized_attention_override` attend, by which merged keys get weights.

    Raises:
        TypeError, ValueError: as `tomesd.apply_patch`; or a method that patches of self-attention cannot do.
    """
    unet = patcher.model.diffusion_model
    network = Network("", unet, UNET, _sites(unet))
    if not network.sites:
        raise ValueError(f"{network} has no transformer blocks of a Stable Diffusion UNet: nothing to merge")
    if isinstance(methods, Recipe):
        choice: Any = ByKey.of(_renamed(methods, unet))
        wanted = list(methods.values())
    else:
        choice, wanted = UpTo(methods, max_downsample), [methods]
    for method in wanted:
        _check(method, weighs)
    chosen = choice.choose(network)
    choice.check({network: chosen})
    found = {_place(site): (chosen[site.name], site) for site in network.sites}
    clone = patcher.clone()
    patches = Patches(
        {place: both for place, both in found.items() if isinstance(both[0], Method)}, sigmas, weighs
    )
    patches.attach(clone)
    return clone


@dataclass(eq=False)
class Step:
    """One step of sampling: its sigmas, by whose identity it is known, and the images of its levels."""

    sigmas: Tensor | None = None
    works: bool = True
    images: dict[Any, Image] = field(default_factory=dict)


@dataclass(eq=False)
class Kept:
    """What is known of self-attention of a block while it runs."""

    method: Any
    site: Site
    map: TokenMap
    x: Tensor  # the tokens [B, N, C]
    fewer: Tensor  # these merged or sampled [B, M, C]
    bias: Tensor | None = None  # of the keys that are left
    probes: Tensor | None = None  # where keys and values are made of the tokens alone


class Patches:
    """The patches of one clone. Its clones get their own: bound methods take a copy of their object along."""

    def __init__(
        self,
        methods: Mapping[Place, tuple[Method, Site]],
        sigmas: tuple[float, float] | None = None,
        weighs: bool = False,
        attend: Any = None,
    ) -> None:
        self.methods = methods
        self.sigmas = sigmas
        self.weighs = weighs
        self.other = attend  # another node's attention
        self.step = Step()
        self.tables: dict[Any, Any] = {}
        self.bias: PerThread[list[Tensor]] = PerThread(list)  # of the keys of the next attention, if any
        self.key = f"tomesd {id(self)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Patches:
        # Neither blocks nor what is kept of a step: the network is shared.
        return Patches(self.methods, self.sigmas, self.weighs, deepcopy(self.other, memo))

    def attach(self, patcher: Any) -> None:
        patcher.set_model_attn1_patch(self.enter)
        patcher.set_model_attn1_output_patch(self.leave)
        if self.weighs:
            options = patcher.model_options["transformer_options"]
            self.other = options.get("optimized_attention_override")
            options["optimized_attention_override"] = self.attend

    def enter(
        self, n: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives self-attention fewer tokens or keys, unless other nodes have tiled them or added some."""
        part, number, *_ = options.get("block") or ("", 0)
        method, site = self.methods.get((part, number, options.get("block_index", 0)), (None, None))
        image = None if method is None or site is None else self.image(n, site, options)
        if image is None or not n.shape[:2] == k.shape[:2] == v.shape[:2]:
            return n, k, v
        assert method is not None
        assert site is not None
        token_map = method.plan(n, image)
        if token_map.is_identity:
            return n, k, v
        plain = k is n and v is n
        mode = "drop" if isinstance(method, SampleKeys) else "mean"
        fewer = token_map.merge(n, mode)
        options[self.key] = kept = Kept(method, site, token_map, n, fewer)
        if plain and isinstance(method, KeysMethod):
            kept.probes = method.probes_of(image)
        if plain:
            k = v = fewer
        else:
            k, v = token_map.merge(k, mode), token_map.merge(v, mode)
        if self.weighs and (
            isinstance(method, MergeKeys) or getattr(method, "prop_attn", False) is not False
        ):
            kept.bias = key_bias(token_map.sizes, n.dtype)
            self.bias.get()[:] = [kept.bias]
        return (fewer if isinstance(method, Merge) else n), k, v

    def leave(self, out: Tensor, options: dict[str, Any]) -> Tensor:
        """Gives every token its result."""
        kept: Kept | None = options.pop(self.key, None)
        if kept is None:
            return out
        self.bias.get().clear()
        method, token_map, (b, n, _) = kept.method, kept.map, kept.x.shape
        if out.shape[:2] == (b, token_map.groups):
            if isinstance(method, Merge) and method.unmerge == "linear":
                return unmerge_linear(token_map, kept.x, kept.fewer, out)
            # A node may have taken the place of attention, and return the values as they are.
            return token_map.unmerge(out)
        if out.shape[:2] != (b, n) or isinstance(method, Merge) or kept.probes is None:
            return out  # of queries that another node has merged or tiled, perhaps
        # Not what came out is compared: other nodes may have changed that on its way.
        given = take(kept.x, kept.probes)
        missed = self.ask(kept, given, kept.x) - self.ask(kept, given, kept.fewer, options)
        return add_missed(out, kept.x, kept.probes, given, missed)

    def ask(self, kept: Kept, x: Tensor, keys: Tensor, options: dict[str, Any] | None = None) -> Tensor:
        """What a block's attention makes of some of its tokens `x`, with these keys."""
        part, given = kept.site.block.attn, {}
        if options is not None and kept.bias is not None:
            self.bias.get()[:] = [kept.bias]
            given = {"transformer_options": options}
        attn = kept.site.module.get_submodule(part.path)
        out: Tensor = attn.forward(x, **{str(part.keys): keys}, **given)
        self.bias.get().clear()
        return out

    def attend(
        self, attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention in which merged keys count as often as tokens have merged into them."""
        bias = self.bias.get().pop() if self.bias.get() else None
        plain = not args and not kwargs.get("skip_reshape") and kwargs.get("mask") is None
        if bias is None or not plain or k.shape[1] != bias.shape[-1] or k.shape[0] != q.shape[0]:
            other = (attention,) if self.other is None else (self.other, attention)
            out: Tensor = other[0](*other[1:], q, k, v, heads, *args, **kwargs)
            return out
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    def image(self, n: Tensor, site: Site, options: dict[str, Any]) -> Image | None:
        """The image of the tokens `n` `[B, h * w, C]`; None if these are no image, or this step is plain."""
        shape = options.get("activations_shape")
        if shape is None:
            shape = options["original_shape"]
            shape = [*shape[:-2], *(-(-side // site.downsample) for side in shape[-2:])]
        h, w = shape[-2:]
        step = self.step_of(options)
        if not step.works or n.shape[:2] != (shape[0], h * w):
            return None
        image = step.images.get((h, w, n.device))
        if image is None:
            sigma = 0.0 if step.sigmas is None else step.sigmas.flatten()[:1]
            schedule = options.get("sample_sigmas")
            image = Image(h, w, sigma, n.device, site.downsample, tables=self.tables)
            if schedule is not None and step.sigmas is not None:
                # A tensor, so that nobody waits for the device to say which step this is.
                image.number = (schedule > sigma).sum()
            step.images[h, w, n.device] = image
        return image

    def step_of(self, options: dict[str, Any]) -> Step:
        sigmas = options.get("sigmas")
        if torch.compiler.is_compiling():
            return Step(sigmas)  # a program would take what is kept for a constant
        step = self.step
        if sigmas is None or step.sigmas is not sigmas:
            step = Step(sigmas)
            if self.sigmas is not None and sigmas is not None:
                # Waits for the device once a step, which samplers do as well.
                step.works = self.sigmas[0] >= float(sigmas.flatten()[0]) >= self.sigmas[1]
            self.step = step
        return step


def _check(method: Method, weighs: bool) -> None:
    """Raises a ValueError for what patches of self-attention cannot do."""
    if isinstance(method, MergeStage) or (isinstance(method, Merge) and method.parts != ("attn",)):
        raise ValueError(
            f"{method} is not possible here, where tomesd reaches self-attention alone: use Merge without "
            "other parts, SampleKeys or MergeKeys"
        )
    if not weighs and (isinstance(method, MergeKeys) or getattr(method, "prop_attn", False)):
        raise ValueError(
            f"{method} gives keys weights, and attention of this host takes none from patches: use "
            "SampleKeys, or Merge without prop_attn"
        )


def _sites(unet: Any) -> tuple[Site, ...]:
    """The blocks of a UNet that work on an image; others, as a video's in time, get other tokens."""
    return tuple(site for site in UNET.sites(unet) if "transformer_blocks" in site.name.split("."))


def _place(site: Site) -> Place:
    """`input_blocks.4.1.transformer_blocks.0` is known to patches as `("input", 4, 0)`."""
    part, number, *_, index = site.name.split(".")
    kind = part.removesuffix("_blocks").removesuffix("_block")
    return kind, 0 if kind == "middle" else int(number), int(index)


def _renamed(recipe: Recipe, unet: Any) -> dict[str, Method]:
    """A recipe by the names of blocks in CompVis' layout."""
    names = _names_in_diffusers(unet.num_res_blocks)
    renamed = {}
    for name, method in recipe.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        start, between, end = name.partition(".transformer_blocks.")
        renamed[names.get(start, start) + between + end] = method
    return renamed


def _names_in_diffusers(counts: list[int]) -> dict[str, str]:
    """Transformers as diffusers names them, in CompVis' layout; `counts`: residual blocks of each level."""
    names = {"mid_block.attentions.0": "middle_block.1"}
    down, up = 1, 0  # the first of the input blocks is a convolution
    for i, count in enumerate(counts):
        for j in range(count):
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{down + j}.1"
        down += count + 1
    for i, count in enumerate(reversed(counts)):
        for j in range(count + 1):
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{up + j}.1"
        up += count + 1
    return names
