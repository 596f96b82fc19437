"""Tells what merges in each transformer block of a model, what that saves, and why a block is left alone.

    tomesd explain                                            the small model that comes with tomesd
    tomesd explain OWNER/MODEL --size 1024x768 --method sample-keys --ratio 0.75
    tomesd explain OWNER/MODEL --recipe recipe.json --json

FLOPs are those of a block for one image, estimated from the shapes of its layers; finding out what to merge
is not counted. With --auto it is measured here and now whether it pays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import tomesd

from . import common, options
from .common import Row, UserError, guarded
from .pipelines import (
    EMOJI,
    check_model,
    check_pipeline_size,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
)

PROGRAM = "tomesd explain"


def make_parser() -> argparse.ArgumentParser:
    parser = common.Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", type=find_model, default=EMOJI, help="folder or hub id (emoji)")
    parser.add_argument("--size", type=common.size, help="N or WxH in pixels (the model's own)")
    options.add_method(parser)
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def as_json(found: tomesd.Explanation) -> Row:
    rows = [
        vars(row) | {"method": None if row.method is None else row.method.to_dict()} for row in found.rows
    ]
    return {"height": found.height, "width": found.width, "saved": found.saved, "rows": rows}


def run(args: argparse.Namespace) -> int:
    options.method_asked(args, tell=True)
    check_model(args.model)
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device, pick_dtype("auto", device))
    check_pipeline_size(pipe, args.size)
    options.patch_as_asked(pipe, args)
    width, height = args.size or (None, None)
    try:
        found = tomesd.explain(pipe, height, width)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    print(json.dumps(as_json(found)) if args.json else found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(make_parser().parse_args(arguments)))
