"""The stages of dumps, restores, pagers and daemons, so that tests can end lzy at each of them.

`LZY_TEST_KILL_AT=dump.seized lzy dump …` makes lzy kill itself (SIGKILL) on reaching that stage.
`LZY_TEST_HOLD_IN=FOLDER`: who comes to a stage of which there is a file in FOLDER gives that file
the name STAGE.held, and waits until it is gone.
`LZY_TEST_STAGES_TO=FILE` has the time of each written there, for who wants to know where it goes.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Final

STAGES: Final = (
    "dump.ahead",
    "dump.seized",
    "dump.prepared",
    "dump.asked",
    "dump.described",
    "dump.tracked",
    "dump.split",
    "dump.resumed",
    "dump.writing",
    "dump.written",
    "dump.committed",
    "dump.ended",
    "named.unlinked",
    "restore.checked",
    "restore.created",
    "restore.executed",
    "restore.mapped",
    "restore.filled",
    "restore.threads",
    "restore.registered",
    "restore.paging",
    "restore.committing",
    "restore.committed",
    "doze.taken",
    "doze.replacing",
    "doze.served",
    "doze.dropped",
    "pager.serving",
    "pager.loaded",
    "pager.unregistered",
    "pager.closed",
    "operation.intended",
    "operation.begun",
    "operation.done",
    "operation.heard",
    "operation.recorded",
    "move.offered",
    "move.prepared",
    "move.stopping",
    "move.stopped",
    "move.asked",
    "move.accepting",
    "move.accepted",
    "move.answered",
    "move.fetching",
    "move.fetched",
    "move.departed",
    "move.back",
    "migrator.looked",
    "migrator.decided",
    "migrator.recorded",
    "migrator.told",
    "migrator.heard",
    "migrator.chosen",
    "migrator.answered",
    "door.prepared",
    "door.mapped",
    "door.borrowed",
    "door.returned",
    "door.entered",
    "door.cancelled",
    "door.paused",
    "door.handed",
    "door.answered",
    "door.cleared",
)

_KILL_AT = os.environ.get("LZY_TEST_KILL_AT")
_HOLD_IN = os.environ.get("LZY_TEST_HOLD_IN")
_TELL_TO = os.environ.get("LZY_TEST_STAGES_TO")


def reach(stage: str) -> None:
    """Say that `stage` is reached."""
    if _TELL_TO:
        with open(_TELL_TO, "a") as file:  # whole lines, whoever else writes; write(2), O_APPEND
            file.write(f"{time.monotonic_ns()} {os.getpid()} {stage}\n")
    if _HOLD_IN:
        _wait_if_held(f"{_HOLD_IN}/{stage}")
    if stage == _KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def _wait_if_held(path: str) -> None:
    try:
        os.rename(path, f"{path}.held")
    except FileNotFoundError:
        return
    while os.path.exists(f"{path}.held"):
        time.sleep(0.005)
