"""`python -m tomesd COMMAND`: the commands that come with the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bench import plot, quality, speed

COMMANDS = {"bench": speed, "plot": plot, "quality": quality}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tomesd", description="Token merging.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = str(module.__doc__)
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
