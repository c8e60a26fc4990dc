"""The agent's doors, fuzzed from the OpenAPI document that it hands out itself (schemathesis).

Whatever is sent: no failure of the agent, no crash, no session lost; answers are what the document
says, and every error has its documented shape. What would touch others' processes is bent to the
test's own before it is sent.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from living import reap

# Of `lzy[test]`; whoever runs tests in an environment of their own may lack it.
schemathesis = pytest.importorskip("schemathesis")

if TYPE_CHECKING:
    from living import Program
    from service import Service

    Start = Callable[..., Program]

NOBODY = 1 << 22  # a pid that no process can have
HARMLESS = 28  # SIGWINCH
TEAR_DOWN = ("detach",)
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@contextlib.contextmanager
def bridge(path: Path) -> Iterator[str]:
    """A port of this machine that leads to the agent's socket; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(path))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def bend(case: Any, door: str, name: str, pid: int) -> None:
    """Have a request be about the test's own session and process, where it is about any."""
    assume((case.query or {}).get("follow") != "1")  # an answer without an end
    if name and case.path_parameters and "name" in case.path_parameters:
        assume(door not in TEAR_DOWN)
        case.path_parameters["name"] = name
    if not isinstance(case.body, dict):
        return
    settings = case.body.get("settings")
    for key in ("notice_s", "sample_s"):  # else an eviction takes as long as it says
        if isinstance(settings, dict) and isinstance(settings.get(key), (int, float)):
            settings[key] = min(settings[key], 0.1)
    wanted = case.body.get("requests")
    if isinstance(wanted, dict) and isinstance(wanted.get("memory_bytes"), int):
        wanted["memory_bytes"] = max(wanted["memory_bytes"], 1 << 30)  # a bound: less would kill
    if isinstance(case.body.get("pid"), int):
        case.body["pid"] = pid
    if isinstance(case.body.get("signal"), int) and 1 <= case.body["signal"] <= 64:
        case.body["signal"] = HARMLESS


def fuzz(service: Service, program: Program, examples: int) -> None:
    """Send `examples` right and as many wrong requests through each door, and look at answers."""
    document = service.client.get("/v1/openapi.json")
    schema = schemathesis.openapi.from_dict(document)
    checks = [getattr(schemathesis.checks, name, None) for name in CHECKED]
    known = schemathesis.checks.CHECKS
    found = [check or known.get_one(name) for check, name in zip(checks, CHECKED, strict=True)]
    with bridge(service.client.path) as url:
        for each in schema.get_all_operations():
            operation = each.ok()
            door = operation.definition.raw["operationId"]
            for mode in schemathesis.GenerationMode:
                requests = operation.as_strategy(generation_mode=mode)
                with contextlib.suppress(Unsatisfiable):  # no such request can be made
                    send_many(url, requests, found, door, program.pid, examples)


def send_many(
    url: str, requests: Any, checks: list[Any], door: str, own: int, examples: int
) -> None:
    """Send `examples` requests, and look at what is answered."""

    @given(requests, st.sampled_from(["", "calm"]), st.sampled_from([NOBODY - 1, own]))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=examples < 20,
    )
    def send(case: Any, name: str, pid: int) -> None:
        bend(case, door, name, pid)
        reap(own)  # it was hibernated before: its number is free again
        answer = case.call(base_url=url, timeout=60)
        case.validate_response(answer, checks=checks)
        if answer.status_code >= 400:
            told = answer.json()
            assert set(told) == {"kind", "error", "remedy", "exit_status"}
            assert told["error"]

    send()


def survive(start: Start, service: Service, examples: int) -> None:
    program = start("heap").await_ready()
    service.begin().set()
    service.attach(program)
    began = service.client.get("/v1/node")["agent_pid"]
    fuzz(service, program, examples)
    assert service.client.get("/v1/node")["agent_pid"] == began
    assert "Traceback" not in service.log.read_text(), service.log.read_text()[-3000:]
    service.client.post("/v1/node/drain", {"draining": False})
    service.wait_until(lambda: not service.look()["operation"], "all that was begun has ended")
    reap(program.pid)
    session = service.do("wake")["session"]
    if session["epoch"] > 1:
        program.adopt(session["pid"])
    program.prove()


def test_every_door_withstands_what_the_document_allows_and_forbids(
    start: Start, service: Service
) -> None:
    """A few right and wrong requests through each door; the session is whole after them."""
    survive(start, service, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_door_withstands_many_requests(start: Start, service: Service) -> None:
    """The same, long and by chance."""
    survive(start, service, 20)
