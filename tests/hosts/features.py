"""What people put on a UNet, as functions of the network, and networks and steps to try it on.

A network stands for a pipeline where that is all that is asked of it.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers as D
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

TIMES = [500, 460, 420]
NOW = [0]
SIDE = 16


def network(pixart: bool) -> torch.nn.Module:
    """One whose attention matters more than that of fresh weights."""
    made = tiny.pixart() if pixart else tiny.small_unet()
    for name, attn in made.named_modules():
        if name.endswith(("attn1", "attn2")):
            for layer, factor in ((attn.to_q, 2.5), (attn.to_k, 2.5), (attn.to_v, 2), (attn.to_out[0], 2)):
                layer.weight.data *= factor
    return made


def steps(model: torch.nn.Module, pixart: bool) -> list[torch.Tensor]:
    """The steps of a loop, with latents that move on."""
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()  # as pipelines do
    random = torch.Generator().manual_seed(1)
    size = 2 * SIDE if pixart else SIDE
    start = F.interpolate(torch.randn(2, 4, 4, 4, generator=random), size=(size, size), mode="bicubic")
    text = torch.randn(2, 7, tiny.TEXT, generator=random)
    found = []
    for NOW[0] in TIMES:
        x = start + 0.3 * torch.randn(start.shape, generator=random)
        t = torch.tensor(NOW[0])
        call = dict(hidden_states=x, encoder_hidden_states=text, timestep=t.expand(2))
        found.append((model(**call) if pixart else model(x, t, text)).sample)
    return found


def around(context: Callable[[], Any]) -> Callable[[torch.nn.Module], None]:
    """Calls a network inside of a context."""

    def on(model: torch.nn.Module) -> None:
        def forward(*args, original=model.forward, **kwargs):
            with context():
                return original(*args, **kwargs)

        model.forward = forward

    return on


LORA = LoraConfig(
    r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], init_lora_weights=False
)


@cache
def lora_weights(seed: int) -> dict[str, torch.Tensor]:
    donor = tiny.small_unet()
    torch.manual_seed(seed)
    donor.add_adapter(LORA, "x")
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor, adapter_name="x"))
    return {f"unet.{key}": value for key, value in state.items()}


def lora(model: torch.nn.Module, name: str = "a", seed: int = 1, **options: Any) -> None:
    model.load_lora_adapter(dict(lora_weights(seed)), "unet", adapter_name=name, **options)


def fused_lora(model):
    lora(model)
    model.fuse_lora()


def kept_lora(model):
    fused_lora(model)
    model.unload_lora()


def two_loras(model):
    lora(model)
    lora(model, "b", 2)
    model.set_adapters(["a", "b"], [0.7, 0.4])


def swapped_lora(model):
    lora(model, seed=2)
    steps(model, False)
    lora(model, hotswap=True)


def unloaded_lora(model):
    lora(model)
    model.unload_lora()


def deepcache(model):
    helper = tiny.peer("DeepCache").DeepCacheSDHelper(
        pipe=SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=TIMES))
    )
    helper.set_params(cache_interval=2, cache_branch_id=1)
    helper.enable()


def tgate(model):
    """What T-GATE does to attention: it keeps its output in one step and gives it back in the next."""
    tiny.peer("tgate")
    from tgate.tgate_utils import register_forward

    def forward(*args, original=model.forward, **kwargs):
        first = TIMES.index(NOW[0]) % 2 == 0
        keep = {"cache": first, "reuse": not first}
        register_forward(model, "Attention", keep_shape=True, ca_kward=keep, sa_kward=keep)
        return original(*args, **kwargs)

    model.forward = forward


def broadcast(**ranges: int) -> Callable[[torch.nn.Module], None]:
    ranges |= {name.replace("block", "timestep"): (-1, 1001) for name in ranges}
    return lambda model: D.apply_pyramid_attention_broadcast(
        model, D.PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: NOW[0])
    )


def in_context(model):
    """As pipelines of transformers call them."""
    HookRegistry.check_if_exists_or_initialize(model)
    model.register_forward_pre_hook(lambda *_: _set_cache_context(model, CacheContext("all")))


def taylor(pattern: str) -> Callable[[torch.nn.Module], None]:
    def on(model):
        config = D.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=1,
            max_order=0,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[pattern],
        )
        D.hooks.apply_taylorseer_cache(model, config)
        in_context(model)

    return on


def first_block_cache(model):
    D.hooks.apply_first_block_cache(model, D.FirstBlockCacheConfig(threshold=0.5))
    in_context(model)


def mag_cache(model):
    ratios = torch.full((3,), 0.99)
    config = D.MagCacheConfig(threshold=0.5, num_inference_steps=3, mag_ratios=ratios, retention_ratio=0.2)
    D.hooks.apply_mag_cache(model, config)
    in_context(model)


def faster_cache(model):
    config = D.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
        current_timestep_callback=lambda: NOW[0],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        D.apply_faster_cache(model, config)


def tiled(model):
    """As HyperTile does: attention's forward is wrapped by one that cuts the image into tiles."""
    for name, attn in model.named_modules():
        if not name.endswith("attn1") or "mid_block" in name:
            continue

        def forward(hidden_states, *args, original=attn.forward, **kwargs):
            b, n, c = hidden_states.shape
            tiles = hidden_states.view(b, 2, 8, 2, 8, c).transpose(2, 3).reshape(4 * b, 64, c)
            done = original(tiles, *args, **kwargs)
            return done.view(b, 2, 2, 8, 8, c).transpose(2, 3).reshape(b, n, c)

        attn.forward = forward


class Unknown(AttnProcessor2_0):
    """A processor of which tomesd knows nothing."""


def quantized(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bitsandbytes(kind: str) -> Callable[[torch.nn.Module], None]:
    def on(model):
        nn = pytest.importorskip("bitsandbytes").nn
        for module in [module for name, module in model.named_modules() if name.endswith(("attn1", "attn2"))]:
            for name in ("to_q", "to_k", "to_v"):
                old = getattr(module, name)
                size = old.in_features, old.out_features
                new = (
                    nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                    if kind == "int8"
                    else nn.Linear4bit(*size, bias=False, quant_type="nf4")
                )
                new.load_state_dict(old.state_dict(), strict=False)
                setattr(module, name, new.to("cpu"))

    return on


def group_offload(model):
    """Onto disk, as on a CPU there is nowhere else to go."""
    model.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=tempfile.mkdtemp()
    )
