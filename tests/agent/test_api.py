"""The agent's doors: who may do what, and what becomes of requests that are none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Service

from lzy.agent.api import ROUTES
from lzy.checkpoint.errors import LzyError

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

STRANGER = 54321
SLEEPER = [sys.executable, "-c", "input()"]


@pytest.fixture
def open_service(nothing_left_behind: None) -> Iterator[Service]:
    """An agent that every user of the machine may talk to."""
    home = Path(tempfile.mkdtemp(prefix="lzy-test-"))
    (home / "run").mkdir()
    for folder in (home, home / "run"):
        folder.chmod(0o711)
    made = Service(home)
    try:
        made.begin(LZY_ALL_USERS="1").set()
        yield made
    finally:
        made.close()
        shutil.rmtree(home)


def ask_as(uid: int, service: Service, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, document) of a request made by another user."""
    code = (
        "import http.client, json, os, socket, sys\n"
        "path, method, target, body = sys.argv[1:]\n"
        "os.setgroups([]); os.setresgid(*3 * [54321]); os.setresuid(*3 * [54321])\n"
        "c = http.client.HTTPConnection('x')\n"
        "c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(path)\n"
        "c.request(method, target, body or None); r = c.getresponse()\n"
        "print(r.status); print(r.read().decode())"
    ).replace("54321", str(uid))
    text = "" if body is None else json.dumps(body)
    command = [sys.executable, "-c", code, str(service.client.path), method, path, text]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, text=True)
    status, _, document = done.stdout.partition("\n")
    return int(status), json.loads(document) if document.startswith("{") else document


def test_one_user_cannot_touch_anothers_session(start: Start, open_service: Service) -> None:
    """Every verb on another's session is refused, changes nothing, and stands in the events."""
    service = open_service
    program = start(command=SLEEPER)
    service.attach(program)
    before = service.look()
    bodies = {"hold": {"for_s": 5}, "signal": {"signal": 9}, "set_session": {"settings": {}}}
    bodies |= {"migrate": {"node": "x", "address": "x:1"}, "requests": {"requests": {}}}
    doors = [route for route in ROUTES if "{name}" in route.path]
    for route in doors:
        path = route.path.replace("{name}", "calm")
        body = None if route.method == "GET" else bodies.get(route.handle, {})
        status, document = ask_as(STRANGER, service, route.method, path, body)
        assert status == 403, (route, document)
        assert document["kind"] == "AccessDenied"
    assert ask_as(STRANGER, service, "POST", "/v1/sessions", {"pid": program.pid})[0] == 403
    assert ask_as(STRANGER, service, "GET", "/v1/metrics")[0] == 403
    assert ask_as(STRANGER, service, "POST", "/v1/node/settings", {"settings": {}})[0] == 403
    assert ask_as(STRANGER, service, "GET", "/v1/sessions")[1]["sessions"] == []
    assert ask_as(STRANGER, service, "GET", "/v1/events")[1]["events"] == []
    kinds = service.kinds()
    assert kinds.count("refused") == len(doors)
    volatile = {"idle_for_s", "verdicts", "cpu_share", "memory_bytes", "peak_memory_bytes"}
    after = service.look()
    assert {k: before[k] for k in before if k not in volatile} == {
        k: after[k] for k in after if k not in volatile
    }
    assert program.is_alive


def test_users_own_sessions(start: Start, open_service: Service) -> None:
    """A user attaches their own process and uses it; root may use it too."""
    program = start(
        command=[
            *("setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups"),
            *("/usr/bin/env", "sleep", "1000"),
        ]
    )
    service = open_service
    service.wait_until(
        lambda: (
            os.stat(f"/proc/{program.pid}").st_uid == STRANGER
            and "sleep" in Path(f"/proc/{program.pid}/comm").read_text()
        ),
        "it is the user's",
    )
    asked = {"pid": program.pid, "name": "theirs"}
    status, document = ask_as(STRANGER, service, "POST", "/v1/sessions", asked)
    assert (status, document["session"]["owner_uid"]) == (200, STRANGER)
    path = "/v1/sessions/theirs"
    assert ask_as(STRANGER, service, "POST", f"{path}/hibernate", {})[0] == 200
    program.await_end()
    assert ask_as(STRANGER + 1, service, "POST", f"{path}/wake", {})[0] == 403
    status, document = ask_as(STRANGER, service, "POST", f"{path}/wake", {})
    assert status == 200
    program.adopt(document["session"]["pid"])
    assert os.stat(f"/proc/{program.pid}").st_uid == STRANGER
    assert service.do("hold", "theirs", for_s=1)["session"]["name"] == "theirs"


BAD = [
    ("GET", "/", None, 404),
    ("GET", "/v1/sessions/nobody", None, 404),
    ("DELETE", "/v1/sessions", None, 405),
    ("POST", "/v1/sessions", b"{", 400),
    ("POST", "/v1/sessions", b"[]", 400),
    ("POST", "/v1/sessions", b"{}", 400),
    ("POST", "/v1/sessions", b'{"pid": "1"}', 400),
    ("POST", "/v1/sessions", b'{"pid": true}', 400),
    ("POST", "/v1/sessions", b'{"pid": 1e99}', 400),
    ("POST", "/v1/sessions", b'{"pid": NaN}', 400),
    ("POST", "/v1/sessions", b'{"pid": 4194303}', 404),
    ("POST", "/v1/sessions", b'{"pid": 1, "nmae": "x"}', 400),
    ("POST", "/v1/sessions", b'{"pid": 1, "settings": {"doze_after_s": -1}}', 400),
    ("POST", "/v1/sessions", b'{"pid": 1, "settings": {"sample_s": 1}}', 400),
    ("POST", "/v1/sessions", b"[" * 60000, 400),
    ("POST", "/v1/sessions", b" " * 70000, 413),
    ("POST", "/v1/node/settings", b'{"settings": {"sample_s": null}}', 400),
    ("GET", "/v1/events?last=-1", None, 400),
    ("GET", "/v1/events?first=1", None, 400),
    ("GET", "/v1/" + "x" * 5000, None, 400),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("home"))
    try:
        yield made.begin()
    finally:
        made.close()


def send(service: Service, content: bytes) -> bytes:
    """All that is answered to these bytes."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(str(service.client.path))
        asked.settimeout(30)
        answer = b""
        try:
            asked.sendall(content)
            asked.shutdown(socket.SHUT_WR)
            while piece := asked.recv(65536):
                answer += piece
        except ConnectionError:
            pass  # it has heard enough
        return answer


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_told(
    running: Service, method: str, path: str, body: bytes | None, status: int
) -> None:
    """A wrong request is answered with its status, and with words and a remedy in JSON."""
    head = f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body or b'')}\r\n\r\n"
    answer = send(running, head.encode() + (body or b""))
    first, _, rest = answer.partition(b"\r\n")
    assert first.split()[1] == str(status).encode()
    document = json.loads(rest.partition(b"\r\n\r\n")[2])
    assert document["error"]
    assert set(document) == {"error", "kind", "remedy", "exit_status"}


heads = st.sampled_from([b"GET /v1/node HTTP/1.1", b"POST /v1/sessions HTTP/1.1", b"GET", b""])
fields = st.lists(st.binary(max_size=40), max_size=3)


@given(head=heads, lines=fields, body=st.binary(max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_noise_is_answered_or_refused(
    running: Service, head: bytes, lines: list[bytes], body: bytes
) -> None:
    """Whatever is sent, the agent answers in HTTP or closes; and goes on answering others."""
    answer = send(running, b"\r\n".join([head, *lines, b"", body]))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert b" 500 " not in answer.split(b"\r\n")[0]
    assert running.client.get("/v1/node")["sessions"] == 0


def test_interface_describes_itself(running: Service) -> None:
    """Every route is in the OpenAPI document, with what its body may hold."""
    document = running.client.get("/v1/openapi.json")
    described = {
        (method.upper(), path) for path, doors in document["paths"].items() for method in doors
    }
    assert described == {(route.method, route.path) for route in ROUTES}
    schema = document["paths"]["/v1/sessions"]["post"]["requestBody"]["content"]
    assert schema["application/json"]["schema"]["required"] == ["pid"]


def test_metrics(running: Service) -> None:
    """Prometheus' text format: each line a comment, or a name, labels and a number."""
    answer = send(running, b"GET /v1/metrics HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2].decode()
    values = [line.rsplit(" ", 1) for line in answer.splitlines() if not line.startswith("#")]
    assert all(float(value) >= 0 for _, value in values)
    assert "lzy_agent_resident_memory_bytes" in dict(values)


def test_refusals_of_the_engine_are_told(start: Start, running: Service) -> None:
    """What cannot be dumped is refused when it is attached, with the engine's own words."""
    program = start("heap")
    with pytest.raises(LzyError, match="lzy's own agent"):
        running.client.post("/v1/sessions", {"pid": running.agent.pid})  # type: ignore[union-attr]  # it runs
    with pytest.raises(LzyError, match="kernel thread"):
        running.client.post("/v1/sessions", {"pid": 2})
    with pytest.raises(LzyError, match="first process of this system"):
        running.client.post("/v1/sessions", {"pid": 1})
    with pytest.raises(LzyError, match="checkpoints"):
        running.client.post("/v1/sessions", {"pid": program.pid, "name": "x@3"})
