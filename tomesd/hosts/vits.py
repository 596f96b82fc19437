"""One row of data for each family of vision transformers: where its blocks and their parts are.

Classes are recognised by name along the MRO, so nothing third-party is imported to know a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .family import Block, Family, Network, Part, Site, find, is_named, known, submodule


@dataclass(frozen=True)
class VisionFamily(Family):
    """A family of networks whose blocks are `x = x + attn(norm1(x)); x = x + mlp(norm2(x))`.

    Args:
        package: the function of `tomesd.vit.patch` that patches it.
        path: the list of its blocks.
        prefix: how many tokens before the patches (class, distillation, registers) never merge.
        prop_attn: whether attention counts a merged token as many times as it has tokens, by default.
    """

    package: str = "transformers"
    path: str = "encoder.layers"
    prefix: Callable[[Any], int] = lambda network: 1
    prop_attn: bool = True

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and submodule(module, self.path) is not None

    def sites(self, network: nn.Module) -> Iterator[Site]:
        container = network.get_submodule(self.path)
        for child, module in container.named_children():
            block = self.block(module)
            name = f"{self.path}.{child}"
            if block is None:
                raise ValueError(
                    f"{name} of {type(network).__name__} is a {type(module).__name__}; of {self.name} tomesd "
                    f"knows {', '.join(self.blocks)}"
                )
            attn = block.attn
            keys = () if attn.key_layer is None else (f"{attn.path}.{attn.key_layer}",)
            for part in (block.input, attn.path, block.middle, block.end, *keys):
                if part is not None and submodule(module, part) is None:
                    raise ValueError(
                        f"{name} of {type(network).__name__} has no {part}, at which tomesd merges the "
                        f"tokens of {self.name}"
                    )
            yield Site(name, module, block, container)


def _class_and_registers(network: Any) -> int:
    return 1 + getattr(network.config, "num_register_tokens", 0)


def _timm(network: Any) -> int:
    return int(network.num_prefix_tokens)


TIMM_ATTN = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask")
EVA_ATTN = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask", rope="rope")
HF_ATTN = Part("attention", key_layer="k_proj", bias="attention_mask")
ROPE_ATTN = Part("attention", key_layer="k_proj", bias="attention_mask", rope="position_embeddings")
CLIP_ATTN = Part("self_attn", key_layer="k_proj", bias="attention_mask")

VIT_LAYER = Block("layernorm_before", HF_ATTN, middle="layernorm_after", end="dropout")
DINO_LAYER = Block("norm1", HF_ATTN, middle="norm2", end="drop_path")
DINOV3_LAYER = Block("norm1", ROPE_ATTN, middle="norm2", end="drop_path")
CLIP_LAYER = Block("layer_norm1", CLIP_ATTN, middle="layer_norm2", end="mlp")

FAMILIES = (
    VisionFamily(
        name="timm VisionTransformer",
        package="timm",
        networks=("VisionTransformer",),
        path="blocks",
        blocks={
            "Block": Block("norm1", TIMM_ATTN, middle="norm2", end="drop_path2", tokens="x"),
            # Here the norms come after attention and mlp.
            "ResPostBlock": Block("attn", TIMM_ATTN, middle="mlp", end="drop_path2", tokens="x"),
        },
        prefix=_timm,
    ),
    VisionFamily(
        name="timm Eva (EVA02, DINOv3)",
        package="timm",
        networks=("Eva",),
        path="blocks",
        blocks={
            "EvaBlock": Block("norm1", EVA_ATTN, middle="norm2", end="drop_path2", tokens="x"),
            "EvaBlockPostNorm": Block("attn", EVA_ATTN, middle="mlp", end="drop_path2", tokens="x"),
        },
        prefix=_timm,
    ),
    VisionFamily(
        name="torchvision or SWAG VisionTransformer",
        package="swag",
        networks=("VisionTransformer",),
        path="encoder.layers",
        blocks={
            "EncoderBlock": Block(
                "ln_1",
                Part("self_attention", tokens="query", bias="key_padding_mask"),
                middle="ln_2",
                end="mlp",
                tokens="input",
            )
        },
        # SWAG's may pool all tokens instead of having a class token; torchvision's always has one.
        prefix=lambda network: int(getattr(network, "classifier", "token") == "token"),
    ),
    VisionFamily(
        name="transformers ViT",
        package="transformers",
        networks=("ViTModel",),
        path="layers",
        blocks={"ViTLayer": VIT_LAYER},
        prefix=lambda network: 1,
    ),
    VisionFamily(
        name="transformers DeiT",
        package="transformers",
        networks=("DeiTModel",),
        path="layers",
        blocks={"DeiTLayer": VIT_LAYER},
        prefix=lambda network: 2,
    ),
    VisionFamily(
        name="transformers ViTMAE",
        package="transformers",
        networks=("ViTMAEModel",),
        path="layers",
        blocks={"ViTMAELayer": VIT_LAYER},
        prefix=lambda network: 1,
        prop_attn=False,
    ),
    VisionFamily(
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
    VisionFamily(
        name="transformers DINOv3",
        package="transformers",
        networks=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        path="model.layer",
        blocks={"DINOv3ViTLayer": DINOV3_LAYER},
        prefix=_class_and_registers,
    ),
    VisionFamily(
        name="transformers CLIP vision",
        package="transformers",
        networks=("CLIPVisionModel",),
        path="encoder.layers",
        blocks={"CLIPEncoderLayer": CLIP_LAYER},
        prefix=lambda network: 1,
    ),
    VisionFamily(
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


def find_networks(model: object, package: str | None = None) -> list[Network[VisionFamily]]:
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
    for module in model.modules():
        for names, reason in REFUSED.items():
            if is_named(module, names):
                raise ValueError(f"the tokens of {type(module).__name__} cannot be merged: {reason}")
    rows: Sequence[VisionFamily] = [row for row in FAMILIES if package in (None, row.package)]
    found = find(model, rows)
    if not found:
        of = f" of {package}" if package else ""
        raise ValueError(
            f"{type(model).__name__} holds no vision transformer{of} that tomesd knows. Known are "
            f"{known(rows)}; for Stable Diffusion there is tomesd.apply_patch"
        )
    for network in found:
        if not network.sites:
            raise ValueError(f"{network} has no blocks in {network.family.path}")
    return found
