"""Times as people write them: `90s`, `30m`, `2h`, `1d`, `1h30m`, `never`."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)\s*")


class Duration(click.ParamType[float]):
    """A time; the command gets seconds, infinity for `never` where that is allowed.

    `least_s` and `most_s`: what it may be.
    """

    name = "TIME"

    def __init__(
        self, *, never: bool = False, least_s: float = 0.0, most_s: float = 10 * 365 * 86400.0
    ) -> None:
        self._never, self._least_s, self._most_s = never, least_s, most_s

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip().lower()
        if self._never and text in ("never", "off"):
            return float("inf")
        if _NUMBER.fullmatch(text):
            text += "s"
        parts = _PART.findall(text)
        if not parts or _PART.sub("", text):
            never = ", or never" if self._never else ""
            self.fail(f"{value!r} is no time; write 90s, 30m, 2h or 1h30m{never}", param, ctx)
        time_s = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        if not self._least_s <= time_s <= self._most_s:
            bounds = f"{spell(self._least_s)} to {spell(self._most_s)}"
            self.fail(f"{value!r} is not in {bounds}", param, ctx)
        return time_s


def spell(time_s: float) -> str:
    """`5400` as `1 h 30 min`, `90` as `1 min 30 s`, `0.5` as `0.5 s`."""
    if time_s < 60:
        return f"{time_s:.3g} s"
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    shown = [f"{number} {unit}" for number, unit in parts if number]
    return " ".join(shown[:2])
