"""Agent and operations are killed at every step: each session is found again, whole, and once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from living import await_end, list_children, wait_readable

from lzy.checkpoint.errors import LzyError
from lzy.checkpoint.stages import STAGES

if TYPE_CHECKING:
    from living import Program
    from service import Service

    Start = Callable[..., Program]

# The engine's own tests kill it at every stage; to the agent these differ.
DUMP_STAGES = ["dump.seized", "dump.written", "dump.committed", "dump.ended"]
RESTORE_STAGES = ["restore.checked", "restore.threads", "restore.committing", "restore.committed"]
DOZE_STAGES = [stage for stage in STAGES if stage.startswith("doze.")]
AGENT_STAGES = [stage for stage in STAGES if stage.startswith("operation.")]
OF_THE_CHILD = "operation.done"


@pytest.fixture
def program(start: Start, service: Service) -> Program:
    """A program that knows every byte of its memory, attached as `calm`; no agent runs."""
    made = start("memory_pattern", "12").await_ready()
    service.begin().set()
    service.attach(made)
    service.end()
    return made


def prove(program: Program, service: Service, deadly: str = "") -> str:
    """Whichever state the session is found in, it is true; then it is whole. Says which it was.

    `deadly`: the stage at which the agent that runs would kill what it does next.
    """
    if deadly:
        service.end()
        service.begin()
    session = service.look()
    state: str = session["state"]
    if state in ("running", "dozing"):
        if not program.is_alive:
            program.adopt(session["pid"])
        assert program.pid == session["pid"]
    else:
        assert state == "hibernated", service.kinds()
        program.await_end()
        program.adopt(service.do("wake")["session"]["pid"])
    assert session["operation"] is None
    assert session["epoch"] <= 2
    program.prove()
    if deadly and deadly not in (OF_THE_CHILD, "dump.committed", "restore.committing"):
        return state
    # What was killed hinders nothing: down and up once more, whole.
    service.do("hibernate")
    program.await_end()
    program.adopt(service.do("wake")["session"]["pid"])
    program.prove()
    return state


@pytest.mark.parametrize("stage", [*DUMP_STAGES, OF_THE_CHILD])
def test_hibernation_killed_at_each_stage(program: Program, service: Service, stage: str) -> None:
    """The operation is killed: the session runs on, or it hibernates; the agent says which."""
    service.begin(kill_at=stage)
    with contextlib.suppress(LzyError):
        service.do("hibernate")
    state = service.look()["state"]
    late = stage in ("dump.ended", OF_THE_CHILD)
    assert state == "hibernated" if late else state in ("running", "hibernated")
    if stage not in ("dump.committed", "dump.ended", OF_THE_CHILD):
        assert state == "running"
        assert "died (signal 9)" in service.look()["failure"]
    assert prove(program, service, stage) == state


@pytest.mark.parametrize("stage", [*RESTORE_STAGES, OF_THE_CHILD])
def test_wake_killed_at_each_stage(program: Program, service: Service, stage: str) -> None:
    """The operation is killed: the session hibernates still, or it runs, once; never both."""
    service.begin().do("hibernate")
    service.end()
    program.await_end()
    service.begin(kill_at=stage)
    with contextlib.suppress(LzyError):
        service.do("wake")
    state = service.look()["state"]
    if stage in ("restore.committed", OF_THE_CHILD):
        assert state == "running"
    elif stage != "restore.committing":
        assert state == "hibernated"
    assert prove(program, service, stage) == state


@pytest.mark.parametrize("stage", DOZE_STAGES)
def test_doze_killed_at_each_stage(program: Program, service: Service, stage: str) -> None:
    """The operation is killed: whatever was dropped comes back, the session lives on."""
    service.begin(kill_at=stage)
    with contextlib.suppress(LzyError):
        service.do("doze")
    assert prove(program, service, stage) in ("running", "dozing")


@pytest.mark.parametrize("verb", ["hibernate", "wake"])
@pytest.mark.parametrize("stage", [s for s in AGENT_STAGES if s != OF_THE_CHILD])
def test_agent_killed_at_each_stage(
    program: Program, service: Service, verb: str, stage: str
) -> None:
    """The agent is killed with the operation on its way: the next one finds out what is true."""
    service.begin()
    if verb == "wake":
        service.do("hibernate")
        program.await_end()
    service.end()
    service.begin(kill_at=stage)
    with pytest.raises(LzyError):
        service.do(verb)
    service.await_death()
    service.begin()
    state = prove(program, service)
    if stage == "operation.intended":
        assert state == ("running" if verb == "hibernate" else "hibernated")
    elif stage in ("operation.heard", "operation.recorded"):
        assert state == ("hibernated" if verb == "hibernate" else "running")


def test_killed_agent_takes_its_operations_along(program: Program, service: Service) -> None:
    """kill -9 of the agent at any moment, again and again: one process, whole, or one image."""
    delay_s = 0.0
    for _ in range(6):
        service.begin()
        state = service.look()["state"]
        verb = "wake" if state == "hibernated" else "hibernate"
        service.do(verb, wait=False)
        end_later(service, delay_s)
        delay_s += 0.02
    service.begin()
    prove(program, service)


def end_later(service: Service, delay_s: float) -> None:
    """Kill the agent after a moment, and wait until its operations have gone too."""
    assert service.agent
    pidfd = os.pidfd_open(service.agent.pid)
    try:
        wait_readable([pidfd], delay_s)
        working = [pid for pid in list_children(service.agent.pid, descend=False) if is_work(pid)]
    finally:
        os.close(pidfd)
    service.kill()
    for pid in working:
        await_end(pid)


def is_work(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip() == "lzy-operation"
    return False
