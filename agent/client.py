"""How others talk to an agent: requests over its unix socket, answers as documents or errors."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from ..checkpoint.errors import AccessDenied, LzyError, NotFound
from ..checkpoint.home import home
from . import errors
from .supervisor import is_supervised

_STARTS_WITHIN_S = 5.0
_PAUSE_S = 0.05
_ASKED_AGAIN = 3

Progress = Callable[[str, int, int], None]


class NoAgent(NotFound):
    """No agent runs for this home."""


class Unanswered(LzyError):
    """The agent died over a request, or took too long for it."""


def is_fleet(folder: Path) -> bool:
    """Whether the migrator of that home answers for several nodes."""
    return (folder / "fleet" / "nodes.json").exists()


def is_trial(folder: Path) -> bool:
    """Whether the nodes of that home are namespaces of this machine."""
    return (folder / "fleet" / "trial.json").exists()


def socket_path(folder: Path | None = None) -> Path:
    """Where the agent of a home listens."""
    return (folder or home()) / "run" / "agent.sock"


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("agent", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """An agent, by its socket; a connection for each request.

    With `fleet`, where the home has a migrator of several nodes: that, which answers for all.
    """

    def __init__(self, folder: Path | None = None, *, fleet: bool = True) -> None:
        self.path: Path = socket_path(folder)
        if fleet and is_fleet(folder or home()):
            self.path = self.path.with_name("migrator.sock")
        self.where = f"the agent at {self.path}"
        self.headers: dict[str, str] = {}

    def get(self, path: str, *, timeout_s: float | None = 30.0) -> dict[str, Any]:
        """What it answers to a GET. Raises NoAgent, or what the agent answered.

        Asked again if the agent dies over it: there may be another by then, or none.
        """
        for _ in range(_ASKED_AGAIN):
            try:
                return self._ask("GET", path, None, timeout_s)
            except Unanswered:
                time.sleep(_PAUSE_S)
        return self._ask("GET", path, None, timeout_s)

    def post(
        self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """What it answers to a POST, however long that takes."""
        return self._ask("POST", path, body or {}, timeout_s)

    def work(self, path: str, body: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
        """As `post`, for what takes long; `progress` gets stage, bytes done, bytes in all."""
        last: dict[str, Any] = {}
        with contextlib.closing(self._lines("POST", path, body)) as lines:
            for last in lines:
                if (told := last.get("progress")) and progress:
                    progress(told["stage"], told["done_bytes"], told["total_bytes"])
        if "error" in last:
            raise errors.revive(last)
        if "session" not in last:
            raise LzyError("the agent ended meanwhile", remedy="see lzy ps, and lzy up")
        return last

    def follow(self, path: str) -> Iterator[dict[str, Any]]:
        """Documents of an answer that goes on, as they come."""
        return self._lines("GET", path, None)

    def lines(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Generator[dict[str, Any], None, None]:
        """The lines of an answer as they come, the last one (`error` or not) included."""
        return self._lines(method, path, body)

    def session(self, name: str, verb: str = "") -> str:
        """The path of a session, or of what is done to it."""
        return f"/v1/sessions/{quote(name, safe='@')}" + (f"/{verb}" if verb else "")

    def _lines(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Generator[dict[str, Any], None, None]:
        connection = self._connect(None)
        try:
            headers = {"Accept": "application/x-ndjson", **self.headers}
            content = None if body is None else json.dumps(body)
            with explained(self.where):
                connection.request(method, path, content, headers)
                answer = connection.getresponse()
                if answer.status >= 300:
                    raise errors.revive(_parse(answer.read()))
                while line := answer.readline():
                    yield _parse(line)
        finally:
            connection.close()

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        connection = self._connect(timeout_s)
        try:
            with explained(self.where):
                content = None if body is None else json.dumps(body)
                headers = {"Connection": "close", **self.headers}
                connection.request(method, path, content, headers)
                answer = connection.getresponse()
                document = _parse(answer.read())
        finally:
            connection.close()
        if answer.status >= 300:
            raise errors.revive(document)
        return document

    def _connect(self, timeout_s: float | None) -> http.client.HTTPConnection:
        """A connection; if an agent is just being started (again), it is waited for."""
        folder = self.path.parent.parent
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            connection = _Connection(self.path, timeout_s)
            try:
                connection.connect()
                return connection
            except PermissionError as error:
                raise AccessDenied(
                    f"{self.path} is not open to you", remedy="lzy up --all-users opens it to all"
                ) from error
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline or not is_supervised(folder):
                    raise NoAgent(
                        f"no agent runs for {folder}", remedy="start one: lzy up"
                    ) from error
            time.sleep(_PAUSE_S)


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """What fails of a connection in words; raises Unanswered."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(
            f"{where} did not answer: {error or type(error).__name__}",
            remedy="see lzy ps; its log is in agent/agent.log of its home",
        ) from error


def _parse(text: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(text))
