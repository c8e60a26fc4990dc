"""Sessions are held to their limits by the agent, whoever is killed, wherever they wake."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from living import kill_lzy, list_children
from pair import adopt

from lzy.checkpoint.doze import resident_bytes
from lzy.checkpoint.errors import LzyError
from lzy.checkpoint.log import read_log
from lzy.checkpoint.store import Store
from lzy.checkpoint.waiting import list_pagers

if TYPE_CHECKING:
    from living import CommandLine, Program
    from pair import Pair
    from service import Service

    Start = Callable[..., Program]

MIB = 1 << 20
LIMIT = 14 * MIB  # of programs that have more than 20 MiB


PATIENCE_S = 120.0  # rounds are as far apart as they take twice over
CODE = """if 1:
    import os, sys, zlib
    held = os.urandom(16 << 20)
    for line in sys.stdin:
        print(zlib.crc32(held), flush=True)
"""


@pytest.fixture
def program(start: Start) -> Program:
    """It knows every byte, writes all the time, and maps, moves and drops memory at each proof."""
    return start("memory_pattern", "16").await_ready()


@pytest.fixture
def reader(start: Start) -> Program:
    """It reads what it holds when it is asked for the sum of that, and else does nothing."""
    return start(command=[sys.executable, "-c", CODE])


def await_kept(service: Service, rounds: int = 1) -> dict[str, Any]:
    """Wait until its limit is kept, after so many rounds at least; how."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        session = service.look()
        limit: dict[str, Any] = session["limit"]
        if limit["rounds"] >= rounds and limit["resident_bytes"] <= limit["limit_bytes"]:
            return limit
        assert time.monotonic() < deadline, (session, service.kinds(), service.log.read_text())
        time.sleep(0.02)


def test_a_session_is_held_to_its_limit(program: Program, service: Service) -> None:
    """What is too much goes, and goes again when it has come back; it runs, and is whole.

    Of the checkpoints for that two are left; it is told once in a while, not each time. It may
    even move what is away, and fork: then all comes in first.
    """
    service.begin().set()
    service.attach(program, limit_bytes=LIMIT)
    done = await_kept(service)["rounds"]
    for _ in range(2):
        program.prove()
        done = await_kept(service, done + 1)["rounds"]
    assert service.look()["state"] == "running"

    def are_two_left() -> bool:
        with Store.open(service.home / "store") as store:
            reasons = [checkpoint.why for checkpoint in read_log(store, "calm")]
        return reasons in (["limit", "limit", "attach"], ["limit", "attach"])

    service.wait_until(are_two_left, "two are left")  # a round that goes on may have one more
    assert service.kinds().count("limited") == 1
    service.do("settings", settings={"limit_bytes": None})
    program.prove()
    assert service.look()["limit"] is None
    assert resident_bytes(program.pid) > LIMIT


def test_a_limit_outlives_the_agent_and_a_sleep(reader: Program, service: Service) -> None:
    """The agent is killed, and the next one holds to it; so it does after a wake.

    Then only what is touched comes: it is below its limit with nothing done to it.
    """
    sum_ = reader.ask("?")
    service.begin().set()
    service.attach(reader, limit_bytes=LIMIT)
    await_kept(service)
    service.kill()
    assert reader.ask("?") == sum_
    assert resident_bytes(reader.pid) > LIMIT
    service.begin()
    assert await_kept(service)["limit_bytes"] == LIMIT
    service.do("hibernate")
    reader.await_end()
    reader.adopt(service.do("wake")["session"]["pid"])
    service.wait_until(lambda: service.look()["limit"]["away_bytes"] > 8 * MIB, "most stays away")
    limit = service.look()["limit"]
    assert (limit["rounds"], limit["obstacle"]) == (0, None)
    assert limit["resident_bytes"] < LIMIT
    assert reader.ask("?") == sum_
    await_kept(service)
    assert reader.ask("?") == sum_


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["doze.taken", "doze.replacing", "doze.served", "doze.dropped"])
def test_a_round_killed_at_each_stage(program: Program, service: Service, stage: str) -> None:
    """Whatever of it was done: the session runs, is whole, and is held to its limit."""
    service.begin(kill_at=stage).set()
    service.attach(program, limit_bytes=LIMIT)
    if stage == "doze.replacing":  # which is only where it dozes already
        with contextlib.suppress(LzyError):
            await_kept(service)
            begin = service.look()["limit"]["rounds"]
            program.prove()
            assert begin
    service.await_event("failure")
    assert service.look()["state"] == "running"
    program.prove()
    service.kill()
    service.begin()
    service.do("checkpoint")  # by which the failure is over
    program.prove()
    await_kept(service)
    program.prove()


@pytest.mark.parametrize(
    "stage",
    ["begun", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("intended", "recorded"))],
)
def test_an_agent_killed_over_a_round(reader: Program, service: Service, stage: str) -> None:
    """It finds the session running, and goes on to hold it to its limit."""
    sum_ = reader.ask("?")
    service.begin().set()
    service.attach(reader)
    service.do("hold", for_s=600)
    service.do("settings", settings={"limit_bytes": LIMIT})
    service.end()
    service.begin(kill_at=f"operation.{stage}")
    with contextlib.suppress(LzyError):
        service.do("release")  # and it may die before it answers
    service.await_death()
    assert reader.ask("?") == sum_
    service.begin()
    await_kept(service, 0)
    assert service.look()["state"] == "running"
    assert reader.ask("?") == sum_


def test_who_is_held_is_left_alone(reader: Program, service: Service) -> None:
    """`lzy hold` goes before the limit; when it is over, that is kept."""
    sum_ = reader.ask("?")
    service.begin().set()
    service.attach(reader)
    service.do("hold", for_s=60)
    service.do("settings", settings={"limit_bytes": LIMIT})
    began_s = time.monotonic()
    while time.monotonic() < began_s + 0.8:  # several looks
        assert service.look()["limit"]["rounds"] == 0
        time.sleep(0.05)
    assert resident_bytes(reader.pid) > LIMIT
    service.do("release")
    await_kept(service)
    assert reader.ask("?") == sum_


def test_who_is_used_again_is_not_roused_beyond_it(program: Program, service: Service) -> None:
    """It dozes, and is used: of its memory what it touches comes, not more than it may have."""
    service.begin().set()
    service.attach(program, limit_bytes=LIMIT)
    await_kept(service)
    service.do("doze")  # a thread of it writes all the time
    told = service.await_event("roused")
    assert told["words"].endswith("what it touches comes back")
    assert service.await_state("running")["limit"]["away_bytes"] > MIB
    assert resident_bytes(program.pid) <= LIMIT
    program.prove()


def test_what_cannot_go_is_left_in_peace(start: Start, service: Service) -> None:
    """Of a program that has locked its memory nothing can go: lzy says so, and waits for long."""
    code = (
        "import ctypes; held = bytearray(b'x' * (20 << 20)); "
        "assert not ctypes.CDLL(None).mlockall(3); print('ready', flush=True); input()"
    )
    program = start(command=[sys.executable, "-c", code]).await_ready()
    service.begin().set()
    service.attach(program, limit_bytes=LIMIT)
    service.wait_until(lambda: service.look()["limit"]["obstacle"], "it says why it is not kept")
    limit = service.look()["limit"]
    assert (limit["rounds"], limit["obstacle"]) == (1, "most of what is too much cannot go")
    time.sleep(1)  # ten looks
    assert service.look()["limit"]["rounds"] == 1


def test_by_the_command(reader: Program, lzy: CommandLine, service: Service) -> None:
    """`lzy limit` and `lzy doze NAME --limit` tell the agent; what is no limit is refused."""
    sum_ = reader.ask("?")
    service.begin().set()
    service.attach(reader)
    assert lzy.succeed("limit")["limit_bytes"] is None
    assert lzy.succeed("limit", "calm", "14M")["limit_bytes"] == LIMIT
    await_kept(service)
    told = lzy.succeed("limit", "calm")
    assert told["resident_bytes"] <= LIMIT < told["resident_bytes"] + told["away_bytes"]
    assert (told["name"], told["pid"], told["rounds"]) == ("calm", reader.pid, 1)
    assert lzy.succeed("doze", "calm", "--limit", "1G")["limit_bytes"] == 1 << 30
    assert b"limit 1 GiB" in lzy.run("ps").stdout
    assert lzy.succeed("why", "calm")["limit"]["limit_bytes"] == 1 << 30
    assert lzy.succeed("limit", "calm", "none")["limit_bytes"] is None
    for wrong, words in (("much", b"no size"), ("12k", b"at least 1M"), ("0", b"at least 1M")):
        done = lzy.run("limit", "calm", wrong)
        assert done.returncode == 2
        assert words in done.stderr, done.stderr
    assert b"leave --once out" in lzy.run("doze", "calm", "--limit", "1G", "--once").stderr
    assert lzy.fail("limit", "nobody", "1G")["kind"] == "not_found"
    assert reader.ask("?") == sum_


@pytest.mark.slow
def test_a_limit_goes_along(pair: Pair, program: Program) -> None:
    """On the node that a session moves to it is held to its limit, too."""
    pair.begin()
    pair.source.attach(program, limit_bytes=LIMIT)
    await_kept(pair.source)
    for to, there in (("target", pair.target), ("source", pair.source)):
        pair.move(to)
        adopt(program, there.look()["pid"])
        assert there.look()["limit"]["resident_bytes"] < LIMIT
        assert pair.prove(program) == to
        await_kept(there)
        program.prove()


@pytest.mark.slow
def test_a_tree_is_held_by_bringing_it_in_first(start: Start, service: Service) -> None:
    """What is away of a process with children comes in before more of it goes."""
    code = (
        "import os, signal, sys, zlib; held = os.urandom(24 << 20); os.fork() or signal.pause()\n"
        "for line in sys.stdin: print(zlib.crc32(held), flush=True)"
    )
    program = start(command=[sys.executable, "-c", code])
    first = program.ask("?")
    service.begin().set()
    service.attach(program, limit_bytes=LIMIT)
    for rounds in range(1, 4):
        await_kept(service, rounds)
        assert program.ask("?") == first


@pytest.mark.slow
def test_whoever_is_killed_no_byte_is_wrong(
    program: Program, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For half a minute agents, operations and pagers are killed at random moments.

    For longer where the machine is so busy that it was agents alone until then.
    """
    monkeypatch.setenv("LZY_HOME", str(service.home))
    service.begin().set()
    service.attach(program, limit_bytes=LIMIT)
    chance = random.Random(os.getpid())
    until_s, killed = time.monotonic() + 30, 0
    while time.monotonic() < until_s or not killed:
        time.sleep(chance.uniform(0, 1))
        victims = [pager.status.pager_pid for pager in list_pagers() if pager.pid == program.pid]
        assert service.agent
        victims += [service.agent.pid, *list_children(service.agent.pid, descend=False)]
        victim = chance.choice(list(filter(None, victims)))
        if victim != service.agent.pid:
            killed += kill_lzy(victim)
        else:
            service.kill()
            service.begin()
        program.prove()
    with contextlib.suppress(LzyError):
        service.do("checkpoint")
    await_kept(service)
    program.prove()
