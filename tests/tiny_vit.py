"""Real vision transformers of timm, torchvision and transformers, tiny and with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from open_clip.transformer import VisionTransformer as OpenClip
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.torch_version import TorchVersion


class Transformers:
    """Classes of transformers. Those that an older version lacks are None; scripts/floor.sh has one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(transformers, name, None)


T = Transformers()
SIDE = 32
DEPTH = 4
TIMM = dict(img_size=SIDE, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=10)
CONFIG = dict(
    image_size=SIDE,
    patch_size=4,
    hidden_size=24,
    num_hidden_layers=DEPTH,
    num_attention_heads=3,
    intermediate_size=48,
)


@dataclass(frozen=True)
class Case:
    """A model, where its blocks are, and what its blocks compute, written out for one image in plain tensors.

    Args:
        build: makes the model.
        blocks: its blocks.
        prefix: how many tokens come before the patches.
        first: what the first half of a block adds to tokens `[N, C]`, given how to attend.
        second: what the second half adds.
        qkv: queries, keys and values `[heads, N, D]` of the input of an attention.
        project: the last part of an attention.
        rope: turns queries or keys of patches by the embeddings that the block was called with.
        options: what the model is called with beside images, given how many.
    """

    build: Callable[[], nn.Module]
    blocks: Callable[[Any], list[Any]]
    prefix: int
    first: Callable[[Any, Tensor, Callable[[Any, Tensor], Tensor]], Tensor]
    second: Callable[[Any, Tensor], Tensor]
    qkv: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    project: str
    rope: Callable[[Tensor, Any], Tensor] | None = None
    options: Callable[[int], dict[str, Any]] = lambda batch: {}
    at_once: bool = False  # whether its halves run beside each other, on tokens that merge before
    suffix: int = 0  # how many tokens come after the patches
    sizes: bool = True  # whether its attention takes sizes
    keys: bool = True  # whether its keys can be seen
    inputs: Callable[[int], Tensor] = lambda batch: images(batch)

    def __call__(self, model: nn.Module, b: int = 2) -> Tensor:
        """The model's output for fixed random images."""
        return logits(self.run(model, b))

    def run(self, model: nn.Module, batch: int = 2, **options: Any) -> Any:
        dtype = next(model.parameters()).dtype
        return model(self.inputs(batch).to(dtype), **self.options(batch), **options)


def images(batch: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def frames(batch: int = 2) -> Tensor:
    """Two pictures a sample, as a video."""
    return images(2 * batch).unflatten(0, (batch, 2))


def logits(output: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.feature_maps[-1] if hasattr(output, "feature_maps") else output


def randomised(model: nn.Module) -> nn.Module:
    """With weights large enough that no part of the model is near to doing nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.dim() > 1 else 0.1
            noise = scale * torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise if name.endswith("norm.weight") or "gamma" in name else noise)
    return model.eval()


def _timm(build: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: randomised(build(**{**TIMM, **options}))


def _hf(model: type, config: type, **options: Any) -> Callable[[], nn.Module]:
    return lambda: randomised(model(config(**{**CONFIG, **options})))


def _hf_inner(path: str, prefix: int, half: dict[str, Any], **options: Any) -> Case:
    """A part of a model of transformers, "folder.Class", which it may not export."""
    folder, _, name = path.partition(".")

    def build() -> nn.Module:
        model = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
        return _hf(model, model.config_class, **options)()

    blocks = lambda m: next(list(part) for part in m.modules() if isinstance(part, nn.ModuleList))  # noqa: E731
    return Case(build, prefix=prefix, **{**half, "blocks": blocks})


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _timm_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        if getattr(attn, "q_bias", None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (_heads(each, attn.num_heads) for each in (q, k, v))
    return attn.q_norm(q), attn.k_norm(k), v


def _mha_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    return tuple(_heads(each, attn.num_heads) for each in qkv.chunk(3, dim=-1))


def _parallel_qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_heads(each, block.num_heads) for each in block.in_proj(x)[:, -72:].chunk(3, dim=-1))
    return block.q_norm(q), block.k_norm(k), v


def _beside(block: Any, x: Tensor, attend: Callable[[Any, Tensor], Tensor]) -> Tensor:
    x = block.in_norm(x)
    hidden = block.in_proj(x)[:, :-72]
    if block.mlp_bias is not None:
        hidden = hidden + block.mlp_bias
    return block.ls(attend(block, x) + block.mlp_out_proj(block.mlp_act(hidden)))


def _fused_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_heads(each, attn.num_heads) for each in attn.qkv(x).chunk(3, dim=-1))


def _bert_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_heads(each(x), attn.num_attention_heads) for each in (attn.query, attn.key, attn.value))


def _open_clip_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _mha_qkv(attn, x)
    return attn.ln_q(q), attn.ln_k(k), v


def _internvl_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(x)), attn.v_proj(x)
    return tuple(_heads(each, attn.num_heads) for each in parts)


def _hf_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = x.shape[-1] // attn.head_dim
    return tuple(_heads(each(x), heads) for each in (attn.q_proj, attn.k_proj, attn.v_proj))


def _eva_rope(x: Tensor, rope: Tensor) -> Tensor:
    sin, cos = rope.chunk(2, dim=-1)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def _half_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _eva(gamma: Tensor | None) -> Tensor | float:
    return 1.0 if gamma is None else gamma


BLOCK = dict(
    blocks=lambda m: list(m.blocks),
    first=lambda b, x, attend: b.ls1(attend(b.attn, b.norm1(x))),
    second=lambda b, x: b.ls2(b.mlp(b.norm2(x))),
    qkv=_timm_qkv,
    project="proj",
)
RES_POST = dict(
    BLOCK,
    first=lambda b, x, attend: b.norm1(attend(b.attn, x)),
    second=lambda b, x: b.norm2(b.mlp(x)),
)
EVA = dict(
    BLOCK,
    first=lambda b, x, attend: _eva(b.gamma_1) * attend(b.attn, b.norm1(x)),
    second=lambda b, x: _eva(b.gamma_2) * b.mlp(b.norm2(x)),
    rope=_eva_rope,
)
AT_ONCE = dict(BLOCK, second=lambda b, x: 0, keys=False, at_once=True)  # all in the first half
TORCHVISION = dict(
    blocks=lambda m: list(m.encoder.layers),
    first=lambda b, x, attend: attend(b.self_attention, b.ln_1(x)),
    second=lambda b, x: b.mlp(b.ln_2(x)),
    qkv=_mha_qkv,
    project="out_proj",
    prefix=1,
)
HF_VIT = dict(
    first=lambda b, x, attend: attend(b.attention, b.layernorm_before(x)),
    second=lambda b, x: b.mlp(b.layernorm_after(x)),
    qkv=_hf_qkv,
    project="o_proj",
)
HF_DINO = dict(
    first=lambda b, x, attend: b.layer_scale1(attend(b.attention, b.norm1(x))),
    second=lambda b, x: b.layer_scale2(b.mlp(b.norm2(x))),
    qkv=_hf_qkv,
    project="o_proj",
)
HF_CLIP = dict(
    first=lambda b, x, attend: attend(b.self_attn, b.layer_norm1(x)),
    second=lambda b, x: b.mlp(b.layer_norm2(x)),
    qkv=_hf_qkv,
    project="out_proj",
)


HF_BLIP = dict(
    first=lambda b, x, attend: attend(b.self_attn, b.layer_norm1(x)),
    second=lambda b, x: b.mlp(b.layer_norm2(x)),
    qkv=_fused_qkv,
    project="projection",
    sizes=False,
    keys=False,
)
HF_INTERNVL = dict(
    first=lambda b, x, attend: b.lambda_1 * attend(b.attention, b.layernorm_before(x)),
    second=lambda b, x: b.lambda_2 * b.mlp(b.layernorm_after(x)),
    qkv=_internvl_qkv,
    project="projection_layer",
)
HF_AIM = dict(
    first=lambda b, x, attend: attend(b.attention, b.rms_norm1(x)),
    second=lambda b, x: b.ffn(b.rms_norm2(x)),
    qkv=_hf_qkv,
    project="out_proj",
)
HF_VIT_POSE = dict(
    first=lambda b, x, attend: b.attention.output.dense(attend(b.attention, b.layernorm_before(x))),
    second=lambda b, x: b.mlp(b.layernorm_after(x)),
    qkv=lambda attn, x: _bert_qkv(attn.attention, x),
    project="",
    sizes=False,
    keys=False,
)
HF_VIDEO_MAE = dict(
    blocks=lambda m: list(m.encoder.layer),
    first=lambda b, x, attend: b.attention.output.dense(attend(b.attention.attention, b.layernorm_before(x))),
    second=lambda b, x: b.output.dense(b.intermediate(b.layernorm_after(x))),
    qkv=_bert_qkv,
    project="",  # comes after it, in the block
    sizes=False,
    keys=False,
)
OPEN_CLIP = dict(
    blocks=lambda m: list(m.transformer.resblocks),
    first=lambda b, x, attend: b.ls_1(attend(b.attn, b.ln_1(x))),
    second=lambda b, x: b.ls_2(b.mlp(b.ln_2(x))),
    qkv=_mha_qkv,
    project="out_proj",
    prefix=1,
)
DINO_HUB = dict(BLOCK, sizes=False, keys=False, qkv=_fused_qkv, prefix=1)


def _open_clip(**options: Any) -> Callable[[], nn.Module]:
    sizes = dict(image_size=SIDE, patch_size=4, width=24, layers=DEPTH, heads=3, mlp_ratio=2, output_dim=10)
    return lambda: randomised(OpenClip(**{**sizes, **options}))


def _torchvision() -> nn.Module:
    return randomised(
        torchvision.models.VisionTransformer(
            image_size=SIDE,
            patch_size=4,
            num_layers=DEPTH,
            num_heads=3,
            hidden_dim=24,
            mlp_dim=48,
            num_classes=10,
        )
    )


class DinoAttention(nn.Module):
    """As that of DINOv2 and DINOv3, whose code is no package."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None, rope: Any = None) -> Tensor:
        assert attn_bias is None
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            sin, cos = rope
            first = x.shape[1] - sin.shape[-2]
            q, k = (torch.cat([y[:, :, :first], _half_rope(y[:, :, first:], (cos, sin))], 2) for y in (q, k))
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SelfAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(24), DinoAttention(), nn.Linear(24, 24)
        self.norm2, self.ls2 = nn.LayerNorm(24), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Tensor:
        x = x_or_x_list
        x = x + self.ls1(self.attn(self.norm1(x), rope=rope_or_rope_list))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Block(SelfAttentionBlock):
    """That of DINOv2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class DinoVisionTransformer(nn.Module):
    def __init__(self, depth: int, rope: bool = False, **_: Any) -> None:
        super().__init__()
        self.num_register_tokens = 0
        self.stem, self.cls_token = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks = nn.ModuleList((SelfAttentionBlock if rope else Block)() for _ in range(depth))
        self.head = nn.Linear(24, 10)
        self.rope = rope
        self.checkpointing = False

    def set_grad_checkpointing(self, on: bool) -> None:
        self.checkpointing = on

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        args = ()
        if self.rope:
            angles = torch.arange(x.shape[1] * 8.0, dtype=x.dtype).view(-1, 8) / 50
            args = ((angles.sin(), angles.cos()),)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, *args, use_reentrant=False)
            else:
                x = block(x, *args)
        return self.head(x[:, 0])


class ResidualAttentionBlock(nn.Module):
    """That of OpenAI's CLIP, whose code is no package."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(24, 3), nn.LayerNorm(24), nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.ls_1 = self.ls_2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=None)[0]
        return x + self.mlp(self.ln_2(x))


def OpenAiClip(**_: Any) -> nn.Module:
    class VisionTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.class_embedding = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.zeros(24))
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.Sequential(*(ResidualAttentionBlock() for _ in range(DEPTH)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x).flatten(2).mT
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1).transpose(0, 1)
            return self.transformer.resblocks(x)[0]

    return VisionTransformer()


def _cait() -> nn.Module:
    """CaiT whose heads do not talk to each other."""
    model = _timm(Cait)()
    for block in model.blocks:
        for layer in (block.attn.proj_l, block.attn.proj_w):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def _newer_timm(path: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm, "module.Class", that older versions lack."""
    module, _, name = path.partition(".")
    sizes = dict(img_size=SIDE, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3)
    return lambda: randomised(
        getattr(importlib.import_module(f"timm.models.{module}"), name)(**sizes, **options)
    )


def _diff_block(**options: Any) -> nn.Module:
    return importlib.import_module("timm.models.vision_transformer").DiffParallelScalingBlock(**options)


def _diff_qkv(half: tuple[Any, int], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    block, i = half
    q, k, v = block.in_proj(block.in_norm(x)).split(block.in_split, -1)[1:]
    q, k = (_heads(each, 2 * block.num_heads)[i::2] for each in (q, k))
    return block.q_norm(q), block.k_norm(k), _heads(v, block.num_heads)


def _diff(block: Any, x: Tensor, attend: Callable[[Any, Tensor], Tensor]) -> Tensor:
    hidden = block.mlp_act(
        block.in_proj(block.in_norm(x)).split(block.in_split, -1)[0] + (block.mlp_bias or 0)
    )
    seen = attend((block, 0), x) - block._compute_lambda() * attend((block, 1), x)
    seen = block.sub_norm(seen.unflatten(-1, (block.num_heads, -1))) * (1 - block.lambda_init)
    return block.ls(block.out_proj(torch.cat([seen.flatten(1), hidden], -1)))


class LastLayer(nn.Module):
    """Of BridgeTower's vision half, which returns what all layers do."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)[-1]


def patches(batch: int = 2) -> Tensor:
    """Pictures as rows of pixels `[B, 64, 48]`."""
    return nn.functional.unfold(images(batch), 4, stride=4).mT


CASES = {
    "timm ViT": Case(_timm(VisionTransformer), prefix=1, **BLOCK),
    "timm DeiT distilled": Case(
        _timm(lambda **o: timm.create_model("deit_tiny_distilled_patch16_224", **o)), prefix=2, **BLOCK
    ),
    "timm DINOv2 with registers": Case(
        _timm(VisionTransformer, init_values=1.0, reg_tokens=4, no_embed_class=True), prefix=5, **BLOCK
    ),
    "timm qk-norm, average pooling": Case(
        _timm(VisionTransformer, qk_norm=True, global_pool="avg", drop_path_rate=0.1), prefix=1, **BLOCK
    ),
    "timm parallel": Case(
        _timm(VisionTransformer, block_fn=ParallelScalingBlock, qk_norm=True),
        prefix=1,
        **{**AT_ONCE, "first": _beside, "qkv": _parallel_qkv, "project": "attn_out_proj"},
    ),
    "timm SigLIP": Case(_timm(VisionTransformer, class_token=False, global_pool="map"), prefix=0, **BLOCK),
    "timm post-norm": Case(_timm(VisionTransformer, block_fn=ResPostBlock), prefix=1, **RES_POST),
    "timm EVA02": Case(
        _timm(Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, init_values=1.0, global_pool="avg"),
        prefix=1,
        **EVA,
    ),
    "timm EVA02, mixed": Case(
        _timm(Eva, use_rot_pos_emb=True, rope_type="mixed", qkv_fused=False, num_reg_tokens=2),
        prefix=3,
        **EVA,
    ),
    "timm EVA02, post-norm": Case(
        _timm(Eva, use_rot_pos_emb=True, use_post_norm=True),
        prefix=1,
        **{**EVA, "first": RES_POST["first"], "second": RES_POST["second"]},
    ),
    "torchvision": Case(_torchvision, **TORCHVISION),
    "transformers ViT": Case(
        _hf(T.ViTForImageClassification, T.ViTConfig), lambda m: list(m.vit.layers), 1, **HF_VIT
    ),
    "transformers DeiT": Case(
        _hf(T.DeiTForImageClassification, T.DeiTConfig), lambda m: list(m.deit.layers), 2, **HF_VIT
    ),
    "transformers ViTMAE": Case(
        _hf(T.ViTMAEModel, T.ViTMAEConfig, mask_ratio=0.0),
        lambda m: list(m.layers),
        1,
        **HF_VIT,
        options=lambda batch: {"noise": torch.arange(64.0).expand(batch, -1)},  # without, it shuffles them
    ),
    "transformers DINOv2": Case(
        _hf(T.Dinov2Model, T.Dinov2Config, mlp_ratio=2), lambda m: list(m.encoder.layer), 1, **HF_DINO
    ),
    "transformers DINOv2 with registers": Case(
        _hf(T.Dinov2WithRegistersModel, T.Dinov2WithRegistersConfig, mlp_ratio=2, num_register_tokens=4),
        lambda m: list(m.encoder.layer),
        5,
        **HF_DINO,
    ),
    "transformers DINOv3": Case(
        _hf(
            T.DINOv3ViTModel,
            T.DINOv3ViTConfig,
            num_register_tokens=2,
            num_attention_heads=2,
            pos_embed_rescale=None,
        ),
        lambda m: list(m.model.layer),
        3,
        **HF_DINO,
        rope=_half_rope,
    ),
    "transformers CLIP": Case(
        _hf(T.CLIPVisionModelWithProjection, T.CLIPVisionConfig, projection_dim=16),
        lambda m: list(m.vision_model.encoder.layers),
        1,
        **HF_CLIP,
    ),
    "transformers SigLIP": Case(
        _hf(T.SiglipVisionModel, T.SiglipVisionConfig), lambda m: list(m.encoder.layers), 0, **HF_CLIP
    ),
    "transformers BLIP": Case(
        _hf(T.BlipVisionModel, T.BlipVisionConfig), lambda m: list(m.encoder.layers), 1, **HF_BLIP
    ),
    "transformers InternVL": Case(
        _hf(
            T.InternVLVisionModel,
            T.InternVLVisionConfig,
            image_size=[SIDE, SIDE],
            patch_size=[4, 4],
            use_qk_norm=True,
        ),
        lambda m: list(m.encoder.layer),
        1,
        **HF_INTERNVL,
    ),
    "transformers YOLOS": Case(
        _hf(
            T.YolosModel,
            T.YolosConfig,
            image_size=[SIDE, SIDE],
            num_detection_tokens=3,
            use_mid_position_embeddings=False,
        ),
        prefix=1,
        suffix=3,
        **HF_VIDEO_MAE,
    ),
    "open_clip": Case(_open_clip(ls_init_value=1.0), **OPEN_CLIP),
    "DINO of torch.hub": Case(_timm(DinoVisionTransformer), **DINO_HUB),
}
# Families whose blocks are as those of one above.
ALIKE = {
    "open_clip, custom": Case(
        _open_clip(qk_norm=True), **{**OPEN_CLIP, "qkv": _open_clip_qkv, "keys": False}
    ),
    "OpenAI CLIP": Case(_timm(OpenAiClip), **OPEN_CLIP),
    "DINOv3 of torch.hub": Case(
        _timm(DinoVisionTransformer, rope=True), **DINO_HUB, rope=lambda x, rope: _half_rope(x, rope[::-1])
    ),
    "transformers BLIP-2": Case(
        _hf(T.Blip2VisionModel, T.Blip2VisionConfig), lambda m: list(m.encoder.layers), 1, **HF_BLIP
    ),
    "transformers MetaCLIP 2": Case(
        _hf(T.MetaClip2VisionModel, T.MetaClip2VisionConfig), lambda m: list(m.encoder.layers), 1, **HF_CLIP
    ),
    "transformers ViT-MSN": Case(_hf(T.ViTMSNModel, T.ViTMSNConfig), lambda m: list(m.layers), 1, **HF_VIT),
    "transformers I-JEPA": Case(_hf(T.IJepaModel, T.IJepaConfig), lambda m: list(m.layers), 0, **HF_VIT),
    "transformers ViViT": Case(
        _hf(T.VivitModel, T.VivitConfig, num_frames=2, tubelet_size=[1, 4, 4]),
        lambda m: list(m.layers),
        1,
        **HF_VIT,
        inputs=frames,
    ),
    "transformers VideoMAE": Case(
        _hf(T.VideoMAEModel, T.VideoMAEConfig, num_frames=2, tubelet_size=1),
        prefix=0,
        **HF_VIDEO_MAE,
        inputs=frames,
    ),
}
ALIKE |= {
    "transformers AltCLIP": _hf_inner("altclip.AltCLIPVisionModel", 1, HF_CLIP),
    "transformers Chinese CLIP": _hf_inner("chinese_clip.ChineseCLIPVisionModel", 1, HF_CLIP),
    "transformers CLIPSeg": _hf_inner("clipseg.CLIPSegVisionModel", 1, HF_CLIP),
    "transformers GIT": _hf_inner("git.GitVisionModel", 1, HF_CLIP),
    "transformers Kosmos-2": _hf_inner("kosmos2.Kosmos2VisionModel", 1, HF_CLIP),
    "transformers OWL-ViT": _hf_inner("owlvit.OwlViTVisionModel", 1, HF_CLIP),
    "transformers OWLv2": _hf_inner("owlv2.Owlv2VisionModel", 1, HF_CLIP),
    "transformers Idefics2": _hf_inner("idefics2.Idefics2VisionTransformer", 0, HF_CLIP),
    "transformers Idefics3": _hf_inner("idefics3.Idefics3VisionTransformer", 0, HF_CLIP),
    "transformers SmolVLM": _hf_inner("smolvlm.SmolVLMVisionTransformer", 0, HF_CLIP),
    "transformers Janus": _hf_inner(
        "janus.JanusVisionModel", 0, {**HF_CLIP, "project": "projection_layer"}, mlp_ratio=2
    ),
    "transformers AIMv2": _hf_inner("aimv2.Aimv2VisionModel", 0, HF_AIM),
    "transformers Ovis2": _hf_inner("ovis2.Ovis2VisionModel", 0, HF_AIM, vocab_size=20),
    "transformers InstructBLIP": _hf_inner("instructblip.InstructBlipVisionModel", 1, HF_BLIP),
    "transformers InstructBLIP video": _hf_inner(
        "instructblipvideo.InstructBlipVideoVisionModel", 1, HF_BLIP
    ),
    "transformers TIPSv2": _hf_inner("tipsv2.Tipsv2VisionModel", 2, HF_DINO, mlp_ratio=2),
    "transformers Sapiens2": _hf_inner(
        "sapiens2.Sapiens2Model",
        2,
        {**HF_DINO, "rope": _half_rope},
        num_attention_heads=2,
        num_key_value_heads_per_layer=[2] * DEPTH,
        use_qk_norm=False,
        num_register_tokens=1,
    ),
    "transformers RADIO": _hf_inner(
        "radio.RadioModel", 2, HF_DINO, num_cls_tokens=1, num_registers=1, summary_idxs=[0]
    ),
    "transformers Pixio": _hf_inner("pixio.PixioModel", 2, HF_VIT, n_cls_tokens=2),
    "transformers DPT": _hf_inner("dpt.DPTModel", 1, HF_VIDEO_MAE),
    "transformers ViTPose": _hf_inner(  # its patches overlap: for 4 x 4 pixels it makes one more than it says
        "vitpose_backbone.VitPoseBackbone",
        0,
        {**HF_VIT_POSE, "inputs": lambda batch: images(batch, 2 * SIDE)},
        image_size=[2 * SIDE] * 2,
        patch_size=[8, 8],
        mlp_ratio=2,
    ),
    "transformers AST": _hf_inner(
        "audio_spectrogram_transformer.ASTModel",
        2,
        {**HF_VIT, "inputs": lambda batch: images(batch)[:, 0]},
        max_length=SIDE,
        num_mel_bins=SIDE,
        frequency_stride=4,
        time_stride=4,
    ),
}
ALIKE |= {
    "timm parallel of differences": Case(
        _timm(VisionTransformer, block_fn=_diff_block, qkv_bias=True),
        prefix=1,
        **{**AT_ONCE, "first": _diff, "qkv": _diff_qkv, "project": ""},
    ),
    "timm parallel things": Case(
        _timm(VisionTransformer, block_fn=ParallelThingsBlock),
        prefix=1,
        **{
            **AT_ONCE,
            "first": lambda b, x, attend: sum(part.ls(attend(part.attn, part.norm(x))) for part in b.attns),
            "second": lambda b, x: sum(part(x) for part in b.ffns),
        },
    ),
    "timm CaiT": Case(_cait, **{**EVA, "rope": None, "qkv": _fused_qkv}, prefix=0, sizes=False, keys=False),
    "timm Qwen3": Case(
        _newer_timm("qwen3_vit.Qwen3VitEncoder", out_features=10, pos_embed_grid_size=8),
        **{**EVA, "rope": lambda x, rope: _half_rope(x, rope.chunk(2, -1)[::-1])},
        prefix=0,
    ),
    "timm DeepSeek": Case(
        _newer_timm("deepseek_vit.DeepseekVitEncoder", out_features=10),
        blocks=lambda m: list(m.blocks),
        prefix=0,
        first=lambda b, x, attend: attend(b.attn, b.norm1(x)),
        second=lambda b, x: b.mlp(b.norm2(x)),
        qkv=_timm_qkv,
        project="proj",
        rope=lambda x, rope: _half_rope(x, rope.chunk(2, -1)[::-1]),
    ),
    "transformers Qianfan-OCR": _hf_inner(
        "qianfan_ocr.QianfanOCRVisionModel",
        1,
        HF_INTERNVL,
        image_size=[SIDE, SIDE],
        patch_size=[4, 4],
        use_qk_norm=True,
    ),
    "transformers Molmo 2": _hf_inner(
        "molmo2.Molmo2VisionModel",
        0,
        {**HF_CLIP, "project": "o_proj", "inputs": patches},
        image_size=[SIDE, SIDE],
        num_position_embeddings=64,
        num_key_value_heads=3,
        head_dim=8,
    ),
    "transformers Granite Docling": _hf_inner(
        "granite_docling.GraniteDoclingVisionModel", 0, HF_CLIP, deepstack_visual_indexes=[1]
    ),
    "transformers Unlimited OCR": _hf_inner(
        "unlimited_ocr.UnlimitedOcrVisionEncoder",
        1,
        {**HF_CLIP, "inputs": lambda batch: patches(batch).mT[:, :24].unflatten(-1, (8, 8))},
    ),
    "transformers BridgeTower": Case(
        lambda: LastLayer(
            _hf_inner("bridgetower.BridgeTowerVisionModel", 1, HF_CLIP, hidden_size=64).build()
        ),
        **{
            **OPEN_CLIP,
            "blocks": lambda m: list(m.tower.visual.transformer.resblocks),
            "first": lambda b, x, attend: attend(b.attn, b.ln_1(x)),
            "second": lambda b, x: b.mlp.c_proj(b.mlp.gelu(b.mlp.c_fc(b.ln_2(x)))),
        },
    ),
    "transformers FLAVA": _hf_inner("flava.FlavaImageModel", 1, {**HF_VIDEO_MAE, "sizes": True}),
    "transformers MGP-STR": Case(
        _hf(T.MgpstrModel, T.MgpstrConfig, image_size=[SIDE, SIDE], mlp_ratio=2),
        blocks=lambda m: list(m.encoder.blocks),
        prefix=1,
        first=lambda b, x, attend: attend(b.attn, b.norm1(x)),
        second=lambda b, x: b.mlp(b.norm2(x)),
        qkv=_fused_qkv,
        project="proj",
        sizes=False,
        keys=False,
    ),
    "transformers VideoPrism": _hf_inner(
        "videoprism.VideoPrismVisionModel",
        0,
        {**HF_VIT, "inputs": lambda batch: images(batch)[:, None]},
        num_frames=1,
        tubelet_size=[1, 4, 4],
        num_spatial_layers=DEPTH,
        num_temporal_layers=1,
        attn_logit_softcapping=1e4,
    ),
}
if TorchVersion(transformers.__version__) < "5.18":  # before, its blocks were of other layouts
    CASES = {name: case for name, case in CASES.items() if not name.startswith("transformers")}
