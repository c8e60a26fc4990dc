"""A migrator for a `Pair` of agents, which kills itself where a test likes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from living import PATIENCE_S
from pair import Pair, free_port

from lzy.agent import authority
from lzy.agent.client import Client
from lzy.agent.http import Request
from lzy.agent.identity import read_identity, write_identity
from lzy.checkpoint.errors import LzyError
from lzy.migrator.api import Api
from lzy.migrator.fleet import Fleet, Member, write_members


class Migrator:
    """The migrator of a fleet of `source` and `target`, with a home of its own."""

    def __init__(self, folder: Path, pair: Pair) -> None:
        self.home = folder / "migrator"
        self.home.mkdir()
        place = authority.fleet_folder(self.home)
        authority.issue(folder / "authority", place, authority.MIGRATOR)
        members = [Member(name, address) for name, address in pair.addresses.items()]
        write_members(self.home, members)
        self.client = Client(self.home)
        self._pair = pair
        self._log = self.home / "migrator.out"
        self._api = Api(Fleet(self.home), lambda: None)
        self._process: subprocess.Popen[bytes] | None = None

    def give_names(self) -> None:
        """Have both agents, from their start on, ask it how a session may be called."""
        address = f"127.0.0.1:{free_port()}"
        place = authority.fleet_folder(self.home) / "migrator.json"
        place.write_text(json.dumps({"address": address}))
        for service in self._pair.services.values():
            own = read_identity(service.home)
            write_identity(service.home, own._replace(migrator=address))

    def begin(self, *, kill_at: str = "") -> Migrator:
        """Start it; it kills itself at that stage."""
        wanted = {**os.environ, "LZY_HOME": str(self.home)}
        if kill_at:
            wanted["LZY_TEST_KILL_AT"] = kill_at
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lzy.migrator.service"],
                env=wanted, stdout=log, stderr=log,
            )  # fmt: skip
        return self

    def await_up(self) -> Migrator:
        """Wait until it answers."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.client.get("/v1/nodes")
                return self
            except LzyError:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)

    def await_death(self) -> None:
        """Wait until it has killed itself."""
        assert self._process
        assert self._process.wait(PATIENCE_S) == -signal.SIGKILL
        self._process = None

    def end(self) -> None:
        """End it, if it lives."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def answer_as(self, uid: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, document) of what its interface answers to that user, in this process."""
        content = b"" if body is None else json.dumps(body).encode()
        request = Request(method, path, {}, {}, content, uid, os.getpid())
        answer = asyncio.run(self._api.answer(request))
        return answer.status, answer.document
