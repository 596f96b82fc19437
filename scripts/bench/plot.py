"""`tomesd plot`, in which the rivals have colours of their own."""

import sys
from collections.abc import Sequence

import rivals

from tomesd.commands import plot


def main(arguments: Sequence[str] | None = None) -> int:
    return plot.main(arguments, "python scripts/bench plot", rivals.ALL)


if __name__ == "__main__":
    sys.exit(main())
