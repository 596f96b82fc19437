"""Caching times tokens: what DeepCache and an early end of guidance save and cost, alone and beside tomesd.

    python scripts/bench caching                    error and operations: minutes on a core
    python scripts/bench caching --rounds 5         seconds too; let nothing else run

Every cache by every method, the same noise in each: TFLOPs of all calls of the UNet for a picture and how
many times fewer they are than plain's, PSNR to the plain picture (median), and the relative error of the
last latents. DeepCache is its package from PyPI: it keeps what upsampling blocks get from below for some
steps. Guidance ends after a share of the steps.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import peers
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tomesd
from tomesd.commands import metrics
from tomesd.commands.common import (
    Parser,
    Row,
    aligned,
    from_zero,
    guarded,
    guidance,
    new_file,
    positive,
    reason,
    timed,
    write_csv,
)
from tomesd.commands.pipelines import EMOJI_MODEL, SHORT, load_pipeline, pick_device, pick_dtype

PROGRAM = "python scripts/bench caching"
# Every how many steps DeepCache computes all, or after which share of the steps guidance ends.
CACHES = {
    "none": None,
    "deepcache 2": 2,
    "deepcache 3": 3,
    "deepcache 5": 5,
    "guidance to 0.5": 0.5,
}
METHODS: dict[str, tomesd.Method | None] = {
    "plain": None,
    "Merge(0.5)": tomesd.Merge(0.5),
    "SampleKeys(0.5)": tomesd.SampleKeys(0.5),
    "SampleKeys(0.75)": tomesd.SampleKeys(0.75),
    "MergeKeys(0.75)": tomesd.MergeKeys(0.75),
    "MergeStage(0.5)": tomesd.MergeStage(0.5),
}
FORMATS = {"tflops": ".3f", "fewer": ".2f", "psnr": ".1f", "error": ".4f", "seconds": ".3f", "faster": ".2f"}


class Attended(TorchFunctionMode):
    """Counts the FLOPs of fused attention, of which FlopCounterMode knows GPUs' kernels only."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return function(*args, **(kwargs or {}))


def flops_of(network: torch.nn.Module, draw: Callable[[], object]) -> int:
    """FLOPs of all calls of a network while a picture is drawn."""
    attended, counter = Attended(), FlopCounterMode(display=False)
    forward, own = network.forward, dict(vars(network))

    def counted(*args: Any, **kwargs: Any) -> Any:
        with attended, counter:
            return forward(*args, **kwargs)

    network.forward = counted
    try:
        draw()
    finally:
        del network.forward
        vars(network).update(own)
    others = counter.get_flop_counts()["Global"]
    return attended.flops + sum(n for kind, n in others.items() if "attention" not in str(kind))


@contextmanager
def cached(pipe: Any, kind: int | float | None, steps: int) -> Iterator[dict[str, Any]]:
    """Puts a cache on a pipeline; gives what its call is to be given."""
    if isinstance(kind, int):
        helper = peers.load("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=kind, cache_branch_id=0)
        helper.enable()
        try:
            yield {}
        finally:
            helper.disable()
    elif kind is None:
        yield {}
    else:
        last = round(kind * steps) - 1

        def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step != last:
                return {}
            pipe._guidance_scale = 0.0
            embeds = tensors["prompt_embeds"]
            return {"prompt_embeds": embeds[len(embeds) // 2 :]}

        yield {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


def drawn(pipe: Any, prompts: list[str], args: Any, **options: Any) -> torch.Tensor:
    """The latents of each prompt, from noise of its own."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    call = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, output_type="latent")
    latents: torch.Tensor = pipe(prompts, generator=generators, **call, **options).images
    return latents


def decoded(pipe: Any, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        pictures = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    scaled = (pictures.float().permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().byte().cpu().numpy()


def measured(pipe: Any, prompts: list[str], cache: str, method: str, args: Any) -> tuple[Row, torch.Tensor]:
    """The figures of a cache beside a method, and the latents that it draws."""
    chosen = METHODS[method]
    if chosen is not None:
        tomesd.apply_patch(pipe, chosen, args.max_downsample)
    try:
        # Each of these starts a cache anew.
        with cached(pipe, CACHES[cache], args.steps) as options:
            latents = drawn(pipe, prompts, args, **options)
        with cached(pipe, CACHES[cache], args.steps) as options:
            flops = flops_of(pipe.unet, lambda: drawn(pipe, prompts[:1], args, **options))
        row: Row = {"cache": cache, "method": method, "tflops": flops / 1e12}
        seconds = []
        for _ in range(args.rounds):
            with cached(pipe, CACHES[cache], args.steps) as options:
                seconds.append(timed(lambda: drawn(pipe, prompts, args, **options), pipe.device)[1])
        if seconds:
            row["seconds"] = statistics.median(seconds) / len(prompts)
        return row, latents
    finally:
        tomesd.remove_patch(pipe)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--model", default=str(EMOJI_MODEL), help="a pipeline of diffusers (the shipped one)")
    parser.add_argument("--prompts", nargs="+", help="(8 of the shipped model's names)")
    parser.add_argument("--steps", type=positive, default=20, help="(20)")
    parser.add_argument("--guidance", type=guidance, default=3.0, help="(3.0)")
    parser.add_argument("--max-downsample", type=int, default=2, choices=(1, 2, 4, 8), help="(2)")
    parser.add_argument("--rounds", type=from_zero, default=0, help="how often each is timed (0: never)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", *SHORT))
    parser.add_argument("--csv", type=new_file, help="write all figures there")
    args = parser.parse_args(arguments)
    names = [names[0] for names in metrics.read_names(EMOJI_MODEL)]
    prompts = args.prompts or names[:: len(names) // 8][:8]
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device, pick_dtype(args.dtype, device))
    pipe.set_progress_bar_config(disable=True)
    rows: list[Row] = []
    plain: Any = None
    for cache in CACHES:
        for method in METHODS:
            try:
                row, latents = measured(pipe, prompts, cache, method, args)
            except Exception as error:
                print(f"{cache}, {method}: {reason(error)}", file=sys.stderr)
                if plain is None:
                    raise
                continue
            if plain is None:
                plain = latents, decoded(pipe, latents), row
            apart = (latents - plain[0]).flatten(1).float().norm(dim=1)
            row["error"] = float((apart / plain[0].flatten(1).float().norm(dim=1)).median())
            row["psnr"] = float(np.median(metrics.psnr(decoded(pipe, latents), plain[1])))
            row["fewer"] = plain[2]["tflops"] / row["tflops"]
            if "seconds" in row:
                row["faster"] = plain[2]["seconds"] / row["seconds"]
            rows.append(row)
            print(
                f"{cache}, {method}: {row['fewer']:.2f}x, {row['psnr']:.1f} dB", file=sys.stderr, flush=True
            )
    shown = [name for name in FORMATS if name in rows[0]]
    lines = [["cache", "method", *shown]]
    lines += [
        [row["cache"], row["method"], *(format(row[name], FORMATS[name]) for name in shown)] for row in rows
    ]
    print(aligned(lines))
    if args.csv:
        write_csv(rows, args.csv)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
