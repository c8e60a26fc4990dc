"""Where a hibernated session wakes: on its node, unless that is full by now and another is not."""

from __future__ import annotations

from typing import Any

import pytest

from lzy.migrator.fleet import Look, Member
from lzy.migrator.idleness import GIVE_GPU_BACK, next_step
from lzy.migrator.moves import choose_for_wake
from lzy.migrator.reading import read_fleet, read_settings

GIB = 1 << 30


def look(name: str, memory_gib: float, *sessions: dict[str, Any]) -> Look:
    used = sum(s["memory_bytes"] for s in sessions if s["pid"])
    node = {
        "name": name, "cpus": 2.0, "memory_bytes": int(memory_gib * GIB), "gpus": 0,
        "available_memory_bytes": int(memory_gib * GIB) - used, "draining": False,
        "price_per_hour": 0.0, "operations": 0,
        "settings": {"sample_s": 15.0, "doze_after_s": 300.0, "hibernate_after_s": 1800.0,
                     "after_wake_s": 300.0, "operations": 2.0},
    }  # fmt: skip
    placed = [{**s, "node": name} for s in sessions]
    return Look(Member(name, f"{name}:1"), node, placed)


def session(name: str, state: str, gib: float) -> dict[str, Any]:
    held = int(gib * GIB)
    return {
        "name": name, "owner_uid": 0, "state": state, "pid": 7 if state == "running" else None,
        "since_unix_s": 0.0, "memory_bytes": held, "peak_memory_bytes": held,
        "memory_limit_bytes": 0, "image_bytes": held, "cpu_share": 0.0, "gpu_count": 0,
        "gpu_share": 0.0, "idle_for_s": 0.0, "verdicts": [], "hold_until_unix_s": None,
        "protected_until_unix_s": None, "protected_why": "", "waiting_since_unix_s": None,
        "idle_gaps_s": [], "requests": {"cpu": 0.0, "memory_bytes": 0, "gpu": 0, "node": ""},
        "settings": {"doze_after_s": 300.0, "hibernate_after_s": 1800.0},
    }  # fmt: skip


ASLEEP = session("nb", "hibernated", 0.5)


@pytest.mark.parametrize(("other_gib", "expected"), [(0.2, None), (0.7, "large")])
def test_wakes_where_there_is_room(other_gib: float, expected: str | None) -> None:
    """A neighbour that leaves no room sends it to the larger node, which is said, and why."""
    looks = [look("small", 1.2, ASLEEP, session("other", "running", other_gib)), look("large", 4)]
    choice = choose_for_wake(looks, looks[0], looks[0].sessions[0])
    assert (choice.node if choice else None) == expected
    if choice:
        assert choice.why.startswith("small has no room for it: ")
        assert [refusal["node"] for refusal in choice.refusals] == ["small"]


def test_stays_where_no_other_has_room_either() -> None:
    """Then it wakes on its node all the same: no worse than it was before it slept."""
    looks = [look("small", 1.2, ASLEEP, session("other", "running", 0.7)), look("tiny", 0.2)]
    assert choose_for_wake(looks, looks[0], looks[0].sessions[0]) is None


def test_times_of_nodes_are_of_one_clock() -> None:
    """Whatever the clocks of two nodes say, a hold of an hour is one of an hour."""
    held = {**session("nb", "running", 0.5), "hold_until_unix_s": 1e9 + 3600.0}
    looks = [look("small", 1.2, held)._replace(now_unix_s=1e9)]
    (read,) = read_fleet(looks, now_s=5000.0).sessions
    assert read.hold_until_s == 5000.0 + 3600.0
    assert read.protected_until_s is None


def test_gpu_that_is_not_open_is_idle() -> None:
    """Who has asked for a GPU and holds none open, as with a declared one, gives it back."""
    idle = {"probe": "cpu", "active": False, "reason": ""}
    gpu = {"probe": "gpu", "active": True, "reason": "it has a GPU open"}
    for verdicts, expected in (([idle], GIVE_GPU_BACK), ([idle, gpu], "")):
        told = {"gpu_count": 1, "idle_for_s": 60.0, "verdicts": verdicts}
        looks = [look("small", 1.2, {**session("nb", "running", 0.5), **told})]
        (read,) = read_fleet(looks).sessions
        assert next_step(read, read_settings(looks), 0.0).action == expected
