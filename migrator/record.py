"""Records: decisions as JSON, with the facts that they came from, so that they can be made again.

One record is one JSON object in one line: `version`, `now_s`, `settings`, `fleet`, `decisions`.
`replay` makes the decisions again from the facts; if the rules have not changed, they are equal.
"""

from __future__ import annotations

import json
from typing import Any

from .facts import (
    NEVER_S,
    Fleet,
    NodeFacts,
    Requests,
    SessionFacts,
    Settings,
    Slack,
    Usage,
    Verdict,
)
from .placement import Refusal
from .policy import Decision, decide

VERSION = 1


def write_record(fleet: Fleet, settings: Settings, now_s: float, decisions: list[Decision]) -> str:
    """One line of JSON: the decisions and all that they depended on."""
    document = {
        "version": VERSION,
        "now_s": now_s,
        "settings": _plain(settings._asdict()),
        "fleet": {
            "nodes": [_plain(node._asdict()) for node in fleet.nodes],
            "sessions": [_plain(session._asdict()) for session in fleet.sessions],
            "users": {str(uid): usage._asdict() for uid, usage in fleet.users.items()},
        },
        "decisions": [_plain(decision._asdict()) for decision in decisions],
    }
    return json.dumps(document)


def read_record(line: str) -> tuple[Fleet, Settings, float, list[Decision]]:
    """What `write_record` wrote. Raises ValueError for anything else."""
    try:
        document = json.loads(line)
        if document["version"] != VERSION:
            raise ValueError(f"record of version {document['version']}, not {VERSION}")
        fleet = Fleet(
            tuple(_node(row) for row in document["fleet"]["nodes"]),
            tuple(_session(row) for row in document["fleet"]["sessions"]),
            {int(uid): Usage(**row) for uid, row in document["fleet"]["users"].items()},
        )
        decisions = [
            Decision(**{**row, "refusals": tuple(Refusal(**r) for r in row["refusals"])})
            for row in document["decisions"]
        ]
        return fleet, _settings(document["settings"]), document["now_s"], decisions
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a record of decisions: {error!r}") from error


def replay(line: str) -> list[Decision]:
    """The decisions that today's rules make of the facts in a record."""
    fleet, settings, now_s, _ = read_record(line)
    return decide(fleet, settings, now_s)


def _plain(value: Any) -> Any:
    """Tuples with names as objects, sets as sorted lists; json does the rest."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if value == NEVER_S else value  # JSON has no infinity


def _node(row: dict[str, Any]) -> NodeFacts:
    files = row["files"]
    return NodeFacts(**{**row, "cpu_features": frozenset(row["cpu_features"]),
                        "files": None if files is None else frozenset(files)})  # fmt: skip


def _session(row: dict[str, Any]) -> SessionFacts:
    return SessionFacts(
        **{
            **row,
            "verdicts": tuple(Verdict(**verdict) for verdict in row["verdicts"]),
            "idle_gaps_s": tuple(row["idle_gaps_s"]),
            "gpu_gaps_s": tuple(row["gpu_gaps_s"]),
            "slack": Slack(**row["slack"]),
            "requests": Requests(**row["requests"]),
            "cpu_features": frozenset(row["cpu_features"]),
            "files": frozenset(row["files"]),
        }
    )


def _settings(row: dict[str, Any]) -> Settings:
    def plain(figures: dict[str, Any]) -> dict[str, Any]:
        return {name: NEVER_S if figure is None else figure for name, figure in figures.items()}

    per_user = {int(uid): plain(own) for uid, own in row["per_user"].items()}
    per_session = {name: plain(own) for name, own in row["per_session"].items()}
    return Settings(**{**plain(row), "per_user": per_user, "per_session": per_session})
