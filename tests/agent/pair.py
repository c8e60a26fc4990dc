"""Two agents of one fleet on the loopback, each killed as a test likes, and who watches both."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from living import PATIENCE_S, Holds, Program
from service import QUICK, Service

from lzy.agent import authority
from lzy.agent.identity import Identity, write_identity
from lzy.checkpoint.errors import LzyError
from lzy.checkpoint.store import Store


class Pair:
    """`source` and `target`: agents that may move sessions to each other."""

    def __init__(self, folder: Path, *, own_stores: bool = False) -> None:
        place = folder / "authority"
        self.holds = Holds(folder / "holds")
        authority.make_authority(place)
        self.addresses: dict[str, str] = {}
        self.services: dict[str, Service] = {}
        with Store.open(folder / "store", create=True) as store:
            secret = (store.path / "secret").read_bytes()
        for name in ("source", "target"):
            home = folder / name
            home.mkdir()
            authority.issue(place, authority.fleet_folder(home), authority.node_subject(name))
            self.addresses[name] = f"127.0.0.1:{free_port()}"
            gpus = 1 if name == "target" else 0
            identity = Identity(name, 2, 4 << 30, gpus, gpus > 0, address=self.addresses[name])
            write_identity(home, identity)
            if own_stores:
                (home / "store").mkdir()
                (home / "store" / "secret").write_bytes(secret)
            else:
                (home / "store").symlink_to(folder / "store")
            self.services[name] = Service(home)
        self.source, self.target = self.services["source"], self.services["target"]

    def begin(self, **settings: float | None) -> Pair:
        for service in self.services.values():
            if service.agent is None:
                service.begin(**self.holds.environment)
            service.set(**settings)
        return self

    def close(self) -> None:
        for service in self.services.values():
            service.close()

    def follow(self, to: str = "target", **more: Any) -> dict[str, Any]:
        """As `move`, and what was written last does not come before `await_complete`."""
        self.holds.hold("move.fetching")
        report: dict[str, Any] = self.move(to, **more)["report"]
        assert report["follows_bytes"] > 0
        assert self.services[to].is_fetching()
        return report

    def await_complete(self, of: str = "target") -> None:
        """Let what follows come, and wait until a node has all of what it has taken."""
        self.holds.let_go()
        other = self.target if of == "source" else self.source
        self.services[of].wait_until(lambda: not self.services[of].is_fetching(), "all has come")
        assert other.followed() == set()

    def move(self, to: str = "target", **more: Any) -> dict[str, Any]:
        """Have the other node's agent move `calm` here; what it answers, or the error."""
        other = self.target if to == "source" else self.source
        body = {"node": to, "address": self.addresses[to], **more}
        return other.do("migrate", **body)

    def look(self) -> dict[str, dict[str, Any]]:
        """The session as each node that answers has it."""
        found = {}
        for name, service in self.services.items():
            if service.agent is None:
                continue
            with contextlib.suppress(LzyError):
                found[name] = service.look()
        return found

    def await_settled(self) -> tuple[str, dict[str, Any]]:
        """Once exactly one node has the session, and nothing is under way: which, and how."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = self.look()
            if len(found) == 1:
                name, session = next(iter(found.items()))
                if not session["moving_to"] and session["state"] in ("running", "hibernated"):
                    return name, session
            said = {n: s.log.read_text()[-1500:] for n, s in self.services.items()}
            assert time.monotonic() < deadline, (found, said)
            time.sleep(0.02)

    def prove(self, program: Program) -> str:
        """The session is in one place, whole, and there is no second process of it; where."""
        name, session = self.await_settled()
        if session["state"] == "hibernated":
            session = self.services[name].do("wake")["session"]
        adopt(program, session["pid"])
        program.prove()
        assert count_copies(program) == 1
        return name


def adopt(program: Program, pid: int) -> None:
    """Talk to the process that there is now; it is the first one only if that never ended."""
    if not program.is_alive:
        program.adopt(pid)
    assert program.pid == pid


def count_copies(program: Program) -> int:
    """Living processes that run the program's very command in its folder."""
    found = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and os.readlink(entry / "cwd") == str(program.folder):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                comm = (entry / "comm").read_text()
                found += words[0] == sys.executable.encode() and not comm.startswith("lzy-")
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


__all__ = ["QUICK", "Pair", "adopt", "count_copies"]
