"""Draws a picture plain and with merged tokens, from the same noise.

    python examples/generate.py "red apple"        # with the emoji model of this repository
    python examples/generate.py "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --ratio 0.75

`tomesd generate` does the same with sizes, several prompts, times and memory.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import tomesd

EMOJI_MODEL = Path(tomesd.__file__).parent / "emoji-model"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", help="what to draw, in quotes")
    parser.add_argument("--model", default=EMOJI_MODEL, help="folder or hub id of a diffusers pipeline")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of tokens to merge (0.5)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--out", type=Path, default=Path("plain-merged.png"), help="(plain-merged.png)")
    args = parser.parse_args(arguments)
    pipe = DiffusionPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")

    def draw() -> Image.Image:
        noise = torch.Generator().manual_seed(0)
        return pipe(args.prompt, num_inference_steps=args.steps, guidance_scale=3.0, generator=noise).images[
            0
        ]

    plain = draw()
    with tomesd.patched(pipe, ratio=args.ratio):
        merged = draw()

    both = Image.new("RGB", (plain.width * 2, plain.height))
    both.paste(plain, (0, 0))
    both.paste(merged, (plain.width, 0))
    both.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
