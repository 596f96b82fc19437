"""One row of data for each family of vision transformers: where its blocks and their parts are."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from .family import Block, Part
from .vision import VisionFamily


def _class_and_registers(network: Any) -> int:
    return 1 + getattr(network.config, "num_register_tokens", 0)


def _class_and_storage(network: Any) -> int:
    return 1 + getattr(network, "n_storage_tokens", getattr(network, "num_register_tokens", 0))


TIMM = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask")
EVA = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask", rope="rope")
TIMM_BLOCK = Block("norm1", TIMM, middle="norm2", end="drop_path2", or_end=("ls2", "mlp"), tokens="x")
TIMM_ROPE = replace(TIMM_BLOCK, attn=EVA)
TIMM_POST = Block("attn", TIMM, middle="mlp", end="drop_path2", or_end=("norm2",), tokens="x")
# One norm for attention and mlp, which run beside each other, or several of each do.
TIMM_AT_ONCE = Block("", Part("", tokens="x", bias="attn_mask"), middle="", end="", tokens="x")
MULTIHEAD = Part("self_attention", tokens="query", bias="key_padding_mask")
ATTENTION = Part("attention", key_layer="k_proj", bias="attention_mask")
WITH_ROPE = Part("attention", key_layer="k_proj", bias="attention_mask", rope="position_embeddings")
CLIP_ATTENTION = Part("self_attn", key_layer="k_proj", bias="attention_mask")
VIT = Block("layernorm_before", ATTENTION, middle="layernorm_after", end="dropout", or_end=("mlp",))
DINO = Block("norm1", ATTENTION, middle="norm2", end="drop_path", or_end=("layer_scale2", "mlp"))
DINOV3 = Block("norm1", WITH_ROPE, middle="norm2", end="drop_path", or_end=("layer_scale2", "mlp"))
OF_TIMM = attrgetter("num_prefix_tokens")
CLIP = Block("layer_norm1", CLIP_ATTENTION, middle="layer_norm2", end="mlp")
# No attention mask: merged tokens cannot be weighed.
BLIP = Block("layer_norm1", Part("self_attn"), middle="layer_norm2", end="mlp")
PIXIO = replace(VIT, end="drop_path")
AIM = Block("rms_norm1", ATTENTION, middle="rms_norm2", end="ffn")
VIT_POSE = Block("layernorm_before", Part("attention.attention"), middle="layernorm_after", end="mlp")
INTERNVL = Part("attention", key_layer="k_norm", bias="attention_mask")
# Their `output` adds to what it makes.
VIDEO_MAE = Block(
    "layernorm_before", Part("attention.attention"), middle="layernorm_after", end="output.dropout"
)
DINO_HUB = Block("norm1", Part("attn", tokens="x"), middle="norm2", end="ls2", or_end=("mlp",), tokens="x")
DINOV3_HUB = Block(
    "norm1", Part("attn", tokens="x", rope="rope"), middle="norm2", end="ls2", tokens="x_or_x_list"
)
OPEN_CLIP = Block(
    "ln_1",
    Part("attn", tokens="query", bias="key_padding_mask"),
    middle="ln_2",
    end="mlp",
    tokens="q_x",
)
OPEN_CLIP_CUSTOM = Block(
    "ln_1", Part("attn", tokens="x", bias="attn_mask"), middle="ln_2", end="mlp", tokens="x"
)

FAMILIES = [
    VisionFamily(
        "timm VisionTransformer",
        ("VisionTransformer",),
        {
            "Block": TIMM_BLOCK,
            # Here the norms come after attention and mlp.
            "ResPostBlock": TIMM_POST,
            "ParallelScalingBlock": TIMM_AT_ONCE,
            "DiffParallelScalingBlock": TIMM_AT_ONCE,
            "ParallelThingsBlock": TIMM_AT_ONCE,
        },
        package="timm",
        since="1.0.16",
        path="blocks",
        prefix=OF_TIMM,
        distilled=lambda network: getattr(network, "dist_token", None) is not None,
    ),
    VisionFamily(
        "timm Eva (EVA02, DINOv3), Qwen3 and DeepSeek",
        ("Eva", "Qwen3VitEncoder", "DeepseekVitEncoder"),
        {
            "EvaBlock": TIMM_ROPE,
            "EvaBlockPostNorm": replace(TIMM_POST, attn=EVA),
            "DeepseekVitBlock": TIMM_ROPE,
        },
        package="timm",
        since="1.0.16",
        path="blocks",
        prefix=OF_TIMM,
    ),
    VisionFamily(
        "timm CaiT",
        ("Cait",),  # its class token comes after these blocks
        {"LayerScaleBlock": Block("norm1", Part("attn", tokens="x"), middle="norm2", end="mlp", tokens="x")},
        package="timm",
        path="blocks",
        prefix=lambda network: 0,
        prop_attn=False,
    ),
    VisionFamily(
        "torchvision or SWAG VisionTransformer",
        ("VisionTransformer",),
        {"EncoderBlock": Block("ln_1", MULTIHEAD, middle="ln_2", end="mlp", tokens="input")},
        package="swag",
        # SWAG's may pool all tokens instead of having a class token; torchvision's always has one.
        prefix=lambda network: int(getattr(network, "classifier", "token") == "token"),
    ),
    VisionFamily("transformers ViT", ("ViTModel",), {"ViTLayer": VIT}, path="layers", since="5.9"),
    VisionFamily(
        "transformers Qianfan-OCR vision",
        ("QianfanOCRVisionModel",),
        {"QianfanOCRVisionLayer": replace(VIT, attn=INTERNVL)},
        path="layers",
    ),
    VisionFamily(
        "transformers DeiT",
        ("DeiTModel", "ASTModel"),
        {"DeiTLayer": VIT, "ASTLayer": VIT},
        path="layers",
        prefix=lambda network: 2,
        distilled=lambda network: True,
        since="5.9",
    ),
    VisionFamily(
        "transformers ViTMAE",
        ("ViTMAEModel",),
        {"ViTMAELayer": VIT},
        path="layers",
        prop_attn=False,
        since="5.9",
    ),
    VisionFamily(
        "transformers DINOv2",
        (
            *("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
            *("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
        ),
        {"Dinov2Layer": DINO, "Dinov2WithRegistersLayer": DINO, "Tipsv2VisionLayer": DINO},
        path="encoder.layer",
        prefix=_class_and_registers,
        since="5.18",
    ),
    VisionFamily(
        "transformers DINOv3",
        ("DINOv3ViTModel", "DINOv3ViTBackbone", "Sapiens2Model", "Sapiens2Backbone"),
        {"DINOv3ViTLayer": DINOV3, "Sapiens2Layer": DINOV3},
        path="model.layer",
        prefix=_class_and_registers,
        since="5.4",
    ),
    VisionFamily(
        "transformers CLIP vision",
        # The second one held the layers up to transformers 5.5.
        ("CLIPVisionModel", "CLIPVisionTransformer"),
        {"CLIPEncoderLayer": CLIP},
    ),
    VisionFamily(
        "transformers SigLIP vision",
        ("SiglipVisionModel", "SiglipVisionTransformer"),
        {"SiglipEncoderLayer": CLIP},
        prefix=lambda network: 0,
    ),
    VisionFamily(
        "transformers MetaCLIP 2 vision",
        ("MetaClip2VisionModel", "MetaClip2VisionTransformer"),
        {"MetaClip2EncoderLayer": CLIP},
    ),
    VisionFamily(
        "transformers vision as CLIP's",
        (
            *("AltCLIPVisionModel", "ChineseCLIPVisionModel", "CLIPSegVisionModel", "GitVisionTransformer"),
            *("Kosmos2VisionTransformer", "Owlv2VisionTransformer", "OwlViTVisionTransformer"),
            "UnlimitedOcrVisionEncoder",
        ),
        {
            "AltCLIPEncoderLayer": CLIP,
            "ChineseCLIPVisionLayer": CLIP,
            "CLIPSegEncoderLayer": CLIP,
            "GitVisionEncoderLayer": CLIP,
            "Kosmos2VisionEncoderLayer": CLIP,
            "Owlv2EncoderLayer": CLIP,
            "OwlViTEncoderLayer": CLIP,
            "UnlimitedOcrEncoderLayer": CLIP,
        },
    ),
    VisionFamily(
        "transformers vision as SigLIP's",
        (
            *("Idefics2VisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer"),
            *("JanusVisionModel", "Aimv2VisionModel", "Ovis2VisionTransformer", "GraniteDoclingVisionModel"),
        ),
        {
            "Idefics2EncoderLayer": CLIP,  # padded pictures are refused when it runs, by their mask
            "Idefics3EncoderLayer": CLIP,
            "SmolVLMEncoderLayer": CLIP,
            "JanusVisionEncoderLayer": CLIP,
            "GraniteDoclingEncoderLayer": CLIP,
            "Aimv2EncoderLayer": AIM,
            "Ovis2VisionEncoderLayer": AIM,
        },
        prefix=lambda network: 0,
    ),
    VisionFamily(
        "transformers Molmo 2 vision",
        ("Molmo2VisionModel",),
        {"Molmo2VisionEncoderLayer": CLIP},
        path="layers",
        prefix=lambda network: 0,
    ),
    VisionFamily(
        "transformers BridgeTower vision",
        ("BridgeTowerVisionTransformer",),
        {"BridgeTowerResidualAttention": replace(OPEN_CLIP, end="mlp.c_proj", tokens="hidden_state")},
        path="transformer.resblocks",
    ),
    VisionFamily(
        "transformers FLAVA vision",
        ("FlavaImageModel",),
        {"FlavaLayer": replace(VIDEO_MAE, attn=Part("attention.attention", bias="attention_mask"))},
        path="encoder.layer",
    ),
    VisionFamily(
        "transformers MGP-STR",
        ("MgpstrModel",),
        {"MgpstrLayer": Block("norm1", Part("attn"), middle="norm2", end="mlp")},
        path="encoder.blocks",
        prop_attn=False,
    ),
    VisionFamily(  # its spatial half, in which each frame is a sample
        "transformers VideoPrism",
        ("VideoPrismVisionModel",),
        {"VideoPrismLayer": VIT},
        path="spatial_layers",
        prefix=lambda network: 0,
    ),
    VisionFamily("transformers ViT-MSN", ("ViTMSNModel",), {"ViTMSNLayer": VIT}, path="layers", since="5.9"),
    VisionFamily(
        "transformers I-JEPA",
        ("IJepaModel",),
        {"IJepaLayer": VIT},
        path="layers",
        prefix=lambda network: 0,
        since="5.9",
    ),
    VisionFamily("transformers ViViT", ("VivitModel",), {"VivitLayer": VIT}, path="layers", since="5.9"),
    VisionFamily(
        "transformers VideoMAE",
        ("VideoMAEModel",),
        {"VideoMAELayer": VIDEO_MAE},
        path="encoder.layer",
        prefix=lambda network: 0,
        prop_attn=False,
    ),
    VisionFamily(
        "transformers RADIO",
        ("RadioModel",),
        {"RadioLayer": DINO},
        path="encoder.layer",
        prefix=lambda network: int(network.config.num_summary_tokens),
    ),
    VisionFamily(
        "transformers Pixio",
        ("PixioModel",),
        {"PixioLayer": PIXIO},
        path="layers",
        prefix=lambda network: int(network.config.n_cls_tokens),
    ),
    VisionFamily(
        "transformers DPT",
        ("DPTModel",),
        {"DPTViTLayer": VIDEO_MAE},
        path="encoder.layer",
        prop_attn=False,
    ),
    VisionFamily(
        "transformers ViTPose",
        ("VitPoseBackbone",),
        {"VitPoseBackboneLayer": VIT_POSE},
        path="encoder.layer",
        prefix=lambda network: 0,
        prop_attn=False,
    ),
    VisionFamily(
        "transformers YOLOS",
        ("YolosModel",),
        {"YolosLayer": VIDEO_MAE},
        path="encoder.layer",
        suffix=lambda network: int(network.config.num_detection_tokens),
        prop_attn=False,
    ),
    VisionFamily(
        "transformers BLIP vision",
        ("BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel", "InstructBlipVideoVisionModel"),
        {
            "BlipEncoderLayer": BLIP,
            "Blip2EncoderLayer": BLIP,
            "InstructBlipEncoderLayer": BLIP,
            "InstructBlipVideoEncoderLayer": BLIP,
        },
        prop_attn=False,
    ),
    VisionFamily(
        "transformers InternVL vision",
        ("InternVLVisionModel",),
        {"InternVLVisionLayer": replace(VIT, attn=INTERNVL)},
        path="encoder.layer",
    ),
    VisionFamily(
        "open_clip or OpenAI CLIP vision",
        ("VisionTransformer",),
        {"ResidualAttentionBlock": OPEN_CLIP, "CustomResidualAttentionBlock": OPEN_CLIP_CUSTOM},
        package="open_clip",
        path="transformer.resblocks",
    ),
    VisionFamily(
        "DINOv2 or DINOv3 of torch.hub",
        ("DinoVisionTransformer",),
        {"Block": DINO_HUB, "SelfAttentionBlock": DINOV3_HUB},
        package="dinov2",
        path="blocks",
        prefix=_class_and_storage,
        prop_attn=False,
    ),
]
