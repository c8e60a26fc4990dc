"""What can be set about idleness and the agent's own work: for a node, or for one session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..checkpoint.errors import LzyError


class Settings(NamedTuple):
    """Times in seconds, CPU in cores, rates in bytes a second; None of a time: never."""

    sample_s: float = 15.0
    """How often the agent looks at its sessions."""
    doze_after_s: float | None = 300.0
    hibernate_after_s: float | None = 1800.0
    notice_s: float = 10.0
    """Between the notice of an eviction and its beginning: time to call it off."""
    after_wake_s: float = 300.0
    """For so long after a wake nothing is evicted."""
    idle_cpu: float = 0.02
    idle_bytes_per_s: float = 1024.0
    operations: float = 2.0
    """How many dumps at a time."""
    move_bytes_per_s: float = 0.0
    """How much other nodes may fetch from this one; 0: as much as goes."""
    move_at_once_bytes: float = 2 << 20
    """So much of what a session that comes wrote last is fetched before it wakes; more follows."""
    forward_s: float = 3600.0
    """So long after their last use the ports of a session that moved lead from here to it."""
    limit_bytes: float | None = None
    """What is cold of a session that has more anonymous memory in RAM than this goes."""


LEAST_LIMIT_BYTES = 1 << 20
BOUNDS: dict[str, tuple[float, float]] = {
    "sample_s": (0.05, 3600),
    "doze_after_s": (0, 10 * 365 * 86400),
    "hibernate_after_s": (0, 10 * 365 * 86400),
    "notice_s": (0, 3600),
    "after_wake_s": (0, 86400),
    "idle_cpu": (0, 1024),
    "idle_bytes_per_s": (0, 1e12),
    "operations": (1, 64),
    "move_bytes_per_s": (0, 1e12),
    "move_at_once_bytes": (0, 1e12),
    "forward_s": (0, 365 * 86400),
    "limit_bytes": (LEAST_LIMIT_BYTES, 1 << 50),
}
MAY_BE_NEVER = frozenset({"doze_after_s", "hibernate_after_s", "limit_bytes"})
OF_A_SESSION = frozenset(
    {"doze_after_s", "hibernate_after_s", "notice_s", "after_wake_s", "idle_cpu"}
    | {"idle_bytes_per_s", "limit_bytes"}
)
LONGEST_HOLD_S = 30 * 86400


def check_settings(values: Mapping[str, Any], allowed: frozenset[str]) -> dict[str, float | None]:
    """`values` if they are settings out of `allowed` and within their bounds; else LzyError."""
    found: dict[str, float | None] = {}
    for name, value in values.items():
        if name not in allowed:
            raise LzyError(
                f"there is no setting {name[:80]!r} here",
                remedy=f"there are: {', '.join(sorted(allowed))}",
            )
        if value is None and name in MAY_BE_NEVER:
            found[name] = None
            continue
        low, high = BOUNDS[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise LzyError(
                f"{name} cannot be {str(value)[:80]}",
                remedy=f"give a number from {low:g} to {high:g}"
                + (", or null for never" if name in MAY_BE_NEVER else ""),
            )
        found[name] = float(value)
    return found


def combine(*layers: Mapping[str, float | None]) -> Settings:
    """The defaults with what was set, later layers over earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update((name, value) for name, value in layer.items() if name in Settings._fields)
    return Settings(**merged)


def limit_of(node: Settings, own: Mapping[str, float | None]) -> int:
    """The limit in bytes of a session with settings of its `own` on a node; 0: it has none."""
    return int(own.get("limit_bytes", node.limit_bytes) or 0)
