"""While a process stands still because of us, our own steps wait for nobody else's work.

A stop is some ten milliseconds of work. On a machine where more threads run than it has processors,
a thread that has worked so long is made to wait for the others, and the stopped process with it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


class Urgent:
    """While the block runs, this thread goes before all that is not of real time; where it may.

    What it starts does not. Who may not (without CAP_SYS_NICE), or is of real time, stays as it is.
    """

    def __enter__(self) -> Urgent:
        self._before: tuple[int, Any] | None = None
        with contextlib.suppress(OSError):
            before = os.sched_getscheduler(0), os.sched_getparam(0)
            if before[0] == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
                self._before = before
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            os.sched_setscheduler(0, *self._before)
