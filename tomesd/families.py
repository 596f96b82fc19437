"""One row of data for each model family: what its classes are called and where they stand.

Classes are recognised by name along the MRO, so nothing third-party is imported to know a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .hooks import is_named


@dataclass(frozen=True)
class Family:
    """Where a family of networks keeps its transformer blocks.

    Args:
        name: what people call it.
        networks: classes of the whole network, whose forward takes the sample and the timestep.
        timestep: the parameter of the network's forward that is the timestep.
        text: the one that is the embedding of the prompt.
        stages: attributes of the network that hold its parts, in the order of the forward pass.
        containers: classes that take an image `[B, C, h, w]` and run blocks on its `h * w` tokens.
        image: the parameter of a container's forward that is this image.
        carrier: the parameter of containers and blocks, if any, that is a dict of arguments for `attn1` and
            `attn2`.
        blocks: classes of a block with `norm1`, `attn1`, `attn2` and `ff`.
        tokens: the parameter of a block's forward that is the tokens.
        keys: the parameter of attention's forward that keys and values come from, where it is not the tokens.
        bias: the one, if any, that is added to the logits of its keys.
        down: classes that halve the resolution at the end of the part that they stand in.
        up: classes that double it there.
    """

    name: str
    networks: tuple[str, ...]
    timestep: str
    text: str
    stages: tuple[str, ...]
    containers: tuple[str, ...]
    image: str
    carrier: str | None
    blocks: tuple[str, ...]
    tokens: str
    keys: str
    bias: str | None
    down: tuple[str, ...]
    up: tuple[str, ...]


FAMILIES = (
    Family(
        name="diffusers UNet",
        networks=(
            "UNet2DConditionModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "ControlNetModel",
            "ControlNetUnionModel",
        ),
        timestep="timestep",
        text="encoder_hidden_states",
        stages=("down_blocks", "mid_block", "up_blocks"),
        containers=("Transformer2DModel",),
        image="hidden_states",
        carrier="cross_attention_kwargs",
        blocks=("BasicTransformerBlock",),
        tokens="hidden_states",
        keys="encoder_hidden_states",
        bias="attention_mask",
        down=("Downsample2D",),
        up=("Upsample2D",),
    ),
    Family(
        name="CompVis LDM",
        networks=("UNetModel",),
        timestep="timesteps",
        text="context",
        stages=("input_blocks", "middle_block", "output_blocks"),
        containers=("SpatialTransformer",),
        image="x",
        carrier=None,
        blocks=("BasicTransformerBlock",),
        tokens="x",
        keys="context",
        bias=None,
        down=("Downsample",),
        up=("Upsample",),
    ),
)


@dataclass(frozen=True)
class Site:
    """A transformer block of a network, and the level of resolution at which it stands.

    Args:
        name: its path in the network.
        block: the block.
        container: the module whose input is the image of the block's tokens.
        level: how often the resolution was halved before it.
    """

    name: str
    block: nn.Module
    container: nn.Module
    level: int

    @property
    def downsample(self) -> int:
        """How many times smaller its image is than the network's input."""
        return 2**self.level


def find_networks(model: object) -> list[tuple[str, nn.Module, Family]]:
    """Every network of a known family in a pipeline, a module or a wrapper of one: path, network, row.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: it holds no network of a known family.
    """
    if isinstance(model, type):
        raise TypeError(
            f"expected a pipeline or a torch module, got the class {model.__name__}: make one first"
        )
    if not isinstance(model, nn.Module) and not hasattr(model, "__dict__"):
        given = repr(model) if isinstance(model, (str, int, float, type(None))) else "one"
        raise TypeError(f"expected a pipeline or a torch module, got {given} ({type(model).__name__})")
    found: dict[int, tuple[str, nn.Module, Family]] = {}
    parts = list(_parts(model))
    for prefix, part in parts:
        for name, module in part.named_modules(prefix=prefix):
            family = next((row for row in FAMILIES if is_named(module, row.networks)), None)
            if family is not None:
                found.setdefault(id(module), (name, module, family))
    if not found:
        known = "; ".join(f"{family.name} ({', '.join(family.networks)})" for family in FAMILIES)
        seen = f" (it has {', '.join(type(part).__name__ for _, part in parts)})" if len(parts) > 1 else ""
        raise ValueError(
            f"{type(model).__name__} holds no network that tomesd knows{seen}. Known are {known}; for vision "
            "transformers there is tomesd.vit.apply_patch"
        )
    return list(found.values())


def find_sites(network: nn.Module, family: Family) -> Iterator[Site]:
    """The transformer blocks of a network, in the order of its forward pass."""
    level = 0
    for stage in family.stages:
        part = getattr(network, stage, None)
        children = [(stage, part)]
        if isinstance(part, nn.ModuleList):
            children = [(f"{stage}.{name}", child) for name, child in part.named_children()]
        for path, child in children:
            if child is None:
                continue
            modules = list(child.named_modules(prefix=path))
            for name, container in modules:
                if is_named(container, family.containers):
                    for place, block in container.named_modules(prefix=name):
                        if is_named(block, family.blocks):
                            yield Site(place, block, container, level)
            level += any(is_named(module, family.down) for _, module in modules)
            level -= any(is_named(module, family.up) for _, module in modules)


def _parts(model: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield "", model
        return
    # A diffusers pipeline keeps its networks as attributes; MultiControlNet may be a plain list of them.
    for name, value in vars(model).items():
        for i, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(part, nn.Module):
                yield (f"{name}.{i}" if part is not value else name), part
