"""Cgroups: what a node and each of its sessions may use, where the kernel lets us (v2, else v1).

A node's lies under `lzy-KEY`, where KEY tells this home from others; sessions' under the same name
inside the group that their agent is in, so that they are held to their node's limits, too. Where a
controller is missing or not ours to use, that limit is left out, and `missing` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import zlib
from pathlib import Path
from typing import Final

from ..checkpoint.errors import Incompatible

_ROOT: Final = Path("/sys/fs/cgroup")
_PERIOD_US: Final = 100_000
_LEFT_WITHIN_S: Final = 1.0


def least_memory_bytes(held_bytes: int) -> int:
    """The smallest bound for a session that holds so much: below it the kernel might kill it."""
    return held_bytes + held_bytes // 10 + (16 << 20)


def check_bound(name: str, held_bytes: int, asked_bytes: int) -> None:
    """Raise Incompatible where session `name` would be killed within what it asks for."""
    least_bytes = least_memory_bytes(held_bytes)
    if 0 < asked_bytes < least_bytes:
        raise Incompatible(
            f"session {name} holds {held_bytes >> 20} MiB: bounded to {asked_bytes >> 20} MiB it"
            " would be killed",
            remedy=f"ask for {-(-least_bytes >> 20)}M at least, or for none in particular",
        )


class Cgroup:
    """One group: a folder in each hierarchy that it has a controller in."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    @classmethod
    def make(cls, home: Path, *names: str) -> Cgroup:
        """The group of a node of `home`, or of one of its sessions; made where it can be."""
        folders: dict[str, Path] = {}
        for controller, base in _hierarchies().items():
            folder = base
            try:
                for name in (_key(home), *names):
                    _delegate(folder)
                    folder = folder / name
                    folder.mkdir(exist_ok=True)
                folders[controller] = folder
            except OSError:
                continue
        return cls(folders)

    @classmethod
    def inside(cls, home: Path, session: str, *, make: bool = True) -> Cgroup:
        """The group of a session of `home` within the one that this process is in."""
        folders: dict[str, Path] = {}
        own = _own_groups()
        for controller, base in _hierarchies().items():
            folder = base / own.get(controller, "").lstrip("/")
            with contextlib.suppress(OSError):
                for name in (_key(home), session):
                    if make:
                        _delegate(folder)
                        (folder / name).mkdir(exist_ok=True)
                    folder = folder / name
                if folder.is_dir():
                    folders[controller] = folder
        return cls(folders)

    @classmethod
    def left_by(cls, home: Path) -> Cgroup:
        """What there is of groups of a home's nodes, be it that a killed one has left it."""
        found = {name: base / _key(home) for name, base in _hierarchies().items()}
        return cls({name: folder for name, folder in found.items() if folder.is_dir()})

    @property
    def missing(self) -> list[str]:
        """Controllers that are not there to be used."""
        return [name for name in ("cpu", "memory") if name not in self.folders]

    def limit(self, *, cpus: float = 0.0, memory_bytes: int = 0) -> bool:
        """At most so many cores and so much memory; 0: leave it. Whether the memory is bounded."""
        with contextlib.suppress(OSError, KeyError):
            if cpus:
                folder, quota_us = self.folders["cpu"], int(cpus * _PERIOD_US)
                if (folder / "cpu.max").exists():
                    (folder / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
                else:
                    (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        with contextlib.suppress(OSError, KeyError):
            if memory_bytes:
                folder = self.folders["memory"]
                v2 = (folder / "memory.max").exists()
                name = "memory.max" if v2 else "memory.limit_in_bytes"
                (folder / name).write_text(str(memory_bytes))
                return True
        return False

    def share(self, cpus: float) -> None:
        """Of a busy node, cores in proportion to others' `cpus`."""
        with contextlib.suppress(OSError, KeyError):
            folder = self.folders["cpu"]
            if (folder / "cpu.weight").exists():
                (folder / "cpu.weight").write_text(str(max(1, min(10000, int(cpus * 100)))))
            else:
                (folder / "cpu.shares").write_text(str(max(2, int(cpus * 1024))))

    def add(self, pid: int) -> None:
        """Have a process, and what it starts from now on, in the group."""
        for folder in set(self.folders.values()):
            with contextlib.suppress(OSError):
                (folder / "cgroup.procs").write_text(str(pid))

    def dissolve(self) -> None:
        """Remove a session's group; who is in it is bounded by it no longer."""
        for folder in set(self.folders.values()):
            with contextlib.suppress(OSError):
                for pid in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        (folder.parent.parent / "cgroup.procs").write_text(pid)
        self.remove()

    def remove(self) -> None:
        """Remove it and what is below, and the home's if it was the last, where nobody is in it.

        Who has ended just now is waited for.
        """
        deadline = time.monotonic() + _LEFT_WITHIN_S
        for folder in set(self.folders.values()):
            for path in (*sorted(folder.rglob("*/"), reverse=True), folder):
                while not _remove(path) and time.monotonic() < deadline:
                    time.sleep(0.02)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def _key(home: Path) -> str:
    return f"lzy-{zlib.crc32(os.fsencode(str(home))):08x}"


def _remove(folder: Path) -> bool:
    """Whether it is gone now, or may not be removed yet for others' sake."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            return True
        with contextlib.suppress(OSError):
            inside = (folder / "cgroup.procs").read_text()
            return bool(inside) or any(path.is_dir() for path in folder.iterdir())
    return True


def _hierarchies() -> dict[str, Path]:
    """Where each controller's groups are made; cgroups(7)."""
    found: dict[str, Path] = {}
    for root in (_ROOT, _ROOT / "unified"):
        with contextlib.suppress(OSError):
            names = (root / "cgroup.controllers").read_text().split()
            found |= {name: root for name in ("cpu", "memory") if name in names}
    for name in ("cpu", "memory"):
        if name not in found and (_ROOT / name / "cgroup.procs").exists():
            found[name] = _ROOT / name
    return found


def _own_groups() -> dict[str, str]:
    """The group that this process is in, by controller; /proc/self/cgroup, cgroups(7)."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(",") if names else ("cpu", "memory"):
            if names or name not in found:
                found[name] = path
    return found


def _delegate(folder: Path) -> None:
    """In version 2, groups below have the controllers that are handed down."""
    control = folder / "cgroup.subtree_control"
    if control.exists():
        for name in ("cpu", "memory"):
            with contextlib.suppress(OSError):
                control.write_text(f"+{name}")
