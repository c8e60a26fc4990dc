"""Event counters, with their count and whether they count down by one (EFD_SEMAPHORE)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey


class EventCounter(Kind):
    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "eventfd"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        count = int(opened.fields["eventfd-count"], 16)
        semaphore = opened.fields.get("eventfd-semaphore")
        if semaphore is None:
            raise opened.refusal(
                "this kernel does not tell whether the counter is a semaphore",
                "use Linux 6.5 or later, or let the process close it",
            )
        return {"count": count, "semaphore": semaphore == "1"}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        flags = os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if entry["semaphore"] else 0)
        fd = os.eventfd(0, flags)
        if entry["count"]:
            os.eventfd_write(fd, entry["count"])
        return fd


KIND = EventCounter()
