"""Real vision transformers of timm, torchvision and transformers, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
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

    def __call__(self, model: nn.Module, b: int = 2) -> Tensor:
        """The model's output for fixed random images."""
        return logits(self.run(model, b))

    def run(self, model: nn.Module, batch: int = 2, **options: Any) -> Any:
        dtype = next(model.parameters()).dtype
        return model(images(batch).to(dtype), **self.options(batch), **options)


def images(batch: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def logits(output: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


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
}
if TorchVersion(transformers.__version__) < "5.18":  # before, its blocks were of other layouts
    CASES = {name: case for name, case in CASES.items() if not name.startswith("transformers")}
