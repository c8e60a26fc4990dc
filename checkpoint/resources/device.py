"""The memory devices: /dev/null, zero, full, random and urandom, known by their device numbers."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from ..errors import Incompatible
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_PATHS = {3: "/dev/null", 5: "/dev/zero", 7: "/dev/full", 8: "/dev/random", 9: "/dev/urandom"}
_MEMORY_MAJOR = 1  # Documentation/admin-guide/devices.txt


class Device(Kind):
    rank = 10

    def claims(self, opened: Opened) -> bool:
        device = opened.status.st_rdev
        return (
            opened.mode == stat.S_IFCHR
            and not opened.is_path_only
            and os.major(device) == _MEMORY_MAJOR
            and os.minor(device) in _PATHS
        )

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        return {"path": opened.link, "minor": os.minor(opened.status.st_rdev)}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        wanted = os.makedev(_MEMORY_MAJOR, entry["minor"])
        for path in (entry["path"], _PATHS[entry["minor"]]):
            try:
                if os.stat(path).st_rdev == wanted:
                    return os.open(path, entry["flags"] & ~os.O_ASYNC | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise Incompatible(
            f"there is no {_PATHS[entry['minor']]} here",
            remedy="mount a usual /dev (devtmpfs) before restoring",
        )


KIND = Device()
