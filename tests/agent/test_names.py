"""Sessions begin on several nodes at once, and each has a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pytest
from fleet_of_two import Migrator
from pair import Pair

from lzy.agent.client import Client
from lzy.checkpoint.errors import Busy, LzyError

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


@pytest.fixture
def pair(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    made = Pair(tmp_path, own_stores=True)  # so that no image tells which names there are
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def migrator(tmp_path: Path, pair: Pair) -> Iterator[Migrator]:
    made = Migrator(tmp_path, pair)
    made.give_names()
    try:
        yield made.begin().await_up()
    finally:
        made.end()


def all_at_once(asked: list[tuple[Client, dict[str, Any]]]) -> list[dict[str, Any] | Busy]:
    """What each attach was answered, when all are asked for at the same moment."""
    ready = Barrier(len(asked))

    def attach(one: tuple[Client, dict[str, Any]]) -> dict[str, Any] | Busy:
        ready.wait()
        try:
            answer = one[0].post("/v1/sessions", one[1])
        except Busy as error:
            return error
        found: dict[str, Any] = answer["session"]
        return found

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(attach, asked))


def test_no_name_is_given_twice(pair: Pair, migrator: Migrator, start: Start) -> None:
    """Attached without one, on two nodes and on each several at once, and through the migrator."""
    programs = [start("heap").await_ready() for _ in range(6)]
    pair.begin()
    ways: list[tuple[Client, dict[str, Any]]] = [
        (migrator.client, {"node": "source"}),
        (migrator.client, {"node": "target"}),
        *[(pair.source.client, {"checkpoint": False})] * 2,
        *[(pair.target.client, {"checkpoint": False})] * 2,
    ]
    found = all_at_once([
        (client, {"pid": program.pid, **more})
        for program, (client, more) in zip(programs, ways, strict=True)
    ])  # fmt: skip
    names = {answer["name"] for answer in found if isinstance(answer, dict)}
    assert len(names) == len(programs), found
    told = migrator.client.get("/v1/sessions")["sessions"]
    assert {session["name"] for session in told} == names


def test_programs_that_are_started_at_once_have_names_of_their_own(pair: Pair) -> None:
    """Whoever asks before the other's program has begun gets the next one."""
    pair.begin()

    def ask() -> str:
        return str(pair.source.client.post("/v1/names", {"command": "sleep 9"})["name"])

    assert [ask(), ask()] == ["sleep", "sleep-2"]


def test_one_of_two_has_the_name_that_both_want(
    pair: Pair, migrator: Migrator, start: Start
) -> None:
    """The other is refused, and its process is nobody's session. So is who would begin it later."""
    programs = [start("heap").await_ready() for _ in range(3)]
    pair.begin()
    nodes = [pair.source, pair.target]
    found = all_at_once([
        (node.client, {"pid": program.pid, "name": "mine", "checkpoint": False})
        for node, program in zip(nodes, programs, strict=False)
    ])  # fmt: skip
    assert sum(isinstance(answer, Busy) for answer in found) == 1, found
    told = migrator.client.get("/v1/sessions")["sessions"]
    assert [session["name"] for session in told] == ["mine"]
    free = pair.source.client.post("/v1/names", {"command": "python x.py", "name": "next"})
    assert free["name"] == "next"  # which it may call a session that it is about to start
    late = {"pid": programs[2].pid, "name": "next", "checkpoint": False}
    with pytest.raises(Busy, match="another node has a session next"):
        pair.target.client.post("/v1/sessions", late)
    pair.source.client.post("/v1/sessions", late)


def test_nobody_is_named_while_nobody_knows(pair: Pair, migrator: Migrator, start: Start) -> None:
    """Without the migrator no session begins, and none is lost; a silent node keeps its names."""
    program, other = start("heap").await_ready(), start("heap").await_ready()
    pair.begin()
    first = {"pid": program.pid, "name": "mine", "checkpoint": False}
    pair.source.client.post("/v1/sessions", first)
    migrator.client.get("/v1/sessions")
    wanted = {"pid": other.pid, "name": "mine", "checkpoint": False}
    pair.source.end()
    with pytest.raises(Busy, match="another node has a session mine"):
        pair.target.client.post("/v1/sessions", wanted)
    migrator.end()
    with pytest.raises(LzyError, match="is not known"):
        pair.target.client.post("/v1/sessions", {**wanted, "name": "other"})
    assert pair.target.client.get("/v1/sessions")["sessions"] == []
    migrator.begin().await_up()
    pair.target.client.post("/v1/sessions", {**wanted, "name": "other"})
    other.prove()
