"""Signals that are read: the set of signals; those pending belong to the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..linux import descriptors as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey


class SignalDescriptor(Kind):
    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "signalfd"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        return {"signals": int(opened.fields["sigmask"], 16)}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        return kernel.make_signalfd(entry["signals"])


KIND = SignalDescriptor()
