"""Sessions move between agents; whoever is killed at whichever step, there is one of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pair import Pair, adopt, count_copies

from lzy.checkpoint.errors import Busy, LzyError

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


@pytest.fixture
def pair(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    made = Pair(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def program(start: Start, pair: Pair) -> Program:
    """A program that knows every byte of its memory, attached at the source; both agents run."""
    made = start("memory_pattern", "12").await_ready()
    pair.begin()
    pair.source.attach(made)
    return made


def test_session_moves_there_and_back(pair: Pair, program: Program) -> None:
    """With its memory, its pid, its settings and its GPU; the node it left has forgotten it."""
    pair.source.do("settings", settings={"doze_after_s": 77})
    answer = pair.move(requests={"gpu": 1})
    assert answer["report"]["node"] == "target"
    assert pair.prove(program) == "target"
    there = pair.target.look()
    assert (there["node"], there["gpu_count"], there["declared_gpu"]) == ("target", 1, True)
    assert there["settings"]["doze_after_s"] == 77
    assert pair.target.client.get("/v1/node")["free_gpus"] == 0
    with pytest.raises(LzyError, match="no session"):
        pair.source.look()
    assert pair.source.kinds()[-1] == "migrated"
    pair.move("source", requests={})
    assert pair.prove(program) == "source"
    assert pair.target.client.get("/v1/node")["free_gpus"] == 1


@pytest.mark.slow
def test_memory_with_names_moves(pair: Pair, start: Start) -> None:
    """A tree's names in /dev/shm go from the one node to the other, with what is in them."""
    program = start("tree_names").await_ready()
    pair.begin()
    pair.source.attach(program)
    names = {name for name in os.listdir("/dev/shm") if f"-{program.pid}-" in name}
    for to in ("target", "source"):
        pair.move(to)
        there, session = pair.await_settled()
        adopt(program, session["pid"])
        program.prove()
        assert there == to
        assert names <= set(os.listdir("/dev/shm"))


def test_pages_follow_where_stores_are_apart(
    tmp_path: Path, start: Start, nothing_left_behind: None
) -> None:
    """The image is fetched from the other node, most of it while the session runs."""
    pair = Pair(tmp_path, own_stores=True)
    try:
        program = start("memory_pattern", "12").await_ready()
        pair.begin()
        pair.source.attach(program)
        sent = []
        for to in ("target", "source"):
            sent.append(pair.move(to)["report"]["sent_bytes"])
            assert pair.prove(program) == to
        assert sent[0] > 1 << 20
        assert sent[1] < sent[0]  # it has most of that already
    finally:
        pair.close()


def test_hibernated_session_moves_and_sleeps_on(pair: Pair, program: Program) -> None:
    """Without a process there is nothing to stop; it is woken there when it is wanted."""
    pair.source.do("hibernate")
    program.await_end()
    pair.move(wake=False)
    assert pair.await_settled()[0] == "target"
    assert pair.target.look()["state"] == "hibernated"
    assert pair.prove(program) == "target"


@pytest.mark.parametrize("stage", ["prepared", "asked", "answered"])
def test_source_killed_at_each_stage(pair: Pair, program: Program, stage: str) -> None:
    """The source's next agent finds out where the session is: from its record, and the target."""
    pair.source.end()
    pair.source.begin(kill_at=f"move.{stage}")
    with pytest.raises(LzyError):
        pair.move()
    pair.source.await_death()
    assert count_copies(program) <= 1
    pair.source.begin()
    where = pair.prove(program)
    assert where == ("target" if stage == "answered" else "source")


@pytest.mark.parametrize("stage", ["move.accepting", "move.accepted"])
def test_target_killed_at_each_stage(pair: Pair, program: Program, stage: str) -> None:
    """Until the target can be asked the session is woken nowhere else; then it is in one place."""
    pair.target.end()
    pair.target.begin(kill_at=stage)
    with pytest.raises(LzyError, match=r"not known|did not take"):
        pair.move()
    pair.target.await_death()
    left = pair.source.look()
    assert (left["state"], left["moving_to"]) == ("hibernated", "target")
    assert "not known" in left["failure"]
    with pytest.raises(Busy, match="on its way"):
        pair.source.do("wake")
    pair.target.begin()
    where = pair.prove(program)
    assert where == ("target" if stage == "move.accepted" else "source")


def test_both_killed(pair: Pair, program: Program) -> None:
    """The target dies before it decided, the source while it brings the session back."""
    pair.target.end()
    pair.target.begin(kill_at="move.accepting")
    pair.source.end()
    pair.source.begin(kill_at="move.back")
    with pytest.raises(LzyError):
        pair.move()
    pair.target.await_death()
    pair.target.begin()
    pair.source.await_death()
    pair.source.begin()
    assert pair.prove(program) == "source"


def test_target_that_cannot_take_it_changes_nothing(pair: Pair, program: Program) -> None:
    """It refuses before the session is stopped: what it asks for is not there, or it is drained."""
    with pytest.raises(LzyError, match="1 of 1 GPUs"):
        pair.move(requests={"gpu": 2})
    pair.target.client.post("/v1/node/drain", {"draining": True})
    with pytest.raises(Busy, match="being drained"):
        pair.move()
    session = pair.source.look()
    assert (session["state"], session["pid"]) == ("running", program.pid)
    pair.target.client.post("/v1/node/drain", {"draining": False})
    pair.move()
    adopt(program, pair.target.look()["pid"])
    program.prove()


def test_failing_wake_brings_it_back(pair: Pair, program: Program) -> None:
    """The target's restore dies: the target refuses for ever, and the source wakes it again."""
    pair.target.end()
    pair.target.begin(kill_at="restore.threads")
    with pytest.raises(LzyError, match="did not take"):
        pair.move()
    assert pair.prove(program) == "source"
    pair.target.end()
    pair.target.begin()
    pair.move()
    assert pair.prove(program) == "target"


def test_operation_killed_late_has_moved_it(pair: Pair, program: Program) -> None:
    """The restore is killed when the process lives already: that counts, not who told of it."""
    pair.target.end()
    pair.target.begin(kill_at="restore.committed")
    pair.move()
    assert pair.prove(program) == "target"


def test_only_daemons_of_the_fleet_may_ask(pair: Pair, program: Program) -> None:
    """A door for nodes is shut to users, and TLS to whoever has no certificate."""
    with pytest.raises(LzyError, match="only other nodes"):
        pair.target.client.post("/v1/arrivals/calm/2/cancel", {})
    with pytest.raises(LzyError, match="only other nodes"):
        pair.target.client.get("/v1/images/calm")
