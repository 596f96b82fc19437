"""Networks that draw images: one row of data for each family, and where its blocks are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .family import Block, Family, Misfit, Network, Part, Site, find, is_named, known, modules_of
from .hooks import Argument


@dataclass(frozen=True)
class ImageFamily(Family):
    """A family of networks whose blocks run on the tokens of an image. Parameters are those of forwards."""

    timestep: str = "timestep"  # the network's parameter
    clock: tuple[str, ...] = ()  # modules, of which it has one, that are given the timesteps early on
    first: tuple[str, ...] = ()  # modules, of which it has one, that are given the latent image
    last: tuple[str, ...] = ()  # modules, of which it has one, that run after all blocks
    # Attributes of the network that hold its blocks, in the order of the forward pass.
    stages: tuple[str, ...] = ("down_blocks", "mid_block", "up_blocks")
    # Classes that take an image [B, C, h, w] and run blocks on its tokens; without, the network itself does.
    containers: tuple[str, ...] = ()
    image: str = "hidden_states"  # the container's parameter that is this image
    patch_size: str | None = None  # the item of the network's config that is the side of a token in it
    carrier: str | None = None  # the parameter of both containers and blocks that is a dict for attention
    down: tuple[str, ...] = ()  # classes that halve the resolution at the end of their part of a stage
    up: tuple[str, ...] = ()  # classes that double it there
    # The network's parameters that are added to its levels: lists of images, fine ones first, and an image.
    added: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # attributes of containers that hold blocks on tokens of another kind

    def side(self, network: nn.Module) -> int:
        """The side of a token in the image that containers are given."""
        return 1 if self.patch_size is None else int(getattr(network.config, self.patch_size))

    def sites(self, network: nn.Module) -> Iterator[Site]:
        for path, child, level in self.children(network):
            runners = [(path, child, network)]
            if self.containers:
                named = child.named_modules(prefix=path)
                runners = [(n, m, m) for n, m in named if is_named(m, self.containers)]
            for name, within, container in runners:
                for place, module in within.named_modules(prefix=name):
                    block = self.block(module)
                    if block is not None and not set(self.others) & set(place.split(".")):
                        self._look_for(self.timestep, network, 1)
                        self._look_for(self.carrier, container)
                        self._look_for(self.carrier, module)
                        yield Site(place, module, block, container, level)

    def children(self, network: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
        """What a network runs, in order: path, module, and the level of the image that it is given."""
        level = 0
        for stage in self.stages:
            part = getattr(network, stage, None)
            named = [(stage, part)]
            if isinstance(part, nn.ModuleList) and self.containers:
                named = [(f"{stage}.{name}", child) for name, child in part.named_children()]
            for path, child in named:
                if child is None:
                    continue
                yield path, child, level
                level += any(is_named(module, self.down) for module in child.modules())
                level -= any(is_named(module, self.up) for module in child.modules())
                if level < 0:
                    raise Misfit(
                        f"its image would be larger than its input after {path}: `down` and `up` of its "
                        "row name the classes that halve it and double it"
                    )

    def _look_for(self, parameter: str | None, module: nn.Module, position: int | None = None) -> None:
        try:
            if parameter is not None:
                Argument(module, parameter, position)
        except ValueError as error:
            raise Misfit(str(error)) from None


TEXT = "encoder_hidden_states"
CLOCK = ("time_proj", "base_time_proj")
FIRST = ("conv_in", "base_conv_in", "input_blocks.0.0")
LAST = ("conv_out", "base_conv_out", "controlnet_mid_block")
PLAIN = (
    *("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor"),
    "DreamLiteAttnProcessor2_0",
)
BIASED = ("XFormersAttnProcessor", "AttnProcessorNPU")
ORDERLESS = (
    *("CustomDiffusionAttnProcessor", "CustomDiffusionAttnProcessor2_0"),
    *("CustomDiffusionXFormersAttnProcessor", "XLAFlashAttnProcessor2_0"),
    *("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor"),
    *("PAGIdentitySelfAttnProcessor2_0", "PAGCFGIdentitySelfAttnProcessor2_0"),
    *("CrossFrameAttnProcessor", "CrossFrameAttnProcessor2_0", "AttendExciteAttnProcessor"),
)
BASIC = Block(
    "norm1",
    Part(
        "attn1",
        keys=TEXT,
        bias="attention_mask",
        processors=PLAIN,
        biased=BIASED,
        orderless=ORDERLESS,
        keepers=("CrossAttnStoreProcessor",),
        cache="cache",
        sees_text="attn1.is_cross_attention",
    ),
    cross=Part(
        "attn2",
        keys=TEXT,
        bias="attention_mask",
        processors=PLAIN,
        biased=BIASED,
        orderless=ORDERLESS,
        keepers=("AttendExciteAttnProcessor", "LEDITSCrossAttnProcessor", "Pix2PixZeroAttnProcessor"),
        cache="cache",
        sees_text="attn2.is_cross_attention",
    ),
    mlp=Part("ff"),
)
# That of sd-scripts, in both of its networks.
KOHYA = Block(
    "norm1",
    Part("attn1", keys="context"),
    cross=Part("attn2", keys="context", sees_text=True),
    mlp=Part("ff"),
)
LDM_STAGES = ("input_blocks", "middle_block", "output_blocks")

FAMILIES = (
    ImageFamily(
        name="diffusers UNet",
        networks=(
            "UNet2DConditionModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "ControlNetModel",
            "ControlNetUnionModel",
            "UNetControlNetXSModel",
            "SparseControlNetModel",
            "I2VGenXLUNet",
            "AudioLDM2UNet2DConditionModel",
        ),
        blocks={"BasicTransformerBlock": BASIC, "BasicTransformerBlockDreamLite": BASIC},
        clock=CLOCK,
        first=FIRST,
        last=LAST,
        containers=("Transformer2DModel", "DreamLiteTransformer2DModel"),
        carrier="cross_attention_kwargs",
        down=("Downsample2D",),
        up=("Upsample2D",),
        added=(
            *("down_intrablock_additional_residuals", "down_block_additional_residuals"),
            "mid_block_additional_residual",
        ),
    ),
    ImageFamily(
        name="kohya's UNet for SD 1 and 2",
        networks=("UNet2DConditionModel",),
        blocks={"BasicTransformerBlock": KOHYA},
        clock=CLOCK,
        first=FIRST,
        last=LAST,
        containers=("Transformer2DModel",),
        down=("Downsample2D",),
        up=("Upsample2D",),
    ),
    ImageFamily(
        name="kohya's UNet for SDXL",
        networks=("SdxlUNet2DConditionModel",),
        blocks={"BasicTransformerBlock": KOHYA},
        timestep="timesteps",
        stages=LDM_STAGES,
        containers=("Transformer2DModel",),
        down=("Downsample2D",),
        up=("Upsample2D",),
    ),
    ImageFamily(
        name="Stable Video Diffusion",
        networks=("UNetSpatioTemporalConditionModel",),
        blocks={"BasicTransformerBlock": BASIC},
        clock=CLOCK,
        first=FIRST,
        last=LAST,
        containers=("TransformerSpatioTemporalModel",),
        down=("Downsample2D",),
        up=("Upsample2D",),
    ),
    ImageFamily(
        name="PixArt",
        networks=("PixArtTransformer2DModel",),
        blocks={"BasicTransformerBlock": BASIC},
        stages=("transformer_blocks",),
        patch_size="patch_size",
        carrier="cross_attention_kwargs",
    ),
    ImageFamily(
        name="CompVis LDM",
        networks=("UNetModel", "VideoUNet", "IntegratedUNet2DConditionModel"),  # the last one is Forge's
        blocks={
            "BasicTransformerBlock": Block(
                "norm1",
                attn=Part("attn1", tokens="x", keys="context", values="value", sees_text="disable_self_attn"),
                cross=Part("attn2", tokens="x", keys="context", sees_text=True),
                mlp=Part("ff", tokens="x"),
                tokens="x",
            )
        },
        timestep="timesteps",
        stages=LDM_STAGES,
        containers=("SpatialTransformer",),
        others=("time_stack",),
        image="x",
        down=("Downsample",),
        up=("Upsample",),
    ),
)


def find_networks(model: object) -> list[Network[ImageFamily]]:
    """Every network of a known family in a pipeline, a module or a wrapper of one.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: it holds no network of a known family.
    """
    found = find(model, FAMILIES)
    if not found:
        parts = [type(part).__name__ for _, part in modules_of(model)]
        seen = f" (it has {', '.join(parts)})" if len(parts) > 1 else ""
        raise ValueError(
            f"{type(model).__name__} holds no network that tomesd knows{seen}. Known are {known(FAMILIES)}; "
            "for vision transformers there is tomesd.vit.apply_patch"
        )
    return found
