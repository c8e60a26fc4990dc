"""Timers that are read: what is left until they expire, their interval, and unread expiries.

Time does not pass for a process that is not there, so a timer goes on with what was left. Only one
set to an absolute time of the wall clock keeps that time, and has expired if it is past.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from ..linux import descriptors as kernel
from .kind import Entry, Finish, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # and CLOCK_REALTIME_ALARM, linux/time.h


class TimerDescriptor(Kind):
    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "timerfd"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        clock = int(opened.fields["clockid"])
        # First: this winds a periodic timer on, so that fdinfo then shows all its ticks.
        left_ns, interval_ns = kernel.get_timerfd(opened.fd)
        now_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
        with open(f"/proc/self/fdinfo/{opened.fd}", encoding="ascii") as file:
            ticks, flags = re.findall(r"^(?:ticks|settime flags): (\d+)$", file.read(), re.M)
        entry: Entry = {
            "clock": clock,
            "timer_flags": int(flags, 8),
            "left_ns": left_ns,
            "interval_ns": interval_ns,
            "ticks": int(ticks),
        }
        if clock in _WALL_CLOCKS and entry["timer_flags"] & kernel.TFD_ABSTIME and left_ns:
            entry["expires_ns"] = now_ns + left_ns
        return entry

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        return kernel.make_timerfd(entry["clock"])

    def finish(self, entry: Entry, fd: int, finish: Finish) -> None:
        if "expires_ns" in entry:
            flags, value_ns = entry["timer_flags"], entry["expires_ns"]
        else:
            flags, value_ns = 0, entry["left_ns"]
        if value_ns:
            kernel.set_timerfd(fd, flags, value_ns, entry["interval_ns"])
        if entry["ticks"]:
            try:
                kernel.set_timerfd_ticks(fd, entry["ticks"])
            except OSError:
                # A kernel without CONFIG_CHECKPOINT_RESTORE: let it expire once, now.
                kernel.set_timerfd(fd, 0, 1, entry["interval_ns"])


KIND = TimerDescriptor()
