"""Ctrl-C before a command can catch it: torch takes seconds to import."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it, Ctrl-C ends a command of ours without a traceback. Other programs are left as they are."""
    asked_for = signal.getsignal(signal.SIGINT)
    if not (_is_ours() and asked_for is signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, asked_for)


def _is_ours() -> bool:
    """Whether the program is `tomesd`, or `python -m tomesd`, or one of the repository's scripts."""
    program = sys.argv[0] if sys.argv else ""
    if os.path.basename(program) in ("tomesd", "-m"):  # `-m`: while Python looks for what is to be run
        return "tomesd" in map(os.path.basename, sys.orig_argv)
    return SCRIPTS in Path(program).resolve().parents
