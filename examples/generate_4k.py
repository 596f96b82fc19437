"""Draws a picture of 3840 x 2176 pixels: at the model's own size, then upscaled and refined by img2img.

    python examples/generate_4k.py "a harbour at sunrise"
    python examples/generate_4k.py "red apple" --model emoji --size 256 128

Nearly all of the time goes into refining. There every token looks at a sixteenth of them, at the two finest
levels with attention. `tomesd generate-4k` takes SDXL too, and measures time and memory.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image, ImageOps

import tomesd
from tomesd.commands.common import Parser, guarded, need, positive, ratio, refusals
from tomesd.commands.pipelines import find_model, load_pipeline, pick_device, pick_dtype
from tomesd.commands.plot import new_picture

PROGRAM = "examples/generate_4k.py"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("prompt", help="what to draw, in quotes")
    parser.add_argument("--model", type=find_model, default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--size", type=positive, nargs=2, default=(3840, 2176), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=positive, default=50, help="denoising steps (50)")
    parser.add_argument("--strength", type=ratio, default=0.4, help="share of the steps that refine (0.4)")
    parser.add_argument("--out", type=new_picture, default="4k.png", help="(4k.png)")
    args = parser.parse_args(arguments)

    device = pick_device("auto")
    pipe = load_pipeline(args.model, device, pick_dtype("auto", device))
    pipe.vae.enable_tiling()  # at once, it would need tens of gigabytes for a picture of this size
    refine = need("diffusers").AutoPipelineForImage2Image.from_pipe(pipe)

    with refusals():
        base = pipe(args.prompt, num_inference_steps=args.steps, generator=torch.manual_seed(0)).images[0]
        large = ImageOps.fit(base, tuple(args.size), method=Image.Resampling.LANCZOS)
        with tomesd.patched(refine, tomesd.SampleKeys(0.75), max_downsample=2):
            picture = refine(
                args.prompt,
                image=large,
                strength=args.strength,
                num_inference_steps=args.steps,
                generator=torch.manual_seed(0),
            ).images[0]
        picture.save(args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROGRAM, main))
