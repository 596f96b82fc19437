"""One row of data for each family of vision transformers: where its blocks and their parts are."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import nn

from .family import Block, Network, Part, find, known
from .refused import why_refused, why_unfit
from .vision import VisionFamily


def _class_and_registers(network: Any) -> int:
    return 1 + getattr(network.config, "num_register_tokens", 0)


def _class_and_storage(network: Any) -> int:
    return 1 + getattr(network, "n_storage_tokens", getattr(network, "num_register_tokens", 0))


TIMM = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask")
EVA = Part("attn", tokens="x", key_layer="k_norm", bias="attn_mask", rope="rope")
TIMM_BLOCK = Block("norm1", TIMM, middle="norm2", end="drop_path2", or_end=("ls2", "mlp"), tokens="x")
TIMM_POST = Block("attn", TIMM, middle="mlp", end="drop_path2", or_end=("norm2",), tokens="x")
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
VIT_POSE = Block("layernorm_before", Part("attention"), middle="layernorm_after", end="mlp")
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
            # One norm for attention and mlp, which run beside each other.
            "ParallelScalingBlock": Block(
                "", Part("", tokens="x", bias="attn_mask"), middle="", end="", tokens="x"
            ),
        },
        package="timm",
        since="1.0.16",
        path="blocks",
        prefix=OF_TIMM,
        distilled=lambda network: getattr(network, "dist_token", None) is not None,
    ),
    VisionFamily(
        "timm Eva (EVA02, DINOv3)",
        ("Eva",),
        {"EvaBlock": replace(TIMM_BLOCK, attn=EVA), "EvaBlockPostNorm": replace(TIMM_POST, attn=EVA)},
        package="timm",
        since="1.0.16",
        path="blocks",
        prefix=OF_TIMM,
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
        ),
        {
            "AltCLIPEncoderLayer": CLIP,
            "ChineseCLIPVisionLayer": CLIP,
            "CLIPSegEncoderLayer": CLIP,
            "GitVisionEncoderLayer": CLIP,
            "Kosmos2VisionEncoderLayer": CLIP,
            "Owlv2EncoderLayer": CLIP,
            "OwlViTEncoderLayer": CLIP,
        },
    ),
    VisionFamily(
        "transformers vision as SigLIP's",
        (
            *("Idefics2VisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer"),
            *("JanusVisionModel", "Aimv2VisionModel", "Ovis2VisionTransformer"),
        ),
        {
            "Idefics2EncoderLayer": CLIP,  # padded pictures are refused when it runs, by their mask
            "Idefics3EncoderLayer": CLIP,
            "SmolVLMEncoderLayer": CLIP,
            "JanusVisionEncoderLayer": CLIP,
            "Aimv2EncoderLayer": AIM,
            "Ovis2VisionEncoderLayer": AIM,
        },
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


def register(family: VisionFamily) -> VisionFamily:
    """Makes a family of vision transformers known to `apply_patch`, before those that are known already.

        tome.register(
            tome.VisionFamily(
                "Acme ViT",
                ("AcmeViT",),  # classes of the network, by name; subclasses count
                {
                    "AcmeLayer": tome.Block(  # x = x + attention(norm(x)); x = x + feed(norm_2(x))
                        "norm",
                        tome.Part("attention", tokens="x", bias="bias"),
                        middle="norm_2",  # is given the tokens after attention: here they merge
                        end="feed",  # the last module that sees what the second half adds
                        tokens="x",
                    )
                },
                path="layers",  # the list of its blocks
                prefix=lambda network: 1,  # how many tokens before the patches never merge
            )
        )

    A bias of keys is given as `[B, 1, 1, N]`; leave it out, with `prop_attn=False`, where attention takes
    none. What a row says of modules is checked when a model is patched: an error then names what is missing.

    Returns:
        The same family.

    Raises:
        TypeError: it is no VisionFamily, or a field is of the wrong type.
        ValueError: its name or the list of its classes is empty, a block lacks a part, or another family has
            its name.
    """
    if not isinstance(family, VisionFamily):
        raise TypeError(f"expected a VisionFamily, got {type(family).__name__}")
    if not (family.name and family.path and family.networks and family.blocks):
        raise ValueError(f"a family needs a name, networks, blocks and a path, got {family}")
    if any(row.name == family.name for row in FAMILIES):
        raise ValueError(f"there is a family {family.name!r} already")
    FAMILIES.insert(0, family)
    return family


def find_networks(model: object, package: str | None = None) -> list[Network[VisionFamily]]:
    """Every vision transformer of a known family in a module.

    Args:
        package: take only families of this function of `tomesd.vit.patch`.

    Raises:
        TypeError: the model is no module.
        ValueError: it holds no vision transformer of a known family, or one that cannot be merged.
    """
    module = checked(model)
    every = find(module, FAMILIES)
    found = [network for network in every if package in (None, network.family.package)]
    for name, part in module.named_modules():
        reason = why_refused(part)
        if reason is not None:
            others = ", ".join(network.name for network in found)
            raise ValueError(
                f"the tokens of {name or 'this'} {type(part).__name__} cannot be merged: {reason}"
                + (f". Patch the others alone: {others}" if others else "")
            )
    if not found:
        of = f" of {package}" if package else ""
        rows = [row for row in FAMILIES if package in (None, row.package)]
        raise ValueError(
            f"{type(module).__name__} holds no vision transformer{of} that tomesd knows{why_unfit(module)}. "
            f"Known are {known(rows)}; for Stable Diffusion there is tomesd.apply_patch"
        )
    for network in found:
        if not network.sites:
            raise ValueError(f"{network} has no blocks in {network.family.path}")
    return found


def checked(model: object) -> nn.Module:
    """The model, if it is a module; else a TypeError."""
    if isinstance(model, nn.Module):
        return model
    kind = f"the class {model.__name__}: make one first" if isinstance(model, type) else type(model).__name__
    has_one = isinstance(getattr(model, "model", None), nn.Module)  # a pipeline of transformers, say
    instead = "pass its .model" if has_one else "for pipelines there is tomesd.apply_patch"
    raise TypeError(f"expected a torch module, got {kind} ({instead})")
