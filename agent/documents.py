"""What the agent tells of itself and its sessions, as documents; docs/agent.md lists the keys."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

from .clock import Clock
from .node import Agent
from .session import Session
from .state import LIVING, MIGRATING, Event


def describe_session(agent: Agent, session: Session) -> dict[str, Any]:
    """A session as `/v1/sessions` shows it."""
    record = session.record
    living = session.is_living
    settings = agent.settings_of(session)
    return {
        "name": record.name,
        "node": agent.identity.name,
        "owner_uid": record.owner_uid,
        "state": MIGRATING if agent.departures.is_leaving(record.name) else record.state,
        "since_unix_s": agent.state.clock.shown(record.since_unix_s),
        "pid": record.pid if living else None,
        "command": record.command,
        "attached_unix_s": record.attached_unix_s,
        "woken_unix_s": record.woken_unix_s,
        "epoch": record.epoch,
        "image": record.image or None,
        "image_bytes": record.image_bytes,
        "memory_bytes": session.memory_bytes,
        "peak_memory_bytes": session.peak_memory_bytes,
        "memory_limit_bytes": session.memory_limit_bytes if living else 0,
        "cpu_share": round(session.cpu_share, 4),
        "gpu_count": record.gpu_count if living else 0,
        "declared_gpu": bool(record.gpu_count) and agent.identity.declared_gpus,
        "gpu_share": 0.0,
        "idle_for_s": round(session.idle_for_s, 2),
        "verdicts": [verdict._asdict() for verdict in session.verdicts] if living else [],
        "hold_until_unix_s": _still(agent.state.clock, record.hold_until_unix_s),
        "protected_until_unix_s": _still(agent.state.clock, record.protected_until_unix_s),
        "protected_why": "its last operation failed" if record.failures else "it woke a moment ago",
        "idle_gaps_s": list(record.idle_gaps),
        "requests": {"cpu": 0.0, "memory_bytes": 0, "gpu": 0, "node": "", **record.requests},
        "waiting_since_unix_s": _shown(agent.state.clock, record.waiting_since_unix_s),
        "kept_ports": agent.ports.numbers(record.name),
        "moving_to": record.moving.get("node"),
        "operation": session.progress,
        "failure": record.failure or None,
        "exit_status": record.exit_status,
        "settings": {
            "doze_after_s": settings.doze_after_s,
            "hibernate_after_s": settings.hibernate_after_s,
            "notice_s": settings.notice_s,
        },
        "limit": agent.limits.describe(session),
    }


def _shown(clock: Clock, at_s: float | None) -> float | None:
    return None if at_s is None else clock.shown(at_s)


def _still(clock: Clock, until_s: float | None) -> float | None:
    return None if until_s is None or until_s <= clock.now_s() else clock.shown(until_s)


def describe_node(agent: Agent) -> dict[str, Any]:
    """The node as `/v1/node` shows it."""
    identity = agent.identity
    machine = _memory()
    used = sum(session.memory_bytes for session in agent.sessions.values() if session.is_living)
    return {
        "name": identity.name,
        "home": str(agent.home),
        "agent_pid": os.getpid(),
        "began_unix_s": agent.began_unix_s,
        "address": identity.address or None,
        "labels": identity.labels,
        "cpus": identity.cpus,
        "memory_bytes": identity.memory_bytes,
        "available_memory_bytes": max(
            0, min(machine["MemAvailable"], identity.memory_bytes - used)
        ),
        "gpus": identity.gpus,
        "free_gpus": agent.free_gpus,
        "declared_gpus": identity.declared_gpus,
        "price_per_hour": identity.price_per_hour,
        "draining": agent.is_draining,
        "sessions": len(agent.sessions),
        "operations": sum(s.progress is not None for s in agent.sessions.values()),
        "settings": agent.settings._asdict(),
        "now_unix_s": time.time(),
    }


def describe_event(event: Event) -> dict[str, Any]:
    """An event as `/v1/events` shows it."""
    document = event._asdict()
    del document["owner_uid"]
    return document


def write_metrics(agent: Agent) -> str:
    """The node in Prometheus' text format, version 0.0.4."""
    states: dict[str, int] = {}
    for session in agent.sessions.values():
        states[session.record.state] = states.get(session.record.state, 0) + 1
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own_bytes = int(_read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    families: list[tuple[str, str, str, list[tuple[dict[str, str], float]]]] = [
        ("lzy_sessions", "gauge", "Sessions by state.",
         [({"state": state}, number) for state, number in sorted(states.items())]),
        ("lzy_events_total", "counter", "What happened since the agent began, by kind.",
         [({"kind": kind}, number) for kind, number in sorted(agent.counters.items())]),
        ("lzy_operations", "gauge", "Operations under way.",
         [({}, sum(s.progress is not None for s in agent.sessions.values()))]),
        ("lzy_session_memory_bytes", "gauge", "Resident memory of a session that runs.",
         [({"session": s.record.name}, s.memory_bytes) for s in _living(agent)]),
        ("lzy_session_idle_seconds", "gauge", "For how long every probe has said idle.",
         [({"session": s.record.name}, round(s.idle_for_s, 2)) for s in _living(agent)]),
        ("lzy_session_cpu_cores", "gauge", "CPU of a session over the last sample.",
         [({"session": s.record.name}, round(s.cpu_share, 4)) for s in _living(agent)]),
        ("lzy_agent_resident_memory_bytes", "gauge", "Memory of the agent.", [({}, own_bytes)]),
        ("lzy_agent_cpu_seconds_total", "counter", "CPU time of the agent.",
         [({}, round(usage.ru_utime + usage.ru_stime, 3))]),
    ]  # fmt: skip
    lines = []
    for name, kind, words, values in families:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value}" for labels, value in values]
    return "\n".join(lines) + "\n"


def _living(agent: Agent) -> list[Session]:
    return [s for s in agent.sessions.values() if s.record.state in LIVING]


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = [f'{name}="{_escape(value)}"' for name, value in labels.items()]
    return "{" + ",".join(pairs) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _memory() -> dict[str, int]:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) == 3}


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
