"""A whole life: a notebook kernel is attached, left alone, evicted, woken, and is what it was."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from living import PATIENCE_S, await_end

if TYPE_CHECKING:
    from living import CommandLine, Program
    from service import Service

    Start = Callable[..., Program]


@contextmanager
def talking(connection: Path) -> Iterator[Callable[[str], str]]:
    """A client of the kernel; what it answers to code is what that prints."""
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels(hb=False)
    try:
        client.wait_for_ready(timeout=PATIENCE_S)

        def run(code: str) -> str:
            said: list[str] = []

            def hear(message: dict[str, Any]) -> None:
                if message["msg_type"] == "stream":
                    said.append(message["content"]["text"])

            reply = client.execute_interactive(code, timeout=PATIENCE_S, output_hook=hear)
            assert reply["content"]["status"] == "ok", reply["content"]
            return "".join(said).strip()

        yield run
    finally:
        client.stop_channels()


def test_idle_kernel_is_evicted_and_woken(
    start: Start, lzy: CommandLine, service: Service, tmp_path: Path
) -> None:
    """Left alone it dozes, then hibernates, by the daemon alone; `lzy wake` brings it back whole.

    Its variables, its output counter and a generator half-way are what they were, twice.
    """
    connection = tmp_path / "kernel-of-test.json"
    write_connection_file(str(connection), ip="127.0.0.1")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", str(connection)]
    kernel = start(command=command)
    lzy.succeed(
        *("up", "--sample-every", "0.2", "--doze-after", "0.5", "--hibernate-after", "2"),
        *("--notice", "0.2", "--after-wake", "1"),
    )
    with talking(connection) as run:
        run("import itertools; words = {'a': [1, 2]}; steps = itertools.count(5); next(steps)")
        before = last_event(service)
        attached = lzy.succeed("attach", str(connection), "--name", "notebook")
        assert attached["pid"] == kernel.pid
        for told in ("6", "7"):
            # A client that is connected keeps nobody awake.
            before = service.await_event("hibernated", "notebook", after=before)["number"]
            kernel.await_end()
            (session,) = lzy.succeed("ps")
            assert (session["state"], session["pid"]) == ("hibernated", None)
            woken = lzy.succeed("wake")
            kernel.adopt(woken["pid"])
            assert run("print(words['a'], next(steps))") == f"[1, 2] {told}"
    kinds = service.kinds("notebook")
    assert kinds.index("dozed") < kinds.index("notice") < kinds.index("hibernated")
    lzy.succeed("down")


def last_event(service: Service) -> int:
    events = service.client.get("/v1/events?last=1")["events"]
    return int(events[-1]["number"]) if events else 0


def test_activity_during_the_notice_calls_it_off(start: Start, service: Service) -> None:
    """Notice is given, then it is used: it stays; nobody asked, so nobody has to do anything."""
    program = start("memory_pattern", "12").await_ready()  # a thread of it writes all the time
    service.begin().set(notice_s=0.3)
    service.attach(program)
    service.do("hibernate", if_idle=True, wait=False, reason="a test")
    service.await_event("called_off")
    assert service.look()["state"] == "running"
    assert "notice" in service.kinds()
    program.prove()


def test_hold_calls_an_eviction_off(start: Start, service: Service) -> None:
    """`lzy hold` in the midst of the notice is in time; afterwards nothing evicts it."""
    program = start(command=[sys.executable, "-c", "input()"])
    service.begin().set(notice_s=20)
    service.attach(program)
    after = last_event(service)
    service.do("hibernate", if_idle=True, wait=False, reason="a test")
    service.await_event("notice")
    service.do("hold", for_s=60)
    service.await_event("called_off")
    service.do("hibernate", if_idle=True, wait=False, reason="a test")
    service.do("release")
    service.await_event("released", after=after)
    assert service.look()["state"] == "running"
    assert service.kinds().count("notice") == 1


def test_woken_session_is_a_child_of_the_agent(start: Start, service: Service) -> None:
    """Its parent is the agent, which hears how it ends; a failure keeps the last image."""
    program = start("memory_pattern", "12").await_ready()
    service.begin().set()
    service.attach(program)
    service.do("hibernate")
    program.await_end()
    session = service.do("wake")["session"]
    program.adopt(session["pid"])
    assert service.agent
    agent = service.agent.pid
    # Who woke it is its parent until that has ended too, which nobody waits for.
    service.wait_until(lambda: psutil.Process(program.pid).ppid() == agent, "the agent has it")
    os.kill(program.pid, signal.SIGUSR2)
    ended = service.await_state("failed")
    assert os.WTERMSIG(ended["exit_status"]) == signal.SIGUSR2
    assert ended["image"] == "calm@2"
    program.adopt(service.do("wake")["session"]["pid"])
    program.prove()


def test_end_of_a_process_that_is_no_child(start: Start, service: Service) -> None:
    """A session that was only attached ends: the agent hears of it, and how it ended."""
    program = start(command=[sys.executable, "-c", "input(); raise SystemExit(3)"])
    service.begin().set()
    service.attach(program)
    program.say("go on")
    program.child.wait(PATIENCE_S)  # its parent takes it in, as a shell does
    ended = service.await_state("failed")
    assert os.waitstatus_to_exitcode(ended["exit_status"]) == 3
    other = start(command=[sys.executable, "-c", "input()"])
    service.attach(other, "other")
    other.say("go on")
    other.child.wait(PATIENCE_S)
    assert service.await_state("ended", "other")["exit_status"] == 0


def test_what_is_done_by_hand_is_seen(start: Start, lzy: CommandLine, service: Service) -> None:
    """`lzy dump` and `lzy restore` of a session: it hibernates, it runs, is never woken twice."""
    program = start("memory_pattern", "12").await_ready()
    service.begin().set()
    service.attach(program)
    lzy.dump(program, "calm")
    service.await_state("hibernated")
    lzy.restore(program, "calm")
    assert service.do("wake")["session"]["pid"] == program.pid
    assert service.await_state("running")["pid"] == program.pid
    program.prove()
    lzy.dump(program, "calm")
    service.await_state("hibernated")
    lzy.restore(program, "calm")
    assert service.await_state("running")["pid"] == program.pid


def test_signal_wakes(start: Start, service: Service) -> None:
    """`lzy signal` reaches a session that hibernates: it is woken for it."""
    code = "import signal; signal.signal(10, lambda *_: print('heard', flush=True))"
    ready = "print('ready', flush=True)\nwhile True: input()"
    program = start(command=[sys.executable, "-c", f"{code}; {ready}"]).await_ready()
    service.begin().set()
    service.attach(program)
    service.do("hibernate")
    program.await_end()
    program.adopt(service.do("signal", signal=10)["session"]["pid"])
    assert program.hear() == "heard"


def test_used_session_no_longer_dozes(start: Start, service: Service) -> None:
    """A dozing session that begins to compute gets all of its memory back by itself."""
    code = "print('ready', flush=True); input(); print(sum(range(1 << 40)))"
    program = start(command=[sys.executable, "-c", code]).await_ready()
    service.begin().set()
    service.attach(program)
    service.do("doze")
    assert service.look()["state"] == "dozing"
    service.wait_until(lambda: service.look()["idle_for_s"] > 0.2, "it is seen to be idle")
    program.say("go on")
    assert service.await_state("running")["pid"] == program.pid
    assert "roused" in service.kinds()


def test_dead_pagers_are_replaced(start: Start, service: Service) -> None:
    """Pager and keeper of a woken session are killed: the agent starts others, nobody is stuck."""
    program = start("memory_pattern", "48").await_ready()
    service.begin().set()
    service.attach(program)
    service.do("doze")
    for pid in pagers_of(service):
        os.kill(pid, signal.SIGKILL)
        await_end(pid)
    program.prove()


def pagers_of(service: Service) -> list[int]:
    """Who holds the journals of this home's pagers, in an order in which none is replaced."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            comm = Path(f"/proc/{name}/comm").read_text().strip()
            environment = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        if comm.startswith("lzy-pag") and str(service.home).encode() in environment:
            os.kill(int(name), signal.SIGSTOP)
            found.append(int(name))
    return found
