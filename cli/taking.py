"""`lzy attach`: a program on somebody's terminal goes to one that lzy keeps, and is shown there."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..agent.client import Client
    from ..checkpoint.takeover import Place

_SHOWS_WITHIN_S = 5.0


def attach_and_take(client: Client, pid: int, body: dict[str, Any]) -> dict[str, Any]:
    """What the agent answers to the attach, once the process is on its new terminal.

    What cannot be is refused before anything is done.
    """
    from ..agent.terminal.starting import Line, start_keeper
    from ..checkpoint.errors import LzyError
    from ..checkpoint.kept import find_kept
    from ..checkpoint.takeover import look_at_terminal, take_over
    from .pane import read_pane

    place = look_at_terminal(pid)
    notes = []
    if "hibernate_after_s" not in body["settings"]:  # it would vanish from under somebody's hands
        body = {**body, "settings": {**body["settings"], "hibernate_after_s": None}}
        notes.append("it dozes when idle; with --hibernate-after TIME it is hibernated, too")
    known = [session["pid"] for session in client.get("/v1/sessions")["sessions"]]
    answer = client.post("/v1/sessions", {**body, "checkpoint": False}, timeout_s=60)
    name = answer["session"]["name"]
    earlier = find_kept(name)  # of one who was killed before the process was on it
    if earlier:
        device = earlier.device
    else:
        device = start_keeper(
            name,
            rows=place.rows or 24,
            columns=place.columns or 80,
            settings=place.settings,
            state="hibernating",  # what is typed waits, and nothing is painted when it passes
            screen=read_pane(pid, place) or b"",
        ).device
    try:
        with _Bridge(name, pid, place, device):
            take_over(pid, place, device)
            with Line(name) as line:
                line.ask("state", state="running", pid=pid)
    except LzyError:
        with Line(name) as line:
            line.ask("state", state="gone")
        if pid not in known:
            client.post(client.session(name, "detach"))
        raise
    client.post(client.session(name, "checkpoint"), {"wait": False})
    answer["notes"] = [f"lzy console {name} connects to its terminal, from anywhere", *notes]
    return answer


class _Bridge:
    """Whoever shows the program in the old terminal, ready while the block takes it from there."""

    def __init__(self, session: str, program: int, place: Place, device: str) -> None:
        plan = {"session": session, "program": program, "shell": place.shell_pid}
        plan |= {"device": place.device, "kept": device}
        self._words = [sys.executable, "-P", "-m", "lzy.cli.bridge", json.dumps(plan)]

    def __enter__(self) -> None:
        from ..agent.terminal.starting import log_path
        from ..checkpoint.errors import LzyError
        from ..checkpoint.home import home

        hears, self._go = os.pipe2(os.O_CLOEXEC)
        self._ready, tells = os.pipe2(os.O_CLOEXEC)
        with open(log_path(), "ab") as log:
            middle = os.fork()  # so that it is not our child: nobody here would wait for it
            if middle == 0:
                try:
                    subprocess.Popen(
                        self._words, stdin=hears, stdout=tells, stderr=log,
                        env={**os.environ, "LZY_HOME": str(home())}, start_new_session=True,
                    )  # fmt: skip
                finally:
                    os._exit(0)
            os.waitpid(middle, 0)
        os.close(hears)
        os.close(tells)
        if not os.read(self._ready, 1):
            self.__exit__()
            raise LzyError(
                "nothing could be started that shows the program in its terminal",
                remedy=f"see {log_path()}",
            )

    def __exit__(self, *_: object) -> None:
        """Have it look where the program is now, and wait until it shows it there."""
        os.close(self._go)
        select.select([self._ready], [], [], _SHOWS_WITHIN_S)
        os.close(self._ready)
