"""What `bench` measures: networks of full size with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import need

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
    "thin": Model(
        "as deep as Stable Diffusion 1.5, so narrow that the host's time is what is left of small pictures",
        {"block_out_channels": (32,) * 4, "cross_attention_dim": 32},
        *(32, 8),
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


# The text encoder, the autoencoder and the scheduler of Stable Diffusion 1.5.
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


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
    """One self-attention, as what is patched of a transformer block.

    Rivals merge by a `plan`, or pick `keys`.
    """

    def __init__(self, attn1: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.Identity()
        self.attn1 = attn1
        self.plan: Callable[[Tensor], Any] | None = None
        self.keys: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = self.norm1(hidden_states)
        if self.keys is not None:
            return (self.attn1(x, encoder_hidden_states=self.keys(x)),)
        if self.plan is None:
            return (self.attn1(x),)
        plan = self.plan(x)
        return (plan.unmerge(self.attn1(plan.merge(x))),)


def build(setting: Setting) -> nn.Module:
    """The network of a setting, with random weights that do not depend on its size."""
    model = MODELS[setting.model]
    diffusers = need("diffusers")
    torch.manual_seed(0)
    # Made without memory, then filled: SDXL in float32 alone would take 10 GB before it becomes bfloat16.
    with torch.device("meta"):
        if setting.level == "block":
            head = model.channels // model.heads
            attention = need("diffusers.models.attention_processor").Attention
            network: nn.Module = Block(attention(model.channels, heads=model.heads, dim_head=head))
        else:
            network = diffusers.UNet2DConditionModel(**model.config)
    # Not its own `to`, which warns that no module of it is kept in float32.
    network = nn.Module.to(network, setting.torch_dtype).to_empty(device=setting.device).eval()
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            if not hasattr(module, "reset_parameters"):
                raise TypeError(f"no initial values for {name}, {type(module).__name__}")
            reset: Any = module.reset_parameters
            reset()
    return network.requires_grad_(False)


def smooth(batch: int, channels: int, h: int, w: int, scale: int = 8, noise: float = 0.3) -> Tensor:
    """Pixels that resemble their neighbours, as those of a picture do: `[batch, channels, h, w]`.

    Args:
        scale: how far likeness reaches, in pixels.
        noise: standard deviation of what differs from pixel to pixel.
    """
    coarse = torch.randn(batch, channels, max(1, h // scale), max(1, w // scale))
    fine = nn.functional.interpolate(coarse, size=(h, w), mode="bicubic")
    return fine + noise * torch.randn_like(fine)


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


def random_pipeline(device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.5 in full size, its weights random; made where and as they are needed."""
    diffusers, transformers = need("diffusers"), need("transformers")
    letters = sorted(need("tokenizers.pre_tokenizers").ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = {
                "unet": diffusers.UNet2DConditionModel(**MODELS["sd15"].config, sample_size=64),
                "vae": diffusers.AutoencoderKL(**AUTOENCODER),
                "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
            }
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.eval()
    return diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
