"""`tomesd COMMAND`, or `python -m tomesd COMMAND`: the commands that come with the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .commands.common import dispatch

COMMANDS = {
    "generate": "draws pictures with merged tokens, or plain ones beside them",
    "generate-4k": "draws pictures of 3840 x 2176 pixels with a fraction of the attention",
    "app": "shows a page in the browser: draw, compare, see what merged",
    "tune": "finds a method for each transformer of a model, by measuring on its weights",
    "explain": "tells what merges in each transformer block of a model, and what that saves",
    "trace": "draws what merged in a block, over the picture, at some steps",
    "bench": "times each way to merge",
    "plot": "draws what `bench --csv` has written",
    "quality": "measures what error each way to merge costs, and what time it saves",
}


def main(arguments: Sequence[str] | None = None) -> int:
    return dispatch("tomesd", COMMANDS, "tomesd.commands.", arguments)


if __name__ == "__main__":
    sys.exit(main())
