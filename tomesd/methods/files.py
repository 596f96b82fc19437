"""Files that people keep: read as what they are to be, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import shown, wrong_type


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; what is written there appears as `path` at the end, whole or not at all."""
    if path.exists() and not path.is_file():  # /dev/null or a pipe, which nothing may replace
        yield path
        return
    path = Path(os.path.realpath(path))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    part = path.with_name(f"partial-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def path_of(path: Any) -> Path:
    """Raises a TypeError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise wrong_type("path", "that of a file, a string or a Path", path)
    return Path(path)


def write_json(data: Any, path: str | Path, indent: int | None = None) -> None:
    """Writes JSON to a file; what was there before is kept where that fails.

    Raises:
        OSError: it cannot be written.
        TypeError: `path` is none, or `data` no plain JSON.
    """
    text = json.dumps(data, indent=indent) + "\n"
    with whole(path_of(path)) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | Path, what: str) -> Any:
    """What is in a file of JSON; `what` is what it should be.

    Raises:
        OSError: it cannot be read.
        TypeError: `path` is none.
        ValueError: it is no JSON.
    """
    try:
        # Some editors begin a file with a mark of its encoding.
        text = path_of(path).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is a file of JSON, and {path} is none: {error}") from None


def _named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose names none may be there twice: the first one would be lost."""
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise ValueError(f"{shown(name)} is there twice")
        data[name] = value
    return data
