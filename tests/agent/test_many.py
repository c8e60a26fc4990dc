"""Two hundred sessions, attached at once: all are looked after, and the agent stays small."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from service import Service

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

SESSIONS = 200
MOST_AGENT_BYTES = (60 + SESSIONS) << 20
ECHO = "print('ready', flush=True)\nwhile True: print(input(), flush=True)"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_sessions_attached_at_once(start: Start, service: Service) -> None:
    """All at the same moment, each by a client of its own: each gets its checkpoint, each program
    goes on, another agent knows all of them after a kill -9, and one hibernates and wakes."""
    service.begin().set(sample_s=1)
    programs = {
        f"s{number}": start(command=[sys.executable, "-S", "-c", ECHO]).await_ready()
        for number in range(SESSIONS)
    }
    began_s = time.monotonic()

    def attach(name: str) -> None:
        service.client.post("/v1/sessions", {"pid": programs[name].pid, "name": name})

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(attach, programs))
    attached_s = time.monotonic() - began_s

    def all_have_images() -> bool:
        found = service.client.get("/v1/sessions")["sessions"]
        return all(session["image"] and not session["operation"] for session in found)

    deadline = time.monotonic() + 600
    while not all_have_images():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    print(f"{SESSIONS} attached in {attached_s:.1f} s, with a checkpoint each in", end=" ")
    print(f"{time.monotonic() - began_s:.1f} s; agent {agent_bytes(service) >> 20} MiB")
    assert agent_bytes(service) < MOST_AGENT_BYTES
    for name, program in programs.items():
        assert program.ask(name) == name
    service.kill()
    service.begin()
    found = {s["name"]: s for s in service.client.get("/v1/sessions")["sessions"]}
    assert {name: (s["state"], s["pid"]) for name, s in found.items()} == {
        name: ("running", program.pid) for name, program in programs.items()
    }
    chosen = programs["s7"]
    service.do("hibernate", "s7")
    chosen.await_end()
    chosen.adopt(service.do("wake", "s7")["session"]["pid"])
    for name, program in programs.items():
        assert program.ask(name) == name
    assert agent_bytes(service) < MOST_AGENT_BYTES


def agent_bytes(service: Service) -> int:
    """Resident memory of the agent; proc_pid_status(5)."""
    assert service.agent
    lines = Path(f"/proc/{service.agent.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
