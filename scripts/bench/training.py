"""Training with merging on: losses of a LoRA and of a whole fine-tune of the shipped model, beside plain.

    python scripts/bench training                   50 steps each, minutes on a core
    python scripts/bench training --seconds         seconds a step too; let nothing else run

The model learns its own pictures with their colours inverted. Weights, noise and timesteps are the same in
each way, through accelerate. *start* and *end* are means of the first and last fifth of losses, *unpatched*
is the loss of the trained weights with the patch taken off, on noise that training has not seen.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tomesd
from tomesd.commands.common import Parser, Row, aligned, guarded, need, new_file, positive, timed, write_csv
from tomesd.commands.pipelines import EMOJI_MODEL, load_pipeline

PROGRAM = "python scripts/bench training"
METHODS: dict[str, tomesd.Method | None] = {
    "plain": None,
    "Merge(0.5)": tomesd.Merge(0.5),
    "SampleKeys(0.5)": tomesd.SampleKeys(0.5),
    "MergeKeys(0.5)": tomesd.MergeKeys(0.5),
    "MergeStage(0.5)": tomesd.MergeStage(0.5),
}
PROMPTS = ["red apple", "cat", "rocket", "snowman"]
RATES = {"lora": 1e-3, "all weights": 1e-4}


class Task:
    """What is to be learned: latents, their prompts, and a batch and its noise for each step."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.scheduler = pipe.scheduler
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        call = dict(num_inference_steps=steps, guidance_scale=3.0, output_type="pt", generator=generators)
        with torch.no_grad():
            pictures = 1 - pipe(PROMPTS, **call).images  # inverted
            mean = pipe.vae.encode(2 * pictures - 1).latent_dist.mode()
            self.latents: Tensor = mean * pipe.vae.config.scaling_factor
            self.texts: Tensor = pipe.encode_prompt(PROMPTS, pipe.device, 1, False)[0]

    def loss(self, unet: nn.Module, seed: int, batch: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        which = torch.randint(0, len(self.latents), (batch,), generator=random)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (batch,), generator=random)
        noise = torch.randn(self.latents[which].shape, generator=random)
        noisy = self.scheduler.add_noise(self.latents[which], noise, t)
        wanted = self.scheduler.get_velocity(self.latents[which], noise, t)
        return F.mse_loss(unet(noisy, t, self.texts[which]).sample, wanted)


def trained(unet: nn.Module, task: Task, kind: str, method: str, args: Any) -> tuple[list[float], Row]:
    """The losses of all steps, and what they say."""
    accelerate = need("accelerate")
    torch.manual_seed(0)
    if kind == "lora":
        unet.requires_grad_(False)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(need("peft").LoraConfig(r=8, target_modules=layers, init_lora_weights="gaussian"))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    chosen = METHODS[method]
    if chosen is not None:
        tomesd.apply_patch(unet, chosen, args.max_downsample)
    accelerator = accelerate.Accelerator(cpu=True)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(weights, RATES[kind]))
    unet.train()
    losses, seconds = [], []

    def step(seed: int) -> float:
        loss = task.loss(unet, seed, args.batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for seed in range(args.steps):
        loss, took = timed(lambda: step(seed), "cpu")  # noqa: B023
        losses.append(loss)
        seconds.append(took)
    tomesd.remove_patch(unet)
    with torch.no_grad():
        seen = [float(task.loss(unet.eval(), 10_000 + seed, args.batch)) for seed in range(8)]
    share = max(1, args.steps // 5)
    row: Row = {
        "what": kind,
        "method": method,
        "start": statistics.mean(losses[:share]),
        "end": statistics.mean(losses[-share:]),
        "unpatched": statistics.mean(seen),
    }
    if args.seconds:
        row["seconds a step"] = statistics.median(seconds[1:])
    return losses, row


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--steps", type=positive, default=50, help="(50)")
    parser.add_argument("--batch", type=positive, default=4, help="(4)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD", help="(all)"
    )
    parser.add_argument("--max-downsample", type=int, default=2, choices=(1, 2, 4, 8), help="(2)")
    parser.add_argument("--seconds", action="store_true", help="print seconds a step as well")
    parser.add_argument("--csv", type=new_file, help="write all losses there, a line for each step")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(str(EMOJI_MODEL), torch.device("cpu"), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    task, rows, curves = Task(pipe, 10), [], []
    for kind in RATES:
        for method in args.methods:
            losses, row = trained(copy.deepcopy(pipe.unet), task, kind, method, args)
            rows.append(row)
            curves += [{"what": kind, "method": method, "step": i, "loss": x} for i, x in enumerate(losses)]
            print(f"{kind}, {method}: {row['start']:.4f} to {row['end']:.4f}", file=sys.stderr, flush=True)
    lines = [list(rows[0])]
    lines += [[x if isinstance(x, str) else f"{x:.4f}" for x in row.values()] for row in rows]
    print(aligned(lines))
    if args.csv:
        write_csv(curves, args.csv)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
