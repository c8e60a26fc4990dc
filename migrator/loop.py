"""The loop: asks all agents for facts, has `policy.decide` say what to do, and tells the agents.

It keeps nothing but what sessions' gaps have taught about their windows, which may be lost: killed
at any moment and started again, it decides from the facts that it finds. What it decided, and from
which facts, is appended to `migrator/decisions.jsonl` of its home, from which it can be made again.
"""

from __future__ import annotations

import contextlib
import sys
import time

from ..agent.clock import Clock
from ..checkpoint.errors import Busy, LzyError
from ..checkpoint.stages import reach
from .facts import Fleet as Facts
from .facts import SessionFacts, Settings, Slack
from .fleet import Fleet, Look
from .idleness import DOZE, GIVE_GPU_BACK, HIBERNATE, remember_gap
from .moves import find_session
from .policy import MIGRATE, WAIT, Decision, decide
from .reading import read_fleet, read_settings
from .record import write_record

_MOST_RECORD_BYTES = 32 << 20
UNREACHABLE_PAUSE_S = 1.0
_WAITS_TOLD_EVERY_S = 60.0


class Loop:
    """Decides about the sessions of all nodes, round after round."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._clock = Clock()
        self._records = fleet.folder / "migrator" / "decisions.jsonl"
        self._records.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._gaps: dict[str, tuple[float, ...]] = {}
        self._slacks: dict[str, Slack] = {}
        self._told: dict[str, tuple[str, float]] = {}

    def go_round(self) -> float:
        """Ask, decide, tell; how long to wait until the next round, in seconds."""
        looks = self._fleet.look()
        reach("migrator.looked")
        if all(look.failure for look in looks):
            return UNREACHABLE_PAUSE_S
        settings = read_settings(looks)
        now_s = self._clock.now_s()
        facts = self._learn(read_fleet(looks, self._slacks, now_s), settings)
        decisions = decide(facts, settings, now_s)
        if decisions:
            reach("migrator.decided")
            self._write(facts, settings, now_s, decisions)
            reach("migrator.recorded")
        for decision in decisions:
            try:
                self._carry_out(decision, looks)
                reach("migrator.told")
            except Busy:
                pass  # something is done to it already
            except LzyError as error:
                log(f"{decision.action} {decision.session}: {error}")
        return settings.sample_s

    def _learn(self, facts: Facts, settings: Settings) -> Facts:
        """Have windows follow the gaps that have ended since the last round (`idleness`)."""
        learnt = []
        for session in facts.sessions:
            known = self._gaps.get(session.name)
            gaps = session.idle_gaps_s
            if known is not None and gaps != known:
                new = gaps[len(known) :] if gaps[: len(known)] == known else gaps[-1:]
                told: SessionFacts = session._replace(idle_gaps_s=known)
                for gap_s in new:
                    told = remember_gap(told, gap_s, settings)
                self._slacks[session.name] = told.slack
                session = session._replace(slack=told.slack)
            self._gaps[session.name] = gaps
            learnt.append(session)
        return facts._replace(sessions=tuple(learnt))

    def _carry_out(self, decision: Decision, looks: list[Look]) -> None:
        """Tell the agent, which looks once more before it does it; it may refuse."""
        if decision.action == WAIT:
            self._tell_wait(decision)
            return
        look, session = find_session(looks, decision.session)
        client = self._fleet.client(look.member)
        if decision.action in (DOZE, HIBERNATE):
            body = {"if_idle": True, "wait": False, "reason": decision.reason[:1000]}
            client.post(client.session(decision.session, decision.action), body, timeout_s=30)
        elif decision.action in (MIGRATE, GIVE_GPU_BACK) or decision.to != session["node"]:
            address = next(x.member.address for x in looks if x.member.name == decision.to)
            requests = {n: v for n, v in session["requests"].items() if v and n != "node"}
            if decision.action == GIVE_GPU_BACK:
                requests.pop("gpu", None)
            body = {"node": decision.to, "address": address, "requests": requests,
                    "reason": decision.reason[:1000], "wait": False}  # fmt: skip
            client.post(client.session(decision.session, "migrate"), body, timeout_s=30)
        else:  # it dozes, and is waited for
            client.post(client.session(decision.session, "rouse"), {"wait": False}, timeout_s=30)

    def _tell_wait(self, decision: Decision) -> None:
        reason, at_s = self._told.get(decision.session, ("", 0.0))
        now_s = time.monotonic()
        if reason != decision.reason or now_s - at_s > _WAITS_TOLD_EVERY_S:
            self._told[decision.session] = (decision.reason, now_s)
            log(f"{decision.session} waits: {decision.reason}")

    def _write(
        self, facts: Facts, settings: Settings, now_s: float, decisions: list[Decision]
    ) -> None:
        """Record what was decided, and from what; one file before this one is kept."""
        with contextlib.suppress(OSError):
            if self._records.stat().st_size > _MOST_RECORD_BYTES:
                self._records.rename(self._records.with_suffix(".jsonl.1"))
        try:
            with open(self._records, "a") as file:
                file.write(write_record(facts, settings, now_s, decisions) + "\n")
        except OSError as error:
            log(f"cannot record decisions: {error}")


def log(words: str) -> None:
    """Say it where the daemons' words go."""
    print(f"lzy-migrator: {words}", file=sys.stderr, flush=True)
