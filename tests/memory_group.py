"""A control group of a test's own, in which programs have only so much memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

MEBIBYTE = 1 << 20


class MemoryGroup:
    """A control group of the test's own with a limit of memory (cgroups(7), either version)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def _name(self, first: str, second: str) -> Path:
        """A file of it, by its name in version 2 or in version 1."""
        path = self.folder / first
        return path if path.exists() else self.folder / second

    @property
    def needed_bytes(self) -> int:
        """What cannot be taken away: memory that is in no file."""
        facts = dict(line.split() for line in (self.folder / "memory.stat").open())
        return int(facts.get("anon", facts.get("rss", 0))) + int(facts["shmem"])

    def limit(self, length_bytes: int) -> None:
        self._name("memory.max", "memory.limit_in_bytes").write_text(str(length_bytes))

    @property
    def was_short(self) -> bool:
        """Whether the limit was ever reached."""
        failures = self.folder / "memory.failcnt"
        if failures.exists():
            return int(failures.read_text()) > 0
        events = dict(line.split() for line in (self.folder / "memory.events").open())
        return int(events["max"]) > 0

    def inside(self, words: list[str]) -> list[str]:
        """A command that joins it first."""
        join = f'echo $$ > {self.folder}/cgroup.procs && exec "$@"'
        return ["/bin/sh", "-c", join, "sh", *words]

    def close(self) -> None:
        """Remove it, once who was in it has ended."""
        deadline = time.monotonic() + 10
        while self.folder.exists():
            try:
                self.folder.rmdir()
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "cgroup.procs").read_text()
                time.sleep(0.05)


def make_group() -> MemoryGroup:
    """A new one, where the kernel's memory controller is."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if (parent / "cgroup.procs").exists():
            return MemoryGroup(parent / f"lzy-test-{os.getpid()}")
    pytest.fail("no control groups for memory are mounted here")
