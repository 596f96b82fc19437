"""A network of CompVis' layout whose blocks call their parts as hosts do: a few lines of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

C = 16


class CrossAttention(nn.Module):
    """That of ComfyUI takes values of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))
        self.heads = 2
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        value = context if value is None else value
        self.seen.append((x.shape[1], context.shape[1]))
        q, k, v = (
            layer(z).unflatten(2, (2, -1)).transpose(1, 2)
            for layer, z in ((self.to_q, x), (self.to_k, context), (self.to_v, value))
        )
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    how = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(C) for _ in range(3))
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()
        self.ff = nn.Sequential(nn.Linear(C, C), nn.GELU())

    def attend(self, n: Tensor) -> Tensor:
        attn, half = self.attn1, n.shape[0] // 2
        match self.how:
            case "keys and values":  # ComfyUI with any patch of attn1
                return attn(n, context=n, value=n)
            case "values of others":  # an adapter that edits values
                return attn(n, context=n, value=2 * n)
            case "keys by position":
                return attn(n, n)
            case "keys of others":  # as many, but not the tokens
                return attn(n, context=n.flip(0))
            case "more keys":  # reference-only: a bank of another picture's tokens
                return attn(n, context=torch.cat([n, n.flip(1)], 1))
            case "twice":  # reference-only ControlNet
                return (attn(n) + attn(n)) / 2
            case "a half again":
                out = attn(n)
                return torch.cat([attn(n[:half]), out[half:]])
            case "as one sequence":  # StyleAligned-like
                return attn(n.flatten(0, 1)[None]).view_as(n)
            case "windows":  # HiDiffusion, HyperTile
                return attn(n.unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)
            case "never":  # ComfyUI's replace patches
                return n
        return attn(n)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.how == "without its norm":
            x = x + self.attn1(x)
        elif self.how == "in place":  # Forge, older ComfyUI
            x += self.attn1(self.norm1(x))
            x += self.attn2(self.norm2(x), context)
            x += self.ff(self.norm3(x))
            return x
        else:
            x = x + self.attend(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(), BasicTransformerBlock()])
        self.time_stack: nn.ModuleList | None = None  # of video networks: its tokens are frames

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x.flatten(2).mT.contiguous()
        for block in self.transformer_blocks:
            y = block(y, context)
        for block in self.time_stack or ():
            y = block(y.transpose(0, 1), None).transpose(0, 1)
        return x + y.mT.unflatten(2, x.shape[2:])


class OfCompVis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([SpatialTransformer()])
        self.middle_block = SpatialTransformer()
        self.output_blocks = nn.ModuleList()

    def forward(self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.middle_block(self.input_blocks[0](x, context), context)

    def blocks(self) -> list[BasicTransformerBlock]:
        return [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]


class UNetModel(OfCompVis):
    pass


def network(how: str = "plain") -> UNetModel:
    torch.manual_seed(0)
    made = UNetModel().requires_grad_(False)
    for block in made.blocks():
        block.how = how
    return made


def call(net: nn.Module, t: float = 5.0, h: int = 12, w: int = 16, b: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, C, h, w, generator=generator)
    return net(x, torch.tensor([t] * b), torch.randn(b, 7, C, generator=generator))


# kohya's sd-scripts have classes of diffusers' names, which call each other in another way.


class Attention(CrossAttention):
    def forward(self, hidden_states: Tensor, context: Tensor | None = None, mask: None = None) -> Tensor:
        return super().forward(hidden_states, context)


def _block(
    self: BasicTransformerBlock, hidden_states: Tensor, context: Tensor, timestep: None = None
) -> Tensor:
    return BasicTransformerBlock.forward(self, hidden_states, context)


def _transformer(
    self: SpatialTransformer, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: None = None
) -> Tensor:
    return SpatialTransformer.forward(self, hidden_states, encoder_hidden_states)


Block = type("BasicTransformerBlock", (BasicTransformerBlock,), {"forward": _block})
Transformer = type("Transformer2DModel", (SpatialTransformer,), {"forward": _transformer})


def _transformer_of_kohya() -> SpatialTransformer:
    made = Transformer()
    made.transformer_blocks = nn.ModuleList([Block(), Block()])
    for block in made.transformer_blocks:
        block.attn1, block.attn2 = Attention(), Attention()
    return made


class UNet2DConditionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks, self.up_blocks = nn.ModuleList([_transformer_of_kohya()]), nn.ModuleList()
        self.mid_block = _transformer_of_kohya()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.down_blocks[0](sample, encoder_hidden_states=encoder_hidden_states)
        return self.mid_block(x, encoder_hidden_states)


class SdxlUNet2DConditionModel(nn.Module):
    """In CompVis' layout, of lists of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.ModuleList([_transformer_of_kohya()])])
        self.middle_block = nn.ModuleList([_transformer_of_kohya()])
        self.output_blocks = nn.ModuleList()

    def forward(self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        for layer in (*self.input_blocks[0], *self.middle_block):
            x = layer(x, context)
        return x


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().requires_grad_(False)


def kohya() -> nn.Module:
    return made(UNet2DConditionModel)


# Stand-ins of the networks in the rows that are in no package.
IN_NO_PACKAGE = {
    "UNet2DConditionModel": kohya,
    "SdxlUNet2DConditionModel": lambda: made(SdxlUNet2DConditionModel),
    **{
        name: lambda name=name: made(type(name, (OfCompVis,), {}))
        for name in ("VideoUNet", "IntegratedUNet2DConditionModel")
    },
}
