"""`tomesd bench`, with tomesd 0.1.3, ToDo and HyperTile beside the package's own ways."""

import sys
from collections.abc import Sequence

import rivals

from tomesd.commands import bench


def main(arguments: Sequence[str] | None = None) -> int:
    return bench.main(arguments, "python scripts/bench speed", rivals.ALL)


if __name__ == "__main__":
    sys.exit(main())
