"""Draws a picture plain and with merged tokens, from the same noise.

    python examples/generate.py "red apple"        # with the small model that comes with tomesd
    python examples/generate.py "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --ratio 0.75

`tomesd generate` does the same with sizes, several prompts, times and memory.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

import tomesd
from tomesd.commands.common import Parser, guarded, positive, ratio, refusals
from tomesd.commands.pipelines import EMOJI, find_model, load_pipeline, pick_device, pick_dtype
from tomesd.commands.plot import new_picture

PROGRAM = "examples/generate.py"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("prompt", help="what to draw, in quotes")
    parser.add_argument("--model", type=find_model, default=EMOJI, help="folder or hub id (emoji)")
    parser.add_argument("--ratio", type=ratio, default=0.5, help="share of tokens to merge (0.5)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--out", type=new_picture, default="plain-merged.png", help="(plain-merged.png)")
    args = parser.parse_args(arguments)
    device = pick_device("auto")
    pipe = load_pipeline(args.model, device, pick_dtype("auto", device))

    def draw() -> Image.Image:
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
        return pipe(args.prompt, generator=noise, **options).images[0]

    with refusals():
        plain = draw()
        with tomesd.patched(pipe, ratio=args.ratio):
            merged = draw()

        both = Image.new("RGB", (plain.width * 2, plain.height))
        both.paste(plain, (0, 0))
        both.paste(merged, (plain.width, 0))
        both.save(args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROGRAM, main))
