"""The agent's children: those that it forks for operations, and those that it has adopted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.errors import LzyError
from ..checkpoint.stages import reach
from . import errors, operations
from .operations import Order

_MOST_EXITS = 4096

Told = Callable[[dict[str, Any]], None]


def report_of(outcome: dict[str, Any]) -> dict[str, Any]:
    """What an operation reports by its last word (`Children.run`), or its error raised."""
    if "done" in outcome:
        done: dict[str, Any] = outcome["done"]
        return done
    raise errors.revive(outcome["error"])


class Children:
    """Who was forked and not yet waited for; `exits` tells how others of our children ended."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._ended: dict[int, asyncio.Future[int]] = {}
        self.exits: OrderedDict[int, int] = OrderedDict()

    @property
    def are_at_work(self) -> bool:
        return bool(self._ended)

    async def run(self, order: Order, told: Told) -> dict[str, Any]:
        """Have a child do it; its last word, `done` or `error`. `told` hears of its progress."""
        loop = asyncio.get_running_loop()
        started = operations.begin(order)
        reach("operation.begun")
        self._ended[started.pid] = ended = loop.create_future()
        hearing = _Hearing(started.reading, told, loop.create_future())
        loop.add_reader(started.reading, hearing.listen)
        try:
            # What it has said stands; that it takes down its memory afterwards concerns nobody.
            await asyncio.wait([ended, hearing.said], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(started.reading)
            hearing.listen()
            os.close(started.reading)
        if hearing.last is not None:
            return hearing.last
        status = ended.result()
        what = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        words = f"the {order.verb} of {order.record.name} died ({what})"
        return {"error": errors.describe(LzyError(words, remedy=f"try again; see {self._log}"))}

    async def run_aside(self, work: Callable[[], None]) -> None:
        """Have a child do what the engine may crash at, or block."""
        pid = operations.begin_aside(work)
        self._ended[pid] = ended = asyncio.get_running_loop().create_future()
        await ended

    def interrupt(self) -> None:
        """Have everybody at work stop."""
        for pid in self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def reap(self) -> None:
        """Take in whoever has ended, forked or adopted; at SIGCHLD."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if ended := self._ended.pop(pid, None):
                if not ended.done():
                    ended.set_result(status)
                continue
            self.exits[pid] = status
            while len(self.exits) > _MOST_EXITS:
                self.exits.popitem(last=False)


class _Hearing:
    """Lines of JSON from an operation: its progress, and its last word, kept as `last`."""

    def __init__(self, descriptor: int, told: Told, said: asyncio.Future[None]) -> None:
        self._descriptor = descriptor
        self._told = told
        self.said = said
        self._rest = b""
        self.last: dict[str, Any] | None = None

    def listen(self) -> None:
        """Take what has come."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._descriptor, 65536):
                self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        for line in whole:
            document = json.loads(line)
            if "progress" in document:
                self._told(document["progress"])
            else:
                self.last = document
                if not self.said.done():
                    self.said.set_result(None)
