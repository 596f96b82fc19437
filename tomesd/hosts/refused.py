"""Networks for pictures whose tokens cannot be merged, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import is_named

RELATIVE = "its attention has a bias for each pair of positions, and a merged token has no single position"
WINDOWED = "its attention runs in windows of the whole grid, and merged tokens fill none"
PADDED = "it packs images of different sizes under a mask of each image's patches"
JOINED = (
    "it packs images into one sequence and joins each 2 x 2 patches in the end, for which all have to be "
    "there (tome.reduce merges what comes out)"
)
REFUSED: dict[tuple[str, ...], str] = {
    ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "SwinModel", "Swinv2Model"): WINDOWED,
    ("SwinBackbone", "Swinv2Backbone", "MaskFormerSwinModel", "DonutSwinModel", "TinyVit"): WINDOWED,
    ("MaxxVit", "MaxVit", "Hiera", "HieraModel", "HieraDet", "Sam2HieraDetModel", "DaVit"): WINDOWED,
    ("VisionTransformerSAM", "SamVisionEncoder", "SamHQVisionEncoder", "ImageEncoderViT"): WINDOWED,
    ("VitDetModel", "VitDetBackbone", "GlobalContextVit", "Twins", "Nest"): WINDOWED,
    ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"): JOINED,
    ("Qwen3VLVisionModel",): JOINED,
    ("Beit", "BeitModel", "BeitBackbone", "Data2VecVisionModel"): RELATIVE,
    ("VisionTransformerRelPos",): RELATIVE,
    ("NaFlexVit", "Siglip2VisionModel", "PixtralVisionModel", "Idefics3VisionTransformer"): PADDED,
}


def why_refused(module: nn.Module) -> str | None:
    """What keeps the tokens of a network of a known class from merging, or None."""
    return next((reason for names, reason in REFUSED.items() if is_named(module, names)), None)


def why_unfit(module: nn.Module) -> str:
    """What to say of a network of no known class, where its package tells of stages in it."""
    staged = next((name for name, part in module.named_modules() if _has_stages(part)), None)
    if staged is None:
        return ""
    return (
        f": the image of {staged or 'this one'} shrinks from stage to stage, for which all tokens have to be "
        "there, and merging is for blocks that all work on one grid"
    )


def _has_stages(module: nn.Module) -> bool:
    """Whether a network of timm or transformers says that its image shrinks on the way."""
    shown: Any = getattr(module, "feature_info", None)
    if isinstance(shown, list):
        return len({stage.get("reduction") for stage in shown if isinstance(stage, dict)}) > 1
    depths: Any = getattr(getattr(module, "config", None), "depths", None)
    return isinstance(depths, list | tuple) and len(depths) > 1
