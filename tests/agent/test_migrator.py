"""The migrator is killed at every step, and asked for what is another's: no harm is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fleet_of_two import Migrator
from pair import Pair

from lzy.agent.api import ROUTES
from lzy.agent.routes import Route
from lzy.checkpoint.errors import LzyError

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

STRANGER = 54321


@pytest.fixture
def migrator(tmp_path: Path, pair: Pair) -> Iterator[Migrator]:
    made = Migrator(tmp_path, pair)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def program(start: Start, pair: Pair) -> Program:
    """A program that knows every byte of its memory, attached as `calm` on the source."""
    made = start("memory_pattern", "12").await_ready()
    pair.begin()
    pair.source.attach(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["looked", "decided", "recorded", "told"])
def test_killed_at_each_step_of_an_eviction(
    pair: Pair, migrator: Migrator, start: Start, stage: str
) -> None:
    """The session runs on, or hibernates; the next migrator decides from what it finds."""
    program = start("heap").await_ready()
    pair.begin(hibernate_after_s=1)
    pair.source.attach(program)
    migrator.begin(kill_at=f"migrator.{stage}")
    migrator.await_death()
    if stage != "told":
        assert pair.source.look()["state"] == "running"
    migrator.begin()
    pair.source.await_state("hibernated")
    assert pair.source.kinds().count("hibernated") == 1
    assert pair.prove(program) == "source"


@pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("migrate", "answered"),
        ("wake", "chosen"),
        pytest.param("migrate", "chosen", marks=pytest.mark.slow),
        pytest.param("wake", "answered", marks=pytest.mark.slow),
    ],
)
def test_killed_at_each_step_of_a_move(
    pair: Pair, migrator: Migrator, program: Program, verb: str, stage: str
) -> None:
    """Before it told the agent nothing has happened, after that the agents do it without it."""
    if verb == "wake":  # elsewhere, for its node is drained
        pair.source.do("hibernate")
        program.await_end()
        pair.source.client.post("/v1/node/drain", {"draining": True})
    migrator.begin(kill_at=f"migrator.{stage}").await_up()
    with contextlib.suppress(LzyError):
        migrator.client.post(migrator.client.session("calm", verb), {})
    migrator.await_death()
    node, session = pair.await_settled()
    told = stage == "answered"
    assert node == ("target" if told else "source")
    assert session["state"] == ("hibernated" if verb == "wake" and not told else "running")
    migrator.begin().await_up()
    if not told:
        migrator.client.post(migrator.client.session("calm", verb), {})
    assert pair.prove(program) == "target"


def test_strangers_are_refused_and_written_down(
    pair: Pair, migrator: Migrator, program: Program
) -> None:
    """Every verb on another's session, asked of the migrator: refused, without effect, audited."""
    bodies = {"hold": {"for_s": 5}, "signal": {"signal": 9}, "set_session": {"settings": {}}}
    bodies |= {"requests": {"requests": {}}}
    verbs = [route for route in ROUTES if "{name}" in route.path]

    def ask_all(verbs: list[Route]) -> None:
        before = pair.source.kinds().count("refused")
        for route in verbs:
            path = route.path.replace("{name}", "calm")
            body = None if route.method == "GET" else bodies.get(route.handle, {})
            status, document = migrator.answer_as(STRANGER, route.method, path, body)
            assert (status, document["kind"]) == (403, "AccessDenied"), (route, document)
        assert pair.source.kinds().count("refused") == before + len(verbs)

    ask_all(verbs)
    program.prove()
    pair.source.do("hibernate")
    program.await_end()
    pair.source.client.post("/v1/node/drain", {"draining": True})  # now it would wake elsewhere
    ask_all([route for route in verbs if route.handle in ("wake", "signal", "migrate")])
    assert pair.look()["source"]["state"] == "hibernated"
    pair.source.client.post("/v1/node/drain", {"draining": False})
    assert migrator.answer_as(STRANGER, "GET", "/v1/sessions")[1]["sessions"] == []
    drained = migrator.answer_as(STRANGER, "POST", "/v1/nodes/source/drain", {"draining": True})
    assert drained[0] == 403
    assert pair.prove(program) == "source"
