"""`lzy up` and `lzy down`: one daemon for a home, that loses no session whatever is stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import CommandLine, await_end, list_children
from service import Service

from lzy.agent.supervisor import find_supervisor

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


def test_down_and_up_keep_sessions(start: Start, lzy: CommandLine, service: Service) -> None:
    """One that runs, one that dozes and one that hibernates are the same after down and up."""
    assert lzy.succeed("up")["started"] is True
    programs = {name: start("memory_pattern", "12").await_ready() for name in ("one", "two")}
    programs["three"] = start(command=[sys.executable, "-c", "input()"])
    for name, program in programs.items():
        service.attach(program, name)
    lzy.succeed("hibernate", "two")
    programs["two"].await_end()
    service.do("doze", "three")
    assert lzy.succeed("up")["started"] is False
    assert lzy.succeed("down") == {"stopped": True, "sessions": 3}
    assert lzy.succeed("down") == {"stopped": False}
    assert lzy.fail("ps")["kind"] == "no_agent"
    programs["one"].prove()
    lzy.succeed("up")
    found = {session["name"]: session for session in lzy.succeed("ps")}
    assert {name: found[name]["state"] for name in found} == {
        "one": "running",
        "two": "hibernated",
        "three": "dozing",
    }
    assert found["one"]["pid"] == programs["one"].pid
    programs["two"].adopt(lzy.succeed("wake", "two")["pid"])
    programs["two"].prove()
    lzy.succeed("down")
    programs["two"].prove()  # its parent has gone; it lives on


def test_crashed_agent_is_started_again(start: Start, lzy: CommandLine, service: Service) -> None:
    """kill -9 of the agent: another takes over within a moment, and knows every session."""
    lzy.succeed("up")
    program = start("memory_pattern", "12").await_ready()
    service.attach(program)
    lzy.succeed("hibernate")
    program.await_end()
    program.adopt(lzy.succeed("wake")["pid"])
    killed = service.client.get("/v1/node")["agent_pid"]
    os.kill(killed, signal.SIGKILL)
    await_end(killed)
    service.wait_until(service.is_up, "another agent answers")
    assert service.client.get("/v1/node")["agent_pid"] != killed
    (session,) = lzy.succeed("ps")
    assert (session["state"], session["pid"], session["epoch"]) == ("running", program.pid, 2)
    program.prove()
    program.end()
    assert service.await_state("failed")["exit_status"] == signal.SIGKILL
    lzy.succeed("down")


def test_two_homes_are_two_installations(
    start: Start, lzy: CommandLine, service: Service, tmp_path: Path
) -> None:
    """Each has its own agent, settings and sessions; stopping one does not touch the other."""
    (tmp_path / "second").mkdir()
    second = CommandLine(tmp_path / "second")
    other = Service(second.home)
    try:
        lzy.succeed("up", "--hibernate-after", "1h")
        second.succeed("up", "--hibernate-after", "never", "--doze-after", "90s")
        program = start(command=[sys.executable, "-c", "input()"])
        service.attach(program)
        assert second.succeed("ps") == []
        assert second.succeed("down")["stopped"] is True
        (session,) = lzy.succeed("ps")
        assert session["settings"]["hibernate_after_s"] == 3600
        settings = second.succeed("up")["settings"]  # what was set stays set
        assert (settings["hibernate_after_s"], settings["doze_after_s"]) == (None, 90)
    finally:
        other.close()


def test_daemon_survives_its_terminal(lzy: CommandLine, service: Service) -> None:
    """It is in a session of its own, holds no terminal, and is nobody's child here."""
    lzy.succeed("up")
    running = find_supervisor(lzy.home)
    assert running
    os.close(running.pidfd)
    for pid in (running.pid, *list_children(running.pid, descend=False)):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert int(stat[3]) == running.pid  # its session
        assert int(stat[4]) == 0  # its terminal
    assert lzy.succeed("down")["stopped"] is True


@pytest.mark.parametrize("named", [(), ("--name", "given")])
def test_commands_without_a_name(
    start: Start, lzy: CommandLine, service: Service, named: tuple[str, ...]
) -> None:
    """With one session its name may be left out; with two LZY_SESSION has to tell which."""
    service.begin().set()
    script = lzy.home / "train.py"
    script.write_text("input()")
    one = start(command=[sys.executable, str(script)])
    name = lzy.succeed("attach", str(one.pid), *named)["name"]
    assert name == ("given" if named else "train")
    assert lzy.succeed("why")["name"] == name
    assert lzy.succeed("hold", "--for", "1h30m")["hold_until_unix_s"]
    two = start(command=[sys.executable, str(script)])
    assert lzy.succeed("attach", str(two.pid))["name"] == ("train" if named else "train-2")
    assert lzy.run("release").returncode == 2
    os.environ["LZY_SESSION"] = name
    try:
        assert lzy.succeed("release")["name"] == name
    finally:
        del os.environ["LZY_SESSION"]
    assert lzy.fail("hibernate", "nobody")["exit_status"] == 3
    assert lzy.fail("attach", str(one.pid), "--name", "else")["kind"] == "busy"
    lzy.succeed("detach", name)
    assert one.is_alive
    assert [session["name"] for session in lzy.succeed("ps")] != [name]
