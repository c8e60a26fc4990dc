"""A measured figure with its target and its floor, and how a list of them becomes a table."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from lzy.cli.layout import duration


@dataclass
class Floor:
    """What the machine does without lzy: seconds or bytes a second, as the figure it is for."""

    name: str
    value: float


@dataclass
class Figure:
    """One claim, measured. `unit`: s, B/s, B, share or times; values in that unit."""

    key: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    at_most: float | None = None
    at_least: float | None = None
    floor: Floor | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one (or without a measurement)."""
        if not self.values or (self.at_most is None and self.at_least is None):
            return None
        if self.at_most is not None and self.median > self.at_most:
            return False
        return self.at_least is None or self.median >= self.at_least

    def as_document(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {
            "median": self.median if self.values else None,
            "met": self.met,
        }

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """What, median, range, target, floor, ratio."""
        if not self.values:
            return self.what, "failed", self.failure, self._target(), "", ""
        low, high = show(min(self.values), self.unit), show(max(self.values), self.unit)
        spread = f"{low} – {high}" if len(self.values) > 1 else ""
        floor = ratio = ""
        if self.floor:
            floor = f"{self.floor.name} {show(self.floor.value, self.unit)}"
            ratio = f"{self.median / self.floor.value:.2g}×" if self.floor.value else ""
        return self.what, show(self.median, self.unit), spread, self._target(), floor, ratio

    def _target(self) -> str:
        mark = {True: " ✓", False: " ✗", None: ""}[self.met]
        if self.at_most is not None:
            return f"≤ {show(self.at_most, self.unit)}{mark}"
        if self.at_least is not None:
            return f"≥ {show(self.at_least, self.unit)}{mark}"
        return ""


HEADS = ("what", "median", "range", "target", "floor, same run", "figure ÷ floor")


def show(value: float, unit: str) -> str:
    """A value for people."""
    if unit == "s":
        return str(duration(value))
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    if unit == "B":
        return f"{value / (1 << 20):.0f} MiB"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}×"


def as_markdown(figures: list[Figure]) -> str:
    """A table for docs/performance.md."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---|--:|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join(figure.cells()) + " |" for figure in figures]
    return "\n".join(lines)
