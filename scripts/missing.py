"""Prints what `tomesd[EXTRA]` of this checkout lacks in an environment, a requirement a line:

    python -I scripts/missing.py diffusers

With -I, or a tomesd in the folder that one happens to be in would count as installed.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def missing(extra: str, root: Path = ROOT) -> Iterator[str]:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        yield "pip"
        return
    spec = importlib.util.find_spec("tomesd")
    try:
        own = metadata.distribution("tomesd")
    except metadata.PackageNotFoundError:
        spec = None
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parents[1] != root:
        yield f"tomesd of {root}"
        return
    noted = [Path(str(file.locate())) for file in own.files or [] if file.name == "METADATA"]
    if any(file.stat().st_mtime < (root / "setup.py").stat().st_mtime for file in noted):
        yield "what setup.py has come to ask for"
        return
    for text in own.requires or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield text
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier}, not {version}"


if __name__ == "__main__":
    print(*missing(sys.argv[1]), sep="\n")
