"""A page in the browser: draw plain and merged, compare them, see what merged.

    tomesd app                                     # the small emoji model that comes with tomesd
    tomesd app --model stable-diffusion-v1-5/stable-diffusion-v1-5 --port 8000

The page is for this machine alone unless `--host 0.0.0.0` shows it to the network, or `--share` to everybody
who has the address that is then printed. One picture is drawn at a time.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence

from ..common import Parser, UserError, first_line, guarded, need
from ..options import shipped
from ..pipelines import EMOJI, add_device, check_model, find_model, load_pipeline, pick_device, pick_dtype

PROGRAM = "tomesd app"


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(PROGRAM, __doc__)
    p.add_argument(
        "--model",
        type=find_model,
        default=EMOJI,
        help="folder or hub id of a diffusers pipeline (default: emoji)",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    p.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    p.add_argument(
        "--share", action="store_true", help="show the page to everybody, through gradio's servers"
    )
    add_device(p)
    return p.parse_args(arguments)


def check_address(host: str, port: int | None) -> None:
    """Raises a UserError for an address that the page cannot have, before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}, port {port}"
        raise UserError(f"cannot listen at {where}: {first_line(error)}") from None


def run(args: argparse.Namespace) -> int:
    check_model(args.model)
    check_address(args.host, args.port)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    need("gradio")
    from .page import THEME, make_page  # gradio takes seconds to import
    from .studio import Studio

    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device, pick_dtype(args.dtype, device))
    studio = Studio(pipe, device, shipped(args.model))
    page = make_page(studio)
    page.launch(server_name=args.host, server_port=args.port, share=args.share, theme=THEME, show_error=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(parse_args(arguments)))
