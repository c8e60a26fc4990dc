"""An agent of a test's own: started and ended as often as it likes, talked to as users do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from living import PATIENCE_S, Program, wait_readable

from lzy.agent.client import Client, NoAgent
from lzy.agent.supervisor import find_supervisor

QUICK = {
    "sample_s": 0.1,
    "doze_after_s": None,
    "hibernate_after_s": None,
    "notice_s": 0.1,
    "after_wake_s": 0,
}
"""Settings of a node whose sessions are looked at all the time, and left alone."""


class Service:
    """The agent of one home, without a supervisor unless `up` is called."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.client = Client(home)
        self.agent: subprocess.Popen[bytes] | None = None
        self.log = home / "agent.out"

    # -- beginning and end

    def begin(self, *, kill_at: str = "", **environment: str) -> Service:
        """Start an agent, which kills itself (or its operation) at that stage."""
        wanted = {**os.environ, "LZY_HOME": str(self.home), **environment}
        if kill_at:
            wanted["LZY_TEST_KILL_AT"] = kill_at
        with open(self.log, "ab") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-P", "-m", "lzy.agent"], env=wanted, stdout=log, stderr=log
            )
        self.wait_until(self.is_up, "the agent answers")
        return self

    def is_up(self) -> bool:
        assert self.agent is None or self.agent.poll() is None, self.log.read_text()
        with contextlib.suppress(NoAgent):
            return bool(self.client.get("/v1/node"))
        return False

    def end(self) -> None:
        """End the agent as `lzy down` does."""
        if self.agent is not None:
            self.agent.terminate()
            self.agent.wait(PATIENCE_S)
            self.agent = None

    def kill(self) -> None:
        """End the agent as the kernel does when memory runs out."""
        assert self.agent
        self.agent.kill()
        self.agent.wait()
        self.agent = None

    def await_death(self) -> None:
        """Wait until the agent has killed itself."""
        assert self.agent
        assert self.agent.wait(PATIENCE_S) == -signal.SIGKILL
        self.agent = None

    def close(self) -> None:
        """End whatever runs for this home, by its own pids."""
        if running := find_supervisor(self.home):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(running.pidfd, signal.SIGTERM)
            assert wait_readable([running.pidfd], PATIENCE_S)
            os.close(running.pidfd)
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()

    # -- what is asked of it

    def set(self, **settings: float | None) -> None:
        self.client.post("/v1/node/settings", {"settings": {**QUICK, **settings}})

    def attach(self, program: Program, name: str = "calm", **settings: float | None) -> None:
        """Attach a program, and wait for its first checkpoint."""
        body = {"pid": program.pid, "name": name, "settings": settings}
        self.client.post("/v1/sessions", body)
        self.wait_until(
            lambda: self.look(name)["image"] and not self.look(name)["operation"],
            "its first checkpoint is taken",
        )

    def do(self, verb: str, name: str = "calm", **body: Any) -> dict[str, Any]:
        """What the agent answers: `session` and, of an operation, `report`."""
        return self.client.post(self.client.session(name, verb), body, timeout_s=PATIENCE_S)

    def is_fetching(self) -> bool:
        """Whether something is still to come from the node that a session was on."""
        rows = self._ask_database("SELECT document FROM arrivals WHERE state = 'accepted'")
        return any("follows" in json.loads(row) for row in rows)

    def followed(self) -> set[str]:
        """The images that other nodes read here."""
        return set(self._ask_database("SELECT followed FROM departures WHERE followed != ''"))

    def _ask_database(self, question: str) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.home / "agent" / "state.db")) as database:
            return [row[0] for row in database.execute(question)]

    def look(self, name: str = "calm") -> dict[str, Any]:
        return self.client.get(self.client.session(name))

    def kinds(self, name: str = "calm") -> list[str]:
        """The kinds of all that happened to a session."""
        found = self.client.get(f"/v1/events?last=10000&session={name}")["events"]
        return [event["kind"] for event in found]

    def await_event(self, kind: str, name: str = "calm", *, after: int = 0) -> dict[str, Any]:
        """The first event of that kind, from now or earlier on."""
        deadline = time.monotonic() + PATIENCE_S
        path = f"/v1/events?after={after}&session={name}&follow=1"
        for event in self.client.follow(path):
            if event["kind"] == kind:
                return event
            assert time.monotonic() < deadline, f"no {kind}: {self.kinds(name)}"
        raise AssertionError("the agent ended")

    def await_state(self, state: str, name: str = "calm") -> dict[str, Any]:
        self.wait_until(lambda: self.look(name)["state"] == state, f"it is {state}")
        return self.look(name)

    def wait_until(self, holds: Callable[[], Any], words: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"never: {words}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)
