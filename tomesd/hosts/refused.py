"""Networks for pictures whose tokens cannot be merged, and why."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
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
TABLE = "its rotary embeddings are one table for all images, and each image keeps other tokens"
PLACED = "its attention takes the place of a token in the sequence for its position in the image"
REGROUPED = "its blocks regroup tokens by frame and place, for which all have to be there"
JOINED_BETWEEN = "other tokens join those of the image from block to block"
GROUPED = "its stages group the tokens themselves"
READS = "its blocks see the tokens of a text and those of the image at once"
CHANNELS = "its attention is among channels, and convolutions between need the whole grid"
MIXED = "its layers mix places by a table of weights, which has one for each"
NESTED = "its blocks see the pixels of each patch beside the patches"
ADDED = "it adds embeddings of all positions to the tokens between blocks"
CONVOLVED = "it is made of convolutions, and has none"
REFUSED: dict[tuple[str, ...], str] = {
    ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "SwinModel", "Swinv2Model"): WINDOWED,
    ("SwinBackbone", "Swinv2Backbone", "MaskFormerSwinModel", "DonutSwinModel", "TinyVit"): WINDOWED,
    ("MaxxVit", "MaxVit", "Hiera", "HieraModel", "HieraDet", "Sam2HieraDetModel", "DaVit"): WINDOWED,
    ("VisionTransformerSAM", "SamVisionEncoder", "SamHQVisionEncoder", "ImageEncoderViT"): WINDOWED,
    ("VitDetModel", "VitDetBackbone", "GlobalContextVit", "Twins", "Nest"): WINDOWED,
    ("Florence2VisionBackbone", "GotOcr2VisionEncoder", "LwDetrViTBackbone", "Sam3ViTModel"): WINDOWED,
    ("DeepseekOcr2SamVisionEncoder", "SLANeXtVisionEncoder", "RfDetrDinov2Backbone"): WINDOWED,
    ("UnlimitedOcrSamVisionEncoder", "PPFormulaNetVisionModel"): WINDOWED,
    ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"): JOINED,
    ("Qwen3VLVisionModel", "MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel"): JOINED,
    ("MiniCPMOcrVisionModel",): JOINED,
    ("Beit", "BeitModel", "BeitBackbone", "Data2VecVisionModel"): RELATIVE,
    ("VisionTransformerRelPos", "SegGptModel", "ConVit", "LayoutLMv3Model"): RELATIVE,
    ("NaFlexVit", "Siglip2VisionModel", "PixtralVisionModel", "Phi4MultimodalVisionModel"): PADDED,
    ("MllamaVisionModel", "Kosmos2_5VisionModel", "Pix2StructVisionModel"): PADDED,
    ("Gemma4VisionModel", "Gemma4VitEncoder"): PADDED,
    ("MLCDVisionModel", "Llama4VisionModel", "Step3p7VisionModel"): TABLE,
    ("VJEPA2Model",): PLACED,
    ("TimesformerModel",): REGROUPED,
    ("XCLIPVisionModel", "EomtForUniversalSegmentation"): JOINED_BETWEEN,
    ("EomtDinov3ForUniversalSegmentation", "VideomtForUniversalSegmentation"): JOINED_BETWEEN,
    ("ViltModel", "VisualBertModel", "FuyuModel", "UdopStack"): READS,
    ("InterpolateMidPositionEmbeddings",): ADDED,
    ("Xcit",): CHANNELS,
    ("MlpMixer",): MIXED,
    ("TNT",): NESTED,
    ("GroupViTVisionModel",): GROUPED,
    ("AlignVisionModel",): CONVOLVED,
}

# Blocks of UNets whose attention stands between convolutions.
GIVEN_IMAGES = (
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnUpBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
    "KAttentionBlock",
)


def why_refused(module: nn.Module) -> str | None:
    """What keeps the tokens of a network of a known class from merging, or None."""
    return next((reason for names, reason in REFUSED.items() if is_named(module, names)), None)


def why_unfit(module: nn.Module) -> str:
    """What to say of a network of no known class, where a module in it tells what it is."""
    for name, part in module.named_modules():
        if _has_stages(part):
            return (
                f": the image of {name or 'this one'} shrinks from stage to stage, for which all tokens have "
                "to be there, and merging is for blocks that all work on one grid"
            )
        if "grid_thw" in inspect.signature(type(part).forward).parameters:  # sizes of what is packed
            return f": {JOINED}"
    return ""


def why_bare(networks: Iterable[nn.Module]) -> str:
    """What to say of networks that draw and have no transformer blocks, where a module in one tells why."""
    if not any(is_named(part, GIVEN_IMAGES) for network in networks for part in network.modules()):
        return ""
    return (
        ": attention is given an image between convolutions there, not the tokens of a transformer (as in "
        "Kandinsky 2, DeepFloyd IF, unCLIP and the latent upscaler)"
    )


def _has_stages(module: nn.Module) -> bool:
    """Whether a network of timm or transformers says that its image shrinks on the way."""
    shown: Any = getattr(module, "feature_info", None)
    if isinstance(shown, list):
        return len({stage.get("reduction") for stage in shown if isinstance(stage, dict)}) > 1
    depths: Any = getattr(getattr(module, "config", None), "depths", None)
    return isinstance(depths, list | tuple) and len(depths) > 1
