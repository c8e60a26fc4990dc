"""`lzy attach --take-terminal`: a program leaves somebody's terminal for one that lzy keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..agent.client import Client


def attach_and_take(client: Client, pid: int, body: dict[str, Any]) -> dict[str, Any]:
    """What the agent answers to the attach, once the process is on its new terminal.

    What cannot be is refused before anything is done.
    """
    from ..agent.terminal.starting import Line, start_keeper
    from ..checkpoint.errors import LzyError
    from ..checkpoint.kept import find_kept
    from ..checkpoint.takeover import look_at_terminal, take_over

    place = look_at_terminal(pid)
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
            state="waking",
        ).device
    try:
        take_over(pid, place, device)
    except LzyError:
        with Line(name) as line:
            line.ask("state", state="gone")
        if pid not in known:
            client.post(client.session(name, "detach"))
        raise
    with Line(name) as line:
        line.ask("state", state="running", pid=pid)
    client.post(client.session(name, "checkpoint"), {"wait": False})
    answer["notes"] = [f"it is on a terminal of lzy's now: lzy console {name} connects to it"]
    return answer
