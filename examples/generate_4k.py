"""Draws a picture of 3840 x 2176 pixels: at the model's own size, then upscaled and refined by img2img.

    python examples/generate_4k.py "a harbour at sunrise"
    python examples/generate_4k.py "red apple" --model tomesd/emoji-model --size 256 128

Nearly all of the time goes into refining. There every token looks at a sixteenth of them, at the two finest
levels with attention. `tomesd generate-4k` takes SDXL too, and measures time and memory.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image, ImageOps

import tomesd


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", help="what to draw, in quotes")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--size", type=int, nargs=2, default=(3840, 2176), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (50)")
    parser.add_argument("--strength", type=float, default=0.4, help="share of the steps that refine (0.4)")
    parser.add_argument("--out", type=Path, default=Path("4k.png"), help="(4k.png)")
    args = parser.parse_args(arguments)

    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.to("cuda" if cuda else "cpu", torch.float16 if cuda else torch.float32)
    pipe.vae.enable_tiling()  # at once, it would need tens of gigabytes for a picture of this size
    refine = AutoPipelineForImage2Image.from_pipe(pipe)

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


if __name__ == "__main__":
    main()
