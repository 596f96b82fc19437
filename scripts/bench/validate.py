"""Accuracy and speed of a vision transformer on a folder of pictures, plain and with merging.

    python scripts/bench validate --data imagenet/val --model vit_base_patch16_224 --r 0 8 13 --ways ours ToMe
    accelerate launch scripts/bench validate --data imagenet/val --model google/vit-base-patch16-224

The folder holds one folder for each class; sorted by name they are in the order of the model's classes, as
ImageNet's synsets are. A model is one of timm by its name there, or, where its name has a slash, one of
transformers from the hub or a local folder. With `accelerate launch` each GPU takes its share of pictures,
and speed is that of all together, the loading of pictures included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from accelerate import Accelerator
from eval_vit import WAYS, known_setting, merging, parse_setting
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from tomesd.commands.common import Parser, UserError, from_zero, guarded, positive

PROGRAM = "python scripts/bench validate"


def load(name: str, pretrained: bool) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """The model, and what turns a PIL picture into its input."""
    if "/" in name:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

        if pretrained:
            model = AutoModelForImageClassification.from_pretrained(name)
        else:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))
        processor = AutoImageProcessor.from_pretrained(name)
        return model, lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(name, pretrained=pretrained)
    return model, create_transform(**resolve_model_data_config(model), is_training=False)


@torch.inference_mode()
def validate(
    model: nn.Module, loader: DataLoader, what: str, accelerator: Accelerator
) -> tuple[Tensor, float]:
    """Top-1 and top-5 accuracy in per cent, and pictures per second."""
    hits = []
    begin = time.perf_counter()
    for pictures, classes in tqdm(loader, desc=what, disable=not accelerator.is_local_main_process):
        output = model(pictures)
        logits = output if isinstance(output, Tensor) else output.logits
        guesses = logits.topk(min(5, logits.shape[1])).indices
        hit = guesses == classes[:, None]
        # Pictures that fill up the last batch of several processes are left out again.
        hits.append(accelerator.gather_for_metrics(torch.stack([hit[:, 0], hit.any(1)], dim=1)).cpu())
    every = torch.cat(hits).float()
    return 100 * every.mean(0), len(every) / (time.perf_counter() - begin)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--data", required=True, help="folder with one folder of pictures for each class")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--r",
        type=known_setting,
        nargs="+",
        default=["0", "8"],
        help="8, 8:-1 (inflection), 8,8,4 (layers), or a file of tome.Schedule",
    )
    parser.add_argument("--ways", nargs="+", default=["ours"], choices=list(WAYS), help="as of eval-vit")
    parser.add_argument("--batch-size", type=positive, default=64, help="of each process")
    parser.add_argument("--workers", type=from_zero, default=4)
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    args = parser.parse_args(arguments)

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    try:
        data = ImageFolder(args.data)  # which opens pictures as RGB
    except FileNotFoundError as error:
        raise UserError(f"argument --data: {error}") from None
    model, data.transform = load(args.model, args.pretrained)
    loader = DataLoader(data, args.batch_size, num_workers=args.workers, pin_memory=torch.cuda.is_available())
    model, loader = accelerator.prepare(model.eval(), loader)
    accelerator.print(f"{args.model}: {len(data)} pictures of {len(data.classes)} classes")
    bare = accelerator.unwrap_model(model)
    for way, text in product(args.ways, args.r):
        r = parse_setting(text)
        plain = r == 0
        if plain and way != args.ways[0]:
            continue
        name = "plain" if plain else f"{way}, r = {text}"
        with nullcontext() if plain else merging(bare, way, r):
            (top1, top5), speed = validate(model, loader, name, accelerator)
        accelerator.print(
            f"{name:>18}  top-1 {top1:.2f}  top-5 {top5:.2f}  {speed:.1f} pictures/s", flush=True
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
