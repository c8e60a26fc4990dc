"""Sizes as people type them: `500M`, `1.5 GiB`, `4096`."""

from __future__ import annotations

import re

import click

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SPELLING = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


class Size(click.ParamType[int]):
    """A size in bytes; units are binary, `B` and `iB` may follow."""

    name = "SIZE"
    spelling = "500M or 2G"

    def convert(
        self, value: object, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        spelled = _SPELLING.fullmatch(str(value))
        if not spelled:
            self.fail(f"{value!r} is no size; write it as {self.spelling}", parameter, ctx)
        return int(float(spelled[1]) * 1024 ** _UNITS[spelled[2].lower()])
