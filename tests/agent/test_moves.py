"""Sessions move between agents; whoever is killed at whichever step, there is one of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import PATIENCE_S, kill_lzy, wait_readable
from pair import Pair, adopt, count_copies

from lzy.agent import authority
from lzy.agent.peers import Peer
from lzy.checkpoint.errors import Busy, Damaged, LzyError
from lzy.checkpoint.journal import journal_path, read_status
from lzy.checkpoint.store import Store

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


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


@pytest.fixture
def apart(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    """Two nodes with stores of their own, of which neither fetches before a wake what is left."""
    made = Pair(tmp_path, own_stores=True)
    try:
        yield made.begin(move_at_once_bytes=0)
    finally:
        made.close()


def test_what_was_written_last_follows(apart: Pair, start: Start) -> None:
    """It runs before all has come: its memory comes as it is touched, and whole packs behind it;
    until then nobody can remove what it needs at the node that it left."""
    program = start("memory_pattern", "12").await_ready()
    apart.source.attach(program)
    apart.follow()
    (image,) = apart.source.followed()
    with Store.open(apart.source.home / "store") as store, pytest.raises(Busy, match="in use"):
        store.remove(image)
    with Store.open(apart.target.home / "store") as store, pytest.raises(Damaged, match="missing"):
        store.verify(image)
    assert apart.prove(program) == "target"
    apart.await_complete()
    with Store.open(apart.target.home / "store") as store:
        store.verify(image)
    with Store.open(apart.source.home / "store") as store:
        store.remove(image)
    apart.move("source")
    assert apart.prove(program) == "source"


@pytest.mark.parametrize(
    "who", ["source", *(pytest.param(who, marks=pytest.mark.slow) for who in ("target", "pager"))]
)
def test_killed_while_memory_follows(apart: Pair, start: Start, who: str) -> None:
    """The session stalls where it lacks memory, and goes on when that can be had; no byte is wrong,
    and there is one of it."""
    program = start("memory_pattern", "12").await_ready()
    apart.source.attach(program)
    pid = apart.follow()["pid"]
    if who == "pager":
        journal = journal_path(apart.target.home / "run", pid)
        kill_lzy(read_status(journal)[1].pager_pid)
    else:
        apart.services[who].kill()
        adopt(program, pid)
        program.say("ping")  # it may answer, or stall
        apart.holds.hold("move.fetching")
        apart.services[who].begin(**apart.holds.environment)
        program.hear(PATIENCE_S)
    assert apart.prove(program) == "target"
    apart.await_complete()
    apart.move("source")
    assert apart.prove(program) == "source"


def test_session_stalls_until_its_memory_can_be_had(apart: Pair, start: Start) -> None:
    """With neither the node it left nor all of its memory here it waits; it sees no zeros."""
    program = start("memory_pattern", "12").await_ready()
    apart.source.attach(program)
    pid = apart.follow()["pid"]
    apart.source.kill()
    adopt(program, pid)
    program.say("prove")
    assert not wait_readable([program._answers], 0.5), "its last pages cannot have come"
    apart.source.begin()
    assert "false" not in program.hear(PATIENCE_S)
    assert apart.prove(program) == "target"
    apart.await_complete()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("tree_loader",), ("tree_workers", "loky")], ids=lambda c: c[0]
)
def test_workers_move_with_their_leader(
    apart: Pair, start: Start, command: tuple[str, ...]
) -> None:
    """A loader of torch in mid-epoch, a pool of processes: there and back, with all below them."""
    program = start(*command).await_ready()
    apart.source.attach(program)
    for to in ("target", "source"):
        apart.move(to)
        assert apart.await_settled()[0] == to
        adopt(program, apart.services[to].look()["pid"])
        program.prove()
        apart.await_complete(to)


@pytest.mark.slow
def test_session_that_sleeps_before_all_has_come(apart: Pair, start: Start) -> None:
    """Killed, it is woken from an image that is still on its way; what that lacks is read there."""
    program = start("memory_pattern", "12").await_ready()
    apart.source.attach(program)
    pid = apart.follow()["pid"]
    adopt(program, pid)
    program.end()
    apart.target.wait_until(lambda: not apart.target.look()["pid"], "its end is seen")
    assert apart.target.is_fetching()
    pid = apart.target.do("wake")["session"]["pid"]
    program.adopt(pid)
    assert apart.prove(program) == "target"
    apart.await_complete()


@pytest.mark.slow
def test_move_is_held_to_a_bandwidth(apart: Pair, start: Start) -> None:
    """No more is fetched in a second than was said."""
    program = start("memory_pattern", "12").await_ready()
    apart.source.attach(program)
    began_s = time.monotonic()
    report = apart.move(bytes_per_s=1_000_000)["report"]
    took_s = time.monotonic() - began_s
    assert report["sent_bytes"] > 400_000
    assert took_s > 0.8 * report["sent_bytes"] / 1e6
    assert apart.prove(program) == "target"


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
    as_target = authority.client_context(authority.fleet_folder(pair.target.home))
    source = Peer(pair.addresses["source"], authority.node_subject("source"), as_target)
    with pytest.raises(Busy, match="on its way"):  # else it would be read here for ever
        source.post("/v1/departures/calm/2/complete", {})
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
