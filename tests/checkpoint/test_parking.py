"""While one thread of a process makes lzy's calls the others wait, also when lzy is killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import reap_orphans

from lzy.checkpoint import doze as dozing
from lzy.checkpoint.batch import Batch
from lzy.checkpoint.doze import doze
from lzy.checkpoint.errors import LzyError
from lzy.checkpoint.pager import resume_pager
from lzy.checkpoint.store import Store
from lzy.checkpoint.tracee import Thread, Tracee
from lzy.checkpoint.waiting import list_pagers

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


def doze_killed_within(pid: int, folder: Path, delay_s: float) -> None:
    """Fork who has the process doze, and is killed so long after the process began to drop."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        run = Tracee.run

        def armed(tracee: Tracee, thread: Thread, batch: Batch) -> Batch:
            ourselves = os.getpid()
            if os.fork() == 0:
                until_s = time.perf_counter() + delay_s
                while time.perf_counter() < until_s:
                    pass
                os.kill(ourselves, signal.SIGKILL)
                os._exit(0)
            return run(tracee, thread, batch)

        drop = dozing._drop

        def dropping(*arguments: object) -> tuple[int, float]:
            Tracee.run = armed  # type: ignore[method-assign]  # in this child only
            return drop(*arguments)  # type: ignore[arg-type]

        dozing._drop = dropping
        with Store.open(folder, create=True) as store:
            doze(pid, store, name="calm")
    except LzyError:
        pass
    finally:
        os._exit(0)


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_nobody_sees_memory_half_dropped(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """Who drops is killed in the midst of it: a thread that writes all the time sees no zeros."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    program = start("memory_pattern", "16").await_ready()
    chance = random.Random(os.getpid())
    for _ in range(kills):
        doze_killed_within(program.pid, tmp_path / "store", chance.uniform(0, 0.01))
        for pager in list_pagers():
            if not pager.alive:
                with contextlib.suppress(LzyError):
                    resume_pager(pager.pid)
        program.prove()
    reap_orphans()
