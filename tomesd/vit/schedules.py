"""Schedules: lists of what merges in each layer, with what is known of them, kept in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..methods import options
from ..methods.files import read_json, write_json
from ..methods.schedule import parse_r


class Schedule(list[int | float]):
    """What merges in each layer, for `model.r`. `print` shows it as a table.

        schedule = tome.Schedule.load("schedule.json")
        model.r = schedule

    Args:
        r: a number of tokens, or a share of them, for each layer.
        about: what is known of it, such as what `tune` has measured, by name: plain JSON.

    Raises:
        TypeError, ValueError: `r` is no list that `parse_r` takes, or `about` is no dict of JSON.
    """

    def __init__(self, r: Iterable[int | float] = (), about: Mapping[str, Any] | None = None) -> None:
        if isinstance(r, Mapping | str) or not isinstance(r, Iterable):
            raise options.wrong_type("r", "a list, a number or a share for each layer", r)
        each = list(r)
        super().__init__(parse_r(len(each), each))
        if not isinstance(about, Mapping | None) or not all(isinstance(key, str) for key in about or {}):
            raise options.wrong_type("about", "a dict by names", about)
        try:
            self.about: dict[str, Any] = json.loads(json.dumps(dict(about or {})))
        except (TypeError, ValueError, RecursionError):
            raise options.wrong_type("about", "a dict of plain JSON", about) from None

    def __str__(self) -> str:
        about, left = dict(self.about), self.about.get("left")
        if isinstance(left, list) and len(left) == len(self):
            del about["left"]
        else:  # not of this schedule
            left = [""] * len(self)
        rows = [("layer", "r", "left"), *zip(range(1, len(self) + 1), self, left, strict=True)]
        lines = [f"{layer:>5}  {r:>5}  {n!s:>5}".rstrip() for layer, r, n in rows]
        known = [f"{key.replace('_', ' ')} {value}" for key, value in about.items()]
        return "\n".join([*lines, ", ".join(known)] if known else lines)

    def save(self, path: str | Path) -> None:
        """Writes the schedule to a file, as JSON, whole or not at all."""
        write_json({"r": list(self), "about": self.about}, path)

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Reads what `save` has written. Files of strangers are safe: there is no code in them.

        Raises:
            OSError, ValueError, TypeError: it cannot be read, is no JSON, or no schedule.
        """
        data = read_json(path, "a schedule")
        if not isinstance(data, dict) or not isinstance(data.get("r"), list) or data.keys() - {"r", "about"}:
            raise TypeError(
                f'a schedule is described by {{"r": [8, 4, 2], "about": {{}}}}, got {options.shown(data)}'
            )
        return Schedule(data["r"], data.get("about"))
