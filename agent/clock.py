"""The time that the agent reckons with: it goes on whatever the wall clock is set to.

Until when a session is held or protected, and since when it is as it is, are kept as Unix seconds,
so that they hold over a reboot. Would they be compared with the wall clock, holds would end when
somebody sets that forward, and protections last for hours when it is set back. So they are of a
clock of our own: CLOCK_BOOTTIME, and what the wall clock was ahead of it when an agent of this home
first ran in this boot. Who asks is told them by the wall clock as it stands by then.
"""

from __future__ import annotations

import time


class Clock:
    """Unix seconds that nobody sets: those since boot, and `ahead_s`."""

    def __init__(self, ahead_s: float | None = None) -> None:
        self.ahead_s = time.time() - _since_boot_s() if ahead_s is None else ahead_s

    def now_s(self) -> float:
        """The time by this clock."""
        return _since_boot_s() + self.ahead_s

    def shown(self, at_s: float) -> float:
        """When a moment of this clock is (or was) by the wall clock as it stands now.

        Both run equally fast; in tenths, so that the same moment is told the same twice.
        """
        return at_s + round(time.time() - self.now_s(), 1)


def _since_boot_s() -> float:
    """Suspended time counts; time_namespaces(7) and clock_gettime(2)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
