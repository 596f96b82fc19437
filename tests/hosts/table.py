"""The table in docs/composition.md as data: what people put on a UNet, and which methods go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import features as on
import test_pipelines
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tomesd

METHODS = (tomesd.Merge(), tomesd.SampleKeys(), tomesd.MergeKeys(), tomesd.MergeStage())

# What a cell of the table may say.
YES = "yes"
NO = "no"  # and an error says so
WARNED = "no, warned"  # a warning says so, as it cannot be known; then the picture is wrong, or a host fails
EXPECTED = "expected"  # from reading code; nothing here can run it
UNUSED = "unused"  # the method works, and the feature has no effect


@dataclass(frozen=True, eq=False)
class Row:
    """What people put on a UNet, and whether each method of `METHODS` goes with it.

    Args:
        name: as the table has it.
        put: puts it on a network; None where the tests that are named in `tests` try it.
        cells: one for each method, or one for all.
        says: what the error of a `NO` says, or the warning of a `WARNED`.
        same: whether it leaves the numbers as they are, but for rounding.
        bare: the options that methods do without there: `"prop_attn"`, `"probes"`.
        pixart: whether it is tried on PixArt, as it does not fit UNets.
        tests: tests elsewhere that try it, as `file::test`.
        note: what else the table says.
    """

    name: str
    put: Callable[[Any], Any] | None = None
    cells: tuple[str, ...] = (YES,)
    says: str = ""
    same: bool = False
    bare: tuple[str, ...] = ()
    pixart: bool = False
    tests: tuple[str, ...] = ()
    note: str = ""

    def cell(self, method: tomesd.Method) -> str:
        return self.cells[METHODS.index(method) % len(self.cells)]

    @property
    def line(self) -> str:
        """Its line in the table."""
        return f"| {self.name} | {' | '.join(map(self.cell, METHODS))} | {self.note} |"


LAWS, PIPES, CALLERS = "laws/test_laws.py::", "hosts/test_pipelines.py::", "hosts/test_callers.py::"
COMPILED = (
    LAWS + "test_compiles_to_one_graph_and_not_again_from_call_to_call",
    PIPES + "test_a_denoising_loop_compiles_once",
)
ROWS = (
    Row("`torch.compile(unet)`, `unet.compile()`, `fullgraph=True`", tests=COMPILED),
    Row("regional: `compile_repeated_blocks`", tests=COMPILED[1:]),
    Row(
        '`mode="reduce-overhead"`, `mode="max-autotune"`',
        cells=(EXPECTED,),
        note="the programs are the same ones; no GPU has run them here",
    ),
    Row("`channels_last`", lambda net: net.to(memory_format=torch.channels_last), same=True),
    Row("LoRA", on.lora),
    Row("LoRA, fused", on.fused_lora),
    Row("LoRA, fused and unloaded", on.kept_lora),
    Row("LoRA, two with weights", on.two_loras),
    Row("LoRA, hot-swapped", on.swapped_lora),
    Row("LoRA, unloaded", on.unloaded_lora, same=True),
    Row("DeepCache 0.1.1", on.deepcache, note="see below"),
    Row(
        "T-GATE 1.0.0",
        on.tgate,
        (NO, YES, YES, NO),
        "T-GATE|cached|another step",
        bare=("probes",),
        note="it keeps attention's output, which is of merged tokens; its probes are of another sample",
    ),
    Row("guidance off from a step on", tests=("hosts/test_composition.py::test_guidance_may_end_early",)),
    Row(
        "Pyramid Attention Broadcast, self-attention",
        on.broadcast(spatial_attention_block_skip_range=2),
        (NO, YES, YES, NO),
        "cached by diffusers' pyramid_attention_broadcast",
        bare=("probes",),
        note="by `apply_pyramid_attention_broadcast`: UNets have no `enable_cache`",
    ),
    Row(
        "Pyramid Attention Broadcast, cross-attention",
        on.broadcast(cross_attention_block_skip_range=2),
        (YES, YES, YES, NO),
        "cached by diffusers' pyramid_attention_broadcast",
    ),
    Row(
        "TaylorSeer, self-attention",
        on.taylor(r".*attn1"),
        (NO, YES, YES, NO),
        "cached by diffusers' taylorseer_cache",
        bare=("probes",),
        note="by `cache_identifiers`; what it finds by itself are no UNets",
    ),
    Row(
        "TaylorSeer, blocks",
        on.taylor(r".*transformer_blocks\.\d+"),
        (YES, YES, YES, NO),
        "taylorseer_cache",
        note="what it keeps of a stage is merged tokens of another step",
    ),
    Row(
        "TaylorSeer, feed-forward",
        on.taylor(r".*\.ff"),
        (YES, YES, YES, NO),
        "taylorseer_cache",
        note='the same for `Merge` with `"mlp"` in its parts',
    ),
    Row(
        "First Block Cache (PixArt)",
        on.first_block_cache,
        (YES, YES, YES, NO),
        "fbc",
        pixart=True,
        note="does not fit UNets: it looks for one list of blocks",
    ),
    Row(
        "MagCache (PixArt)",
        on.mag_cache,
        (YES, YES, YES, NO),
        "mag_cache",
        pixart=True,
        note="does nothing on UNets",
    ),
    Row(
        "FasterCache (PixArt)",
        on.faster_cache,
        (NO, YES, YES, NO),
        "cached by diffusers' faster_cache_block",
        pixart=True,
        bare=("probes",),
        note="fails on UNets by itself; steps that it runs on one half of guidance are left plain",
    ),
    Row(
        "`set_attention_backend`, `attention_backend`",
        on.around(lambda: attention_backend("_native_math")),
        same=True,
        note="attention of UNets does not ask for it",
    ),
    Row(
        "`sdpa_kernel`",
        on.around(lambda: sdpa_kernel(SDPBackend.MATH)),
        same=True,
        note="flash attention of a GPU takes no bias: there `prop_attn=False`, or `SampleKeys`",
    ),
    Row("sliced attention", lambda net: net.set_attention_slice(1), same=True),
    Row(
        "`set_attn_processor`, one of diffusers' plain ones",
        lambda net: net.set_attn_processor(AttnProcessor()),
        same=True,
    ),
    Row(
        "`set_attn_processor`, one of your own",
        lambda net: net.set_attn_processor(on.Unknown()),
        (YES, YES, NO, YES),
        "processor Unknown, of which it is not known",
        same=True,
        bare=("prop_attn", "probes"),
        note="without sizes and probes, as nobody knows what it does with them; `Merge` and `MergeStage` "
        "warn, as it may need all tokens or their places",
        tests=(CALLERS + "test_cross_frame_attention_stays_that",),
    ),
    Row(
        "`fuse_qkv_projections`",
        lambda net: net.fuse_qkv_projections(),
        (YES, NO, NO, YES),
        "computes queries, keys and values in one layer",
        same=True,
    ),
    Row(
        "xformers",
        lambda net: net.set_attn_processor(XFormersAttnProcessor()),
        same=True,
        bare=("prop_attn",),
        note="real processor, stand-in for its kernel; `MergeKeys` alone gives it a bias",
        tests=(PIPES + "test_xformers_processor",),
    ),
    Row(
        "SageAttention",
        cells=(EXPECTED,),
        note="in place of PyTorch's attention it leaves a bias out: `MergeKeys` loses its sizes, `Merge` is "
        "as with `prop_attn=False`, `SampleKeys` needs none",
        tests=("hosts/test_composition.py::test_what_needs_no_bias_gives_none",),
    ),
    Row(
        "hooks of yours on attention",
        cells=(YES, YES, YES, WARNED),
        note="they are given all tokens, and may change them, but for code of torch.compile",
        tests=(
            CALLERS + "test_hooks_of_others_on_attention_act_as_without_a_patch",
            CALLERS + "test_hooks_of_others_that_are_given_merged_tokens_are_named",
        ),
    ),
    Row(
        "hooks of yours on its layers",
        cells=(WARNED, YES, YES, WARNED),
        note="keys and values are fewer; without probes",
        tests=(CALLERS + "test_probes_are_not_where_others_watch_the_layers_of_attention",),
    ),
    Row("FreeU", lambda net: net.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    Row("feed-forward chunking", lambda net: test_pipelines.chunk_feed_forward(net, 4), same=True),
    Row("IP-Adapter", tests=("hosts/test_composition.py::test_ip_adapter",)),
    Row(
        "IP-Adapter with masks",
        cells=(YES, YES, YES, NO),
        note="masks are of all tokens",
        tests=("hosts/test_composition.py::test_ip_adapter",),
    ),
    Row("ControlNet Union", tests=("hosts/test_composition.py::test_controlnet_union",)),
    Row("model offload", lambda net: accelerate.cpu_offload_with_hook(net, "cpu") and None, same=True),
    Row(
        "sequential offload",
        lambda net: accelerate.cpu_offload(net, "cpu", offload_buffers=True) and None,
        same=True,
    ),
    Row("group offload", on.group_offload, same=True),
    Row(
        "layerwise casting, float8",
        lambda net: net.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ),
    Row("torchao, int8 weights", on.quantized),
    Row("bitsandbytes, int8", on.bitsandbytes("int8")),
    Row("bitsandbytes, nf4", on.bitsandbytes("nf4")),
    Row("`torch.inference_mode`", on.around(torch.inference_mode), same=True),
    Row(
        "training after `no_grad` or `inference_mode`",
        tests=("hosts/test_composition.py::test_training_after_inference",),
    ),
    Row(
        "`accelerator.prepare`", lambda net: accelerate.Accelerator(cpu=True).prepare(net) and None, same=True
    ),
    Row(
        "several pipelines, threads",
        tests=(
            "test_patch.py::test_pipelines_in_threads_of_their_own",
            LAWS + "test_threads_on_one_model_do_not_meet",
        ),
    ),
    Row("`deepcopy`, `pickle`, `torch.save`", tests=(LAWS + "test_copies_are_patched_and_can_be_restored",)),
    Row(
        "HyperTile around attention's forward",
        on.tiled,
        (WARNED, UNUSED, UNUSED, WARNED),
        "attn1 has a forward that somebody has put on it",
        bare=("probes",),
        note="it needs all tokens of an image. With fewer keys attention is of the whole image again, and "
        "HyperTile does nothing",
    ),
)
