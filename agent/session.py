"""One session as the living agent has it: its record, its process, and what was last seen of it."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from .probes import Verdict, cpu_share, judge
from .processes import is_alive, look_at
from .readings import Node, Reading, Watch
from .settings import Settings
from .state import LIVING, Record

MOST_GAPS = 32
SHORTEST_GAP_S = 30.0


class Session:
    """A record and what belongs to it while the agent lives; `lock` is held by one operation."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.waiting = 0
        self.progress: dict[str, Any] | None = None
        """verb, began_unix_s, stage, done_bytes, total_bytes of the operation under way."""
        self.called_off: asyncio.Event | None = None
        """Set to call off the eviction that notice was given of."""
        self.pidfd = -1
        self.ended_with: int | None = None
        """How its process ended, where that could not be written down yet."""
        self.verdicts: list[Verdict] = []
        self.cpu_share = 0.0
        self.memory_bytes = record.memory_bytes
        self.peak_memory_bytes = record.peak_memory_bytes
        self._watch: Watch | None = None
        self._reading: Reading | None = None
        self._idle_since_s: float | None = None
        self._is_forgiven = False
        self.memory_limit_bytes = 0
        """Where the kernel would kill it: its cgroup's limit; 0: it has none."""
        self.is_known = False
        """Whether it has been looked at twice, so that there is something to compare."""

    @property
    def is_living(self) -> bool:
        return self.record.state in LIVING

    @property
    def idle_for_s(self) -> float:
        """For how long every look has found every probe idle; counted from the first such look."""
        return time.monotonic() - self._idle_since_s if self._idle_since_s is not None else 0.0

    @property
    def held_bytes(self) -> int:
        """Memory that it holds, or will hold when it wakes."""
        return max(self.memory_bytes if self.is_living else 0, self.record.image_bytes)

    def open_process(self) -> bool:
        """Take hold of the recorded process, to hear of its end; whether it is there."""
        self.close_process()
        record = self.record
        try:
            self.pidfd = os.pidfd_open(record.pid)
        except OSError:
            return False
        if not is_alive(record.pid, record.start_time, record.boot_id):
            self.close_process()
            return False
        self._watch = Watch(record.pid, record.command)
        if process := look_at(record.pid):
            self.memory_bytes = process.resident_bytes
        return True

    def call_off(self) -> bool:
        """Have an eviction not happen of which only notice was given; whether there was one."""
        if self.called_off is None:
            return False
        self.called_off.set()
        return True

    def close_process(self) -> None:
        """Let go of the process, and forget what was seen of it."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1
        self._watch = self._reading = self._idle_since_s = None
        self.verdicts, self.cpu_share, self.is_known = [], 0.0, False

    def look(self, node: Node, settings: Settings, *, closely: bool = False) -> float:
        """Take a reading and judge it; the length of an idle gap that has just ended, else 0.

        `closely`: read again what is hardly ever another than it was.
        """
        if closely and self._watch:
            self._watch.forget()
        reading = self._watch.read(node) if self._watch else None
        if reading is None:
            return 0.0
        before, self._reading = self._reading, reading
        self.memory_bytes = reading.resident_bytes
        self.peak_memory_bytes = max(self.peak_memory_bytes, reading.resident_bytes)
        if self._is_forgiven and before is not None:
            self._is_forgiven = False
            return 0.0
        self.is_known = before is not None
        self.verdicts = judge(before, reading, settings)
        self.cpu_share = cpu_share(before, reading)
        if not any(verdict.active for verdict in self.verdicts):
            if self._idle_since_s is None:
                self._idle_since_s = reading.at_s
            return 0.0
        ended_s, self._idle_since_s = self.idle_for_s, None
        return ended_s

    def forgive(self) -> None:
        """What lzy itself has just made the process do is no activity of its own."""
        self._is_forgiven = True

    @property
    def is_active(self) -> bool:
        return any(verdict.active for verdict in self.verdicts) or not self.verdicts
