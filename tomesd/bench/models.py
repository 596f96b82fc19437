"""What is measured: networks of full size with random weights, and inputs for them."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families import find_networks, find_sites

# What a network is called with, by position and by name.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A UNet of diffusers and its finest self-attention.

    Args:
        explains: what it is, in a line.
        config: arguments of UNet2DConditionModel.
        channels: of the finest self-attention.
        heads: of the finest self-attention.
        downsample: how many times smaller than the latent image is that attention's.
    """

    explains: str
    config: dict[str, Any]
    channels: int
    heads: int
    downsample: int = 1


MODELS = {
    # The configuration of SD 1.5 is the default but for the width of its text.
    "sd15": Model("Stable Diffusion 1.5, 0.86 G parameters", {"cross_attention_dim": 768}, 320, 8),
    "sdxl": Model(
        "Stable Diffusion XL base, 2.6 G parameters",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        *(640, 10, 2),
    ),
    "tiny": Model(
        "two levels and few channels, for tests",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        *(16, 2),
    ),
}
# Six numbers for each picture of SDXL, each embedded: sizes and where it was cropped.
TIME_IDS = 6


@dataclass(frozen=True)
class Setting:
    """What all ways have in common.

    Args:
        level: `"block"` or `"unet"`.
        model: its name; one of `MODELS` unless `downsample` is given.
        dtype: by its name in torch.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        ratio: share of the tokens that merge away.
        batch: pictures, or guidance halves.
        device: as torch calls it.
        scale: pixels for each latent pixel, along a side.
        downsample: how many times smaller than the latent image is the finest self-attention; the model's
            unless given.
        max_downsample: ways that do not say where they are at work are so at levels up to this one; the
            finest unless given.
    """

    level: str
    model: str
    dtype: str
    width: int
    height: int
    ratio: float
    batch: int
    device: str
    scale: int = 8
    downsample: int = 0
    max_downsample: int = 0

    def __post_init__(self) -> None:
        if not self.downsample:
            object.__setattr__(self, "downsample", MODELS[self.model].downsample)
        if not self.max_downsample:
            object.__setattr__(self, "max_downsample", self.downsample)

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent image."""
        return self.height // self.scale, self.width // self.scale

    def image(self, downsample: int) -> tuple[int, int]:
        """Height and width in tokens at a level of the network."""
        h, w = self.latent
        return h // downsample, w // downsample

    @property
    def finest(self) -> tuple[int, int]:
        """Height and width in tokens of the finest self-attention."""
        return self.image(self.downsample)

    @property
    def tokens(self) -> int:
        """Tokens of the finest self-attention."""
        h, w = self.finest
        return h * w

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class Block(nn.Module):
    """One self-attention; where there is a `plan`, through what it merges of the tokens."""

    def __init__(self, attn1: nn.Module) -> None:
        super().__init__()
        self.attn1 = attn1
        self.plan: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.plan is None:
            return (self.attn1(x),)
        plan = self.plan(x)
        return (plan.unmerge(self.attn1(plan.merge(x))),)


@dataclass(frozen=True)
class Site:
    """A self-attention and the image of its tokens: `h` x `w`."""

    attention: nn.Module
    container: nn.Module = field(repr=False)
    h: int
    w: int


def finest(network: nn.Module, setting: Setting) -> list[Site]:
    """The self-attentions of a network at the finest level that has some, or at all that the setting says."""
    if isinstance(network, Block):
        return [Site(network.attn1, network, *setting.finest)]
    ((_, unet, family),) = find_networks(network)
    return [
        Site(site.block.get_submodule("attn1"), site.container, *setting.image(site.downsample))
        for site in find_sites(unet, family)
        if site.downsample <= setting.max_downsample
    ]


def build(setting: Setting) -> nn.Module:
    """The network of a setting, with random weights that do not depend on its size."""
    model = MODELS[setting.model]
    diffusers = import_diffusers()
    torch.manual_seed(0)
    # Made without memory, then filled: SDXL in float32 alone would take 10 GB before it becomes bfloat16.
    with torch.device("meta"):
        if setting.level == "block":
            head = model.channels // model.heads
            network: nn.Module = Block(diffusers.Attention(model.channels, heads=model.heads, dim_head=head))
        else:
            network = diffusers.UNet2DConditionModel(**model.config)
    # Not its own `to`, which warns that no module of it is kept in float32.
    network = nn.Module.to(network, setting.torch_dtype).to_empty(device=setting.device).eval()
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            if not hasattr(module, "reset_parameters"):
                raise TypeError(f"no initial values for {name}, {type(module).__name__}")
            module.reset_parameters()
    return network.requires_grad_(False)


def view(network: nn.Module) -> nn.Module:
    """A copy that shares the weights, so that each way can stay patched, for the memory of one."""
    shared = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def smooth(batch: int, channels: int, h: int, w: int) -> Tensor:
    """Pixels that resemble their neighbours, as those of a picture do: `[batch, channels, h, w]`."""
    coarse = torch.randn(batch, channels, max(1, h // 8), max(1, w // 8))
    fine = nn.functional.interpolate(coarse, size=(h, w), mode="bicubic")
    return fine + 0.3 * torch.randn_like(fine)


def inputs(setting: Setting) -> Inputs:
    """What the network of a setting is called with; always the same."""
    torch.manual_seed(1)
    model, b = MODELS[setting.model], setting.batch

    def put(x: Tensor) -> Tensor:
        return x.to(setting.device, setting.torch_dtype)

    if setting.level == "block":
        return (put(smooth(b, model.channels, *setting.finest).flatten(2).mT.contiguous()),), {}
    # By position as pipelines do, which tomesd 0.1.3 relies on.
    args = put(smooth(b, 4, *setting.latent)), torch.tensor(500, device=setting.device)
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": put(torch.randn(b, 77, model.config["cross_attention_dim"])),
        "return_dict": False,
    }
    if "addition_embed_type" in model.config:
        ids = TIME_IDS * model.config["addition_time_embed_dim"]
        pooled = model.config["projection_class_embeddings_input_dim"] - ids
        sizes = torch.tensor([[setting.height, setting.width, 0, 0, setting.height, setting.width]])
        kwargs["added_cond_kwargs"] = {
            "text_embeds": put(torch.randn(b, pooled)),
            "time_ids": put(sizes.expand(b, -1)),
        }
    return args, kwargs


@dataclass(frozen=True)
class Diffusers:
    """What is needed of diffusers."""

    UNet2DConditionModel: Any
    Attention: Any
    version: str


def import_diffusers() -> Diffusers:
    """Imports diffusers, which takes seconds and which tomesd itself does without.

    Raises:
        SystemExit: it cannot be imported; says what to do.
    """
    try:
        unet = importlib.import_module("diffusers").UNet2DConditionModel
        attention = importlib.import_module("diffusers.models.attention_processor").Attention
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "diffusers":
            raise SystemExit("the benchmark needs diffusers: pip install 'tomesd[bench]'") from error
        if "torchvision::nms" in "".join(str(cause) for cause in _causes(error)):
            raise SystemExit(
                "diffusers cannot be imported, as torchvision is of another build than torch (operator "
                "torchvision::nms does not exist): install the torchvision that belongs to "
                f"torch {torch.__version__}, or uninstall torchvision, or run `python scripts/bench.py` or "
                "scripts/quality.py of a checkout of tomesd, which do without its operators"
            ) from error
        raise
    return Diffusers(unet, attention, importlib.import_module("diffusers").__version__)


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__ or error.__context__)]
