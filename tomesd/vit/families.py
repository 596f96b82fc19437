"""One row of data for each family of vision transformers: where its blocks and their parts are.

Classes are recognised by name along the MRO, so nothing third-party is imported to know a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..hooks import is_named


@dataclass(frozen=True)
class Parts:
    """The parts of a block `x = x + attn(norm1(x)); x = x + mlp(norm2(x))` at which tokens are merged.

    Args:
        first: the part that is given the block's tokens.
        attn: the self-attention.
        keys: the part of it whose output is the keys, `[B, heads, N, D]` or `[B, N, heads * D]`; None for
            `nn.MultiheadAttention`, which has no such part.
        bias: the parameter of its forward that is added to the logits of each key.
        enter: the part that is given the residual stream after attention, where tokens merge.
        leave: the last part that sees what the second half adds to that stream; the first may share it.
        rope: the parameter of the attention's forward, if any, that holds rotary embeddings of the patches.
    """

    first: str
    attn: str
    keys: str | None
    bias: str
    enter: str
    leave: str
    rope: str | None = None


@dataclass(frozen=True)
class Family:
    """Where a family of vision transformers keeps its blocks.

    Args:
        name: what people call it.
        package: the function of `tomesd.vit.patch` that patches it.
        networks: classes of the network.
        path: the list of its blocks.
        blocks: classes of a block, and the parts of each.
        prefix: how many tokens before the patches (class, distillation, registers) never merge.
        prop_attn: whether attention counts a merged token as many times as it has tokens, by default.
    """

    name: str
    package: str
    networks: tuple[str, ...]
    path: str
    blocks: dict[str, Parts]
    prefix: Callable[[Any], int]
    prop_attn: bool = True


def _class_and_registers(network: Any) -> int:
    return 1 + getattr(network.config, "num_register_tokens", 0)


TIMM_EVA = Parts("norm1", "attn", "k_norm", "attn_mask", enter="norm2", leave="drop_path2", rope="rope")
VIT_LAYER = Parts(
    "layernorm_before", "attention", "k_proj", "attention_mask", enter="layernorm_after", leave="dropout"
)
DINO_LAYER = Parts("norm1", "attention", "k_proj", "attention_mask", enter="norm2", leave="drop_path")
DINOV3_LAYER = Parts(
    "norm1",
    "attention",
    "k_proj",
    "attention_mask",
    enter="norm2",
    leave="drop_path",
    rope="position_embeddings",
)
CLIP_LAYER = Parts("layer_norm1", "self_attn", "k_proj", "attention_mask", enter="layer_norm2", leave="mlp")

FAMILIES = (
    Family(
        name="timm VisionTransformer",
        package="timm",
        networks=("VisionTransformer",),
        path="blocks",
        blocks={
            "Block": Parts("norm1", "attn", "k_norm", "attn_mask", enter="norm2", leave="drop_path2"),
            # Here the norms come after attention and mlp.
            "ResPostBlock": Parts("attn", "attn", "k_norm", "attn_mask", enter="mlp", leave="drop_path2"),
        },
        prefix=lambda network: network.num_prefix_tokens,
    ),
    Family(
        name="timm Eva (EVA02, DINOv3)",
        package="timm",
        networks=("Eva",),
        path="blocks",
        blocks={
            "EvaBlock": TIMM_EVA,
            "EvaBlockPostNorm": Parts(
                "attn", "attn", "k_norm", "attn_mask", enter="mlp", leave="drop_path2", rope="rope"
            ),
        },
        prefix=lambda network: network.num_prefix_tokens,
    ),
    Family(
        name="torchvision or SWAG VisionTransformer",
        package="swag",
        networks=("VisionTransformer",),
        path="encoder.layers",
        blocks={
            "EncoderBlock": Parts(
                "ln_1", "self_attention", None, "key_padding_mask", enter="ln_2", leave="mlp"
            )
        },
        # SWAG's may pool all tokens instead of having a class token; torchvision's always has one.
        prefix=lambda network: int(getattr(network, "classifier", "token") == "token"),
    ),
    Family(
        name="transformers ViT",
        package="transformers",
        networks=("ViTModel",),
        path="layers",
        blocks={"ViTLayer": VIT_LAYER},
        prefix=lambda network: 1,
    ),
    Family(
        name="transformers DeiT",
        package="transformers",
        networks=("DeiTModel",),
        path="layers",
        blocks={"DeiTLayer": VIT_LAYER},
        prefix=lambda network: 2,
    ),
    Family(
        name="transformers ViTMAE",
        package="transformers",
        networks=("ViTMAEModel",),
        path="layers",
        blocks={"ViTMAELayer": VIT_LAYER},
        prefix=lambda network: 1,
        prop_attn=False,
    ),
    Family(
        name="transformers DINOv2",
        package="transformers",
        networks=(
            "Dinov2Model",
            "Dinov2Backbone",
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersBackbone",
        ),
        path="encoder.layer",
        blocks={"Dinov2Layer": DINO_LAYER, "Dinov2WithRegistersLayer": DINO_LAYER},
        prefix=_class_and_registers,
    ),
    Family(
        name="transformers DINOv3",
        package="transformers",
        networks=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        path="model.layer",
        blocks={"DINOv3ViTLayer": DINOV3_LAYER},
        prefix=_class_and_registers,
    ),
    Family(
        name="transformers CLIP vision",
        package="transformers",
        networks=("CLIPVisionModel",),
        path="encoder.layers",
        blocks={"CLIPEncoderLayer": CLIP_LAYER},
        prefix=lambda network: 1,
    ),
    Family(
        name="transformers SigLIP vision",
        package="transformers",
        networks=("SiglipVisionModel",),
        path="encoder.layers",
        blocks={"SiglipEncoderLayer": CLIP_LAYER},
        prefix=lambda network: 0,
    ),
)

RELATIVE = "its attention has a bias for each pair of positions, and a merged token has no single position"
WINDOWED = "its attention runs in windows of the whole grid, and merged tokens fill none"
PADDED = "it packs images of different sizes under a mask of each image's patches"
REFUSED: dict[tuple[str, ...], str] = {
    ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "SwinModel", "Swinv2Model"): WINDOWED,
    ("SwinBackbone", "Swinv2Backbone", "MaxxVit", "Hiera", "HieraModel"): WINDOWED,
    ("VisionTransformerSAM", "SamVisionEncoder"): WINDOWED,
    ("Beit", "BeitModel", "BeitBackbone", "Data2VecVisionModel"): RELATIVE,
    ("VisionTransformerRelPos",): RELATIVE,
    ("NaFlexVit", "Siglip2VisionModel"): PADDED,
}


@dataclass(frozen=True)
class Network:
    """A vision transformer found in a model: its path there, its row, its blocks and the parts of each."""

    name: str
    module: nn.Module
    family: Family
    container: nn.Module
    blocks: tuple[tuple[str, nn.Module, Parts], ...]


def find_networks(model: object, package: str | None = None) -> list[Network]:
    """Every vision transformer of a known family in a module.

    Args:
        package: take only families of this function of `tomesd.vit.patch`.

    Raises:
        TypeError: the model is no module.
        ValueError: it holds no vision transformer of a known family, or one that cannot be merged.
    """
    if not isinstance(model, nn.Module):
        kind = (
            f"the class {model.__name__}: make one first" if isinstance(model, type) else type(model).__name__
        )
        raise TypeError(f"expected a torch module, got {kind} (for pipelines there is tomesd.apply_patch)")
    found = []
    for name, module in model.named_modules():
        for names, reason in REFUSED.items():
            if is_named(module, names):
                raise ValueError(f"the tokens of {type(module).__name__} cannot be merged: {reason}")
        family = next((row for row in FAMILIES if _fits(module, row)), None)
        if family is not None and package in (None, family.package):
            found.append(_network(name, module, family))
    if not found:
        rows = [row for row in FAMILIES if package in (None, row.package)]
        known = "; ".join(f"{row.name} ({', '.join(row.networks)})" for row in rows)
        of = f" of {package}" if package else ""
        raise ValueError(
            f"{type(model).__name__} holds no vision transformer{of} that tomesd knows. Known are {known}; "
            "for Stable Diffusion there is tomesd.apply_patch"
        )
    return found


def _fits(module: nn.Module, family: Family) -> bool:
    return is_named(module, family.networks) and _submodule(module, family.path) is not None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _network(name: str, module: nn.Module, family: Family) -> Network:
    blocks = []
    container = module.get_submodule(family.path)
    for child, block in container.named_children():
        path = f"{name}.{family.path}.{child}".lstrip(".")
        parts = next((parts for kind, parts in family.blocks.items() if is_named(block, (kind,))), None)
        if parts is None:
            raise ValueError(
                f"{path} is a {type(block).__name__}; of {family.name} tomesd knows "
                f"{', '.join(family.blocks)}"
            )
        keys = () if parts.keys is None else (f"{parts.attn}.{parts.keys}",)
        for part in (parts.first, parts.attn, parts.enter, parts.leave, *keys):
            if _submodule(block, part) is None:
                raise ValueError(f"{path} has no {part}, at which tomesd merges the tokens of {family.name}")
        blocks.append((path, block, parts))
    if not blocks:
        raise ValueError(f"{name or type(module).__name__} has no blocks in {family.path}")
    return Network(name, module, family, container, tuple(blocks))
