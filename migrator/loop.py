"""The loop: asks the agent for facts, has `policy.decide` say what to do, and tells the agent.

`python -m lzy.migrator.loop`, which `lzy up` runs beside the agent. It keeps nothing: killed at any
moment and started again, it decides from the facts that it finds. What it decided, and from which
facts, is appended to `migrator/decisions.jsonl` of its home, from which it can be made again.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..agent.client import Client, NoAgent
from ..checkpoint.errors import Busy, LzyError
from ..checkpoint.home import home
from ..checkpoint.linux.detached import set_name
from .facts import NEVER_S, Fleet, NodeFacts, Requests, SessionFacts, Settings, Verdict
from .idleness import DOZE, HIBERNATE
from .policy import WAIT, Decision, decide
from .record import write_record

_MOST_RECORD_BYTES = 32 << 20
_UNREACHABLE_PAUSE_S = 1.0


class Loop:
    """Decides about the sessions of one agent, round after round."""

    def __init__(self, folder: Path) -> None:
        self._client = Client(folder)
        self._records = folder / "migrator" / "decisions.jsonl"
        self._records.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def go_round(self) -> float:
        """Ask, decide, tell; how long to wait until the next round, in seconds."""
        node = self._client.get("/v1/node")
        documents = self._client.get("/v1/sessions")["sessions"]
        settings = read_settings(node["settings"], documents)
        fleet = Fleet((read_node(node, documents),), tuple(map(read_session, documents)))
        now_s = float(node["now_unix_s"])
        decisions = decide(fleet, settings, now_s)
        if decisions:
            self._write(fleet, settings, now_s, decisions)
        for decision in decisions:
            self._carry_out(decision)
        return settings.sample_s

    def _carry_out(self, decision: Decision) -> None:
        """Tell the agent, which looks once more before it does it; it may refuse."""
        if decision.action not in (DOZE, HIBERNATE):
            if decision.action != WAIT:
                _log(f"cannot {decision.action} {decision.session} with one node")
            return
        path = self._client.session(decision.session, decision.action)
        body = {"if_idle": True, "wait": False, "reason": decision.reason[:1000]}
        try:
            self._client.post(path, body, timeout_s=30)
        except Busy:
            pass  # something is done to it already
        except LzyError as error:
            _log(f"{decision.action} {decision.session}: {error}")

    def _write(
        self, fleet: Fleet, settings: Settings, now_s: float, decisions: list[Decision]
    ) -> None:
        """Record what was decided, and from what; one file before this one is kept."""
        with contextlib.suppress(OSError):
            if self._records.stat().st_size > _MOST_RECORD_BYTES:
                self._records.rename(self._records.with_suffix(".jsonl.1"))
        try:
            with open(self._records, "a") as file:
                file.write(write_record(fleet, settings, now_s, decisions) + "\n")
        except OSError as error:
            _log(f"cannot record decisions: {error}")


# -- documents of an agent as facts --------------------------------------------------------------


def read_session(document: Mapping[str, Any]) -> SessionFacts:
    """The facts in what an agent says of a session."""
    return SessionFacts(
        name=document["name"],
        owner_uid=document["owner_uid"],
        state=document["state"],
        node=document["node"] if document["pid"] else "",
        since_s=document["since_unix_s"],
        memory_bytes=document["memory_bytes"],
        peak_memory_bytes=document["peak_memory_bytes"],
        image_bytes=document["image_bytes"],
        cpu_share=document["cpu_share"],
        gpu_count=document["gpu_count"],
        gpu_share=document["gpu_share"],
        idle_for_s=document["idle_for_s"],
        verdicts=tuple(Verdict(**verdict) for verdict in document["verdicts"]),
        hold_until_s=document["hold_until_unix_s"],
        protected_until_s=document["protected_until_unix_s"],
        protected_why=document["protected_why"],
        idle_gaps_s=tuple(document["idle_gaps_s"]),
        requests=Requests(**document["requests"]),
    )


def read_node(document: Mapping[str, Any], sessions: list[dict[str, Any]]) -> NodeFacts:
    """The facts in what an agent says of its node."""
    return NodeFacts(
        name=document["name"],
        cpus=float(document["cpus"]),
        memory_bytes=document["memory_bytes"],
        gpus=document["gpus"],
        used_memory_bytes=document["memory_bytes"] - document["available_memory_bytes"],
        reserved_memory_bytes=sum(s["memory_bytes"] for s in sessions if s["pid"]),
        moves=document["operations"],
    )


def read_settings(node: Mapping[str, Any], sessions: list[dict[str, Any]]) -> Settings:
    """The rules' figures as the node and its sessions have them; None of them is never."""

    def figures(found: Mapping[str, Any]) -> dict[str, float]:
        return {
            name: NEVER_S if found[name] is None else found[name]
            for name in ("doze_after_s", "hibernate_after_s")
        }

    return Settings(
        sample_s=node["sample_s"],
        doze_after_s=figures(node)["doze_after_s"],
        hibernate_after_s=figures(node)["hibernate_after_s"],
        protect_after_wake_s=node["after_wake_s"],
        moves_a_node=int(node["operations"]),
        per_session={session["name"]: figures(session["settings"]) for session in sessions},
    )


def main() -> None:
    """Go rounds until SIGTERM."""
    set_name("lzy-migrator")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    loop = Loop(home())
    while True:
        began = time.monotonic()
        try:
            pause_s = loop.go_round()
        except NoAgent:
            pause_s = _UNREACHABLE_PAUSE_S
        except LzyError as error:
            _log(str(error))
            pause_s = _UNREACHABLE_PAUSE_S
        time.sleep(max(pause_s - (time.monotonic() - began), 0.01))


def _log(words: str) -> None:
    print(f"lzy-migrator: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
