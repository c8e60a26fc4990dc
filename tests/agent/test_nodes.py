"""Nodes of one machine: namespaces, links, limits; a session moves between them under use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from living import PATIENCE_S, PROGRAMS, CommandLine, Holds, await_end, wait_readable
from pair import free_port
from service import Service

from lzy.agent.cgroups import Cgroup
from lzy.agent.client import Client
from lzy.agent.network import PORT as AGENT_PORT
from lzy.agent.network import fabric_path, read_holder, set_link
from lzy.agent.trial import holder_path
from lzy.checkpoint.errors import LzyError
from lzy.migrator.fleet import Fleet

PORT = 9000
KERNEL_PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
NODES = "one:1cpu:1G,two:1cpu:1G:1gpu"
ORDER = ("one", "two")
WHERE = ("10.77.0.2", "10.77.0.3")


class Trial:
    """`lzy up --nodes` with a home of its own, and processes in its namespaces."""

    def __init__(self, lzy: CommandLine) -> None:
        self.lzy, self.home = lzy, lzy.home
        self.holds = Holds(lzy.home.with_name("holds"))
        lzy.environment |= self.holds.environment
        self.client = Client(self.home)
        self.running: list[subprocess.Popen[bytes]] = []

    def up(self, *options: str) -> Trial:
        self.lzy.succeed("up", "--nodes", NODES, "--sample-every", "0.2s", "--doze-after", "never",
                         "--hibernate-after", "never", "--after-wake", "0s", *options)  # fmt: skip
        self.client = Client(self.home)
        return self

    def down(self) -> None:
        self.holds.let_go()
        done = self.lzy.run("down", "--abandon")
        for child in self.running:
            child.kill()
            child.wait()
        assert done.returncode == 0, done.stderr
        said = [path.read_text() for path in self.home.rglob("agent.log")]
        assert not [words for words in said if "did not end" in words]

    def start(self, node: str, *words: str) -> int:
        """Start a program on a node; its pid here."""
        child = subprocess.Popen(
            [*self.lzy.executable, "enter", node, "--", sys.executable, *words],
            env={**os.environ, "LZY_HOME": str(self.home)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.running.append(child)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    said = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
                    if said == [w.encode() for w in (sys.executable, *words)]:
                        return int(pid)
            time.sleep(0.02)
        raise AssertionError("it does not start")

    def ledger(self) -> None:
        """A ledger on node one, as session `ledger`, ready to be used."""
        pid = self.start("one", str(PROGRAMS / "ledger.py"), str(PORT))
        self.lzy.succeed("attach", str(pid), "--name", "ledger")
        self.wait_until(lambda: self.look()["image"] and not self.look()["operation"])

    def use(self) -> subprocess.Popen[bytes]:
        """A client of the ledger, between the nodes; it stops when its stdin is closed."""
        words = [sys.executable, str(PROGRAMS / "ledger_client.py"), str(PORT), *WHERE]
        child = subprocess.Popen(
            ["nsenter", "-t", str(read_holder(fabric_path(self.home))), "-n", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.running.append(child)
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        return child

    def kernel(self, folder: Path) -> str:
        """A notebook kernel on node one, as session `ledger`; its connection file."""
        ports = dict(zip(KERNEL_PORTS, range(PORT + 1, PORT + 6), strict=True))
        file = folder / "kernel.json"
        file.write_text(json.dumps({
            "ip": "127.0.0.1", "transport": "tcp", "key": os.urandom(16).hex(),
            "signature_scheme": "hmac-sha256", "kernel_name": "python3", **ports,
        }))  # fmt: skip
        pid = self.start("one", "-m", "ipykernel_launcher", "-f", str(file))
        self.lzy.succeed("attach", str(pid), "--name", "ledger")
        self.wait_until(lambda: self.look()["image"] and not self.look()["operation"])
        return str(file)

    def use_kernel(self, file: str) -> subprocess.Popen[bytes]:
        """A front end on node one; it stops when its stdin is closed."""
        words = [sys.executable, str(PROGRAMS / "kernel_client.py"), file]
        holder = read_holder(holder_path(self.home, "one"))
        child = subprocess.Popen(
            ["nsenter", "-t", str(holder), "-n", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.running.append(child)
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        return child

    def ask(self, client: subprocess.Popen[bytes]) -> dict[str, Any]:
        """What a client has found until now; it goes on."""
        assert client.stdin
        assert client.stdout
        client.stdin.write(b"\n")
        client.stdin.flush()
        found: dict[str, Any] = json.loads(client.stdout.readline())
        assert found["wrong"] == []
        return found

    def stop(self, client: subprocess.Popen[bytes]) -> dict[str, Any]:
        out, _ = client.communicate(timeout=PATIENCE_S)
        found: dict[str, Any] = json.loads(out)
        assert found["wrong"] == []
        assert found.get("messages", found.get("cells")) > 10
        return found

    def count_ledgers(self) -> int:
        """How many processes of the session there are."""
        words = [sys.executable, str(PROGRAMS / "ledger.py"), str(PORT)]
        wanted = b"".join(word.encode() + b"\0" for word in words)
        found = 0
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                found += Path(f"/proc/{pid}/cmdline").read_bytes() == wanted
        return found

    def is_settled(self) -> bool:
        """Whether the session runs, and is on its way nowhere."""
        session = self.look()
        return session["state"] == "running" and not session["moving_to"]

    def look(self) -> dict[str, Any]:
        return self.client.get("/v1/sessions/ledger")

    def wait_until(self, holds: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(LzyError):
                if holds():
                    return
            assert time.monotonic() < deadline, (self.home / "agent" / "agent.log").read_text()
            time.sleep(0.05)


@pytest.fixture
def trial(lzy: CommandLine) -> Iterator[Trial]:
    made = Trial(lzy)
    try:
        yield made
    finally:
        made.down()


def test_client_in_use_while_its_server_moves(trial: Trial) -> None:
    """There and back: no message lost or heard twice, one process; then all of it is gone."""
    trial.up()
    nodes = {node["name"]: node for node in trial.lzy.succeed("nodes")}
    assert [nodes[n]["memory_bytes"] for n in ("one", "two")] == [1 << 30] * 2
    assert nodes["two"]["declared_gpus"]
    trial.ledger()
    client = trial.use()
    dry = trial.lzy.succeed("migrate", "ledger", "--gpu", "--dry-run")
    assert dry["choice"]["node"] == "two"
    for to, options in (("two", ["--gpu"]), ("one", ["--node", "one", "--gpu", "0"])):
        moved = trial.lzy.succeed("migrate", "ledger", *options)
        assert (moved["session"]["node"], moved["session"]["state"]) == (to, "running")
        assert moved["session"]["declared_gpu"] == (to == "two")
    assert trial.lzy.fail("migrate", "ledger", "--gpu=2")["message"].startswith("none has 2 free")
    trial.stop(client)
    held = [read_holder(holder_path(trial.home, name)) for name in ("one", "two")]
    trial.lzy.succeed("down")
    for pid in held:
        await_end(pid)
    assert "/nodes/" not in Path("/proc/self/mountinfo").read_text().replace("/nodes/none", "")
    trial.up()
    assert trial.look()["state"] == "hibernated"
    trial.lzy.succeed("wake", "ledger")


@pytest.mark.slow
def test_front_end_follows_its_kernel(trial: Trial, tmp_path: Path) -> None:
    """A kernel that listens on 127.0.0.1 only is used by one and the same client on its first node
    wherever it is: from there its ports lead to it, also when that node's agent was killed."""
    trial.up()
    client = trial.use_kernel(trial.kernel(tmp_path))
    for to in ("two", "one", "two"):
        before = trial.ask(client)["cells"]
        trial.lzy.succeed("migrate", "ledger", "--node", to)
        trial.wait_until(lambda: trial.ask(client)["cells"] > before + 3)  # noqa: B023 - at once
        assert trial.look()["node"] == to
    os.kill(agent_of(trial.home / "nodes" / "one"), signal.SIGKILL)
    before = trial.ask(client)["cells"]
    trial.wait_until(lambda: trial.ask(client)["cells"] > before + 3)
    trial.stop(client)


def agent_of(home: Path) -> int:
    """The pid of a node's agent here."""
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name == "lzy-agent" and f"LZY_HOME={home}".encode() in words:
                return pid
    raise AssertionError("there is no agent")


def test_migrator_killed_and_link_cut(trial: Trial) -> None:
    """A move goes on without its migrator; a cut before the switch leaves the session where it was,
    and when the link is healed the session is in one place, and its client has lost nothing."""
    trial.up("--own-stores")
    trial.ledger()
    client = trial.use()
    fabric = read_holder(fabric_path(trial.home))
    set_link(fabric, 1, up=False)
    trial.lzy.fail("migrate", "ledger", "--node", "two")
    session = trial.look()
    assert (session["node"], session["state"]) == ("one", "running")
    assert [n["reachable"] for n in trial.lzy.succeed("nodes")] == [True, False]
    set_link(fabric, 1, up=True)
    trial.wait_until(lambda: all(n["reachable"] for n in trial.lzy.succeed("nodes")))
    asked = trial.lzy.start("migrate", "ledger", "--node", "two")
    trial.wait_until(lambda: trial.look()["state"] == "migrating" or asked.poll() is not None)
    kill_migrator(trial.home)
    asked.communicate(timeout=PATIENCE_S)
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("two", "running"))
    trial.stop(client)


@pytest.mark.slow
def test_drained_node_is_left(trial: Trial) -> None:
    """What runs moves, nothing comes, and it can be undone."""
    trial.up()
    trial.ledger()
    trial.start("one", str(PROGRAMS / "ledger.py"), str(PORT + 1))
    client = trial.use()
    trial.lzy.succeed("drain", "one")
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("two", "running"))
    refused = trial.lzy.fail("migrate", "ledger", "--node", "one")
    assert "being drained" in refused["message"]
    trial.lzy.succeed("drain", "--undo", "one")
    trial.lzy.succeed("migrate", "ledger", "--node", "one")
    trial.stop(client)


def kill_migrator(home: Path) -> None:
    """kill -9 of the migrator of that home, by its own pid."""
    pidfd = signal_migrator(home, signal.SIGKILL)
    assert wait_readable([pidfd], PATIENCE_S)
    os.close(pidfd)


def signal_migrator(home: Path, number: signal.Signals) -> int:
    """Send the migrator of that home a signal; its pidfd, if that may end it."""
    assert len(Fleet(home).members) == 2
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name == "lzy-migrator" and f"LZY_HOME={home}".encode() in words:
                pidfd = os.pidfd_open(pid)
                signal.pidfd_send_signal(pidfd, number)
                if number == signal.SIGKILL:
                    return pidfd
                os.close(pidfd)
                return -1
    raise AssertionError("there is no migrator")


def test_connection_wakes_a_session(start: Any, service: Service) -> None:
    """Who connects while it hibernates is not refused: it wakes, accepts, and has what was sent."""
    port = free_port()
    program = start(command=[sys.executable, str(PROGRAMS / "ledger.py"), str(port), "2"])
    service.begin().set()
    wait_until_it_listens(port)
    service.attach(program)
    service.do("hibernate")
    program.await_end()
    assert service.look()["kept_ports"] == [port]
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"1\n")
        assert client.recv(100).split()[:2] == [b"1", b"1"]
        service.await_state("running")  # the agent hears of it after it has begun to run
        assert {"called", "woken"} <= set(service.kinds())
        program.adopt(service.look()["pid"])
        client.sendall(b"2\n")
        assert client.recv(100).split()[:2] == [b"2", b"2"]
    service.do("hibernate")
    program.await_end()
    service.kill()  # the next agent keeps the port as well
    service.begin()
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"3\n")
        assert client.recv(100).split()[:2] == [b"3", b"3"]
    program.adopt(service.await_state("running")["pid"])


def test_use_wakes_a_session_where_there_is_room(trial: Trial) -> None:
    """Who connects while its node takes no sessions is served by another, through the old one's
    port: what was sent at once and what comes later, and who connects later."""
    trial.up("--own-stores")
    trial.ledger()
    talk = (
        "import socket\n"
        "def ask(s, words):\n"
        "    s.sendall(words); return s.recv(100).split()\n"
        f"with socket.create_connection(('{WHERE[0]}', {PORT}), 60) as s:\n"
        "    one = ask(s, b'1\\n'); two = ask(s, b'2\\n'); s.shutdown(socket.SHUT_WR)\n"
        "    assert s.recv(100) == b''\n"
        f"with socket.create_connection(('{WHERE[0]}', {PORT}), 60) as s:\n"
        "    three = ask(s, b'3\\n')\n"
        "assert [n for n, _, _ in (one, two, three)] == [b'1', b'2', b'3']\n"
        "assert one[2] == two[2] == three[2]; print('served')"
    )
    trial.lzy.succeed("hibernate", "ledger")
    trial.lzy.succeed("drain", "one")
    asked = [*trial.lzy.executable, "enter", "two", "--", sys.executable, "-c", talk]
    said = subprocess.run(
        asked, env={**os.environ, "LZY_HOME": str(trial.home)}, capture_output=True, timeout=90
    )
    assert said.stdout == b"served\n", said.stderr.decode()
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("two", "running"))


@pytest.mark.slow
def test_connection_wakes_a_session_though_the_migrator_hangs(trial: Trial) -> None:
    """Its agent asks where it is to wake, hears nothing for a while, and wakes it by itself."""
    trial.up()
    trial.ledger()
    trial.lzy.succeed("hibernate", "ledger")
    signal_migrator(trial.home, signal.SIGSTOP)
    try:
        talk = (
            "import socket\n"
            f"with socket.create_connection(('{WHERE[0]}', {PORT}), 60) as s:\n"
            "    s.sendall(b'1\\n'); print(s.recv(100).split()[0])"
        )
        asked = [*trial.lzy.executable, "enter", "two", "--", sys.executable, "-c", talk]
        environment = {**os.environ, "LZY_HOME": str(trial.home)}
        said = subprocess.run(asked, env=environment, capture_output=True, timeout=90)
        assert said.stdout == b"b'1'\n", said.stderr.decode()
    finally:
        signal_migrator(trial.home, signal.SIGCONT)
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("one", "running"))


@pytest.mark.slow
def test_signal_wakes_a_session_where_there_is_room(trial: Trial) -> None:
    """Its node takes no sessions: it is woken on another, and the signal is sent there."""
    trial.up()
    trial.ledger()
    trial.lzy.succeed("hibernate", "ledger")
    trial.lzy.succeed("drain", "one")
    trial.lzy.succeed("signal", "ledger", "URG")
    assert (trial.look()["node"], trial.look()["state"]) == ("two", "running")
    trial.lzy.succeed("signal", "ledger", "KILL")
    trial.wait_until(lambda: trial.look()["state"] == "failed")


def wait_until_it_listens(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_session_waits_for_a_gpu_and_is_held_to_its_share(trial: Trial) -> None:
    """It goes when there is one, with the memory that it asked for as its bound."""
    trial.up()
    trial.ledger()
    small = trial.lzy.fail("migrate", "ledger", "--memory", "4M", "--dry-run")
    assert "would be killed" in small["message"]
    trial.lzy.succeed("drain", "two")
    refused = trial.lzy.fail("migrate", "ledger", "--gpu")
    assert "no other node has a free GPU" in refused["message"]
    waits = trial.lzy.succeed("migrate", "ledger", "--gpu", "--memory", "256M", "--wait")
    assert waits["queued"]
    shown = trial.lzy.run("ps").stdout.decode()
    assert "waits for a GPU, 256 MiB" in shown
    trial.lzy.succeed("migrate", "ledger", "--cancel")
    assert trial.look()["waiting_since_unix_s"] is None
    trial.lzy.succeed("migrate", "ledger", "--gpu", "--memory", "256M", "--wait")
    trial.lzy.succeed("drain", "--undo", "two")
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("two", "running"))
    session = trial.look()
    assert (session["gpu_count"], session["waiting_since_unix_s"]) == (1, None)
    assert session["memory_limit_bytes"] in (256 << 20, 0 if not has_cgroups() else 256 << 20)
    assert "gpu 1/1 declared" in trial.lzy.run("top").stdout.decode()


def has_cgroups() -> bool:
    """Whether limits of memory can be made here."""
    group = Cgroup.inside(Path("/lzy-test"), str(os.getpid()))
    try:
        return group.limit(memory_bytes=1 << 30)
    finally:
        group.remove()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("what", ["ledger", "kernel"])
def test_moved_to_and_fro_under_use(trial: Trial, tmp_path: Path, what: str) -> None:
    """`LZY_SOAK_ROUNDS` times there and back, stores apart: its client has missed nothing.

    A ledger's goes to where it is; that of a notebook kernel stays at the first node.
    """
    trial.up("--own-stores")
    if what == "ledger":
        trial.ledger()
        client = trial.use()
    else:
        client = trial.use_kernel(trial.kernel(tmp_path))
    for number in range(2 * int(os.environ.get("LZY_SOAK_ROUNDS", "100"))):
        to = ("two", "one")[number % 2]
        moved = trial.lzy.succeed("migrate", "ledger", "--node", to)
        assert (moved["session"]["node"], moved["session"]["state"]) == (to, "running")
    trial.stop(client)


ROUND_TRIP = f"""
import socket, time
began_s = time.monotonic()
socket.create_connection(("{WHERE[1]}", {AGENT_PORT})).close()
print(time.monotonic() - began_s)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("speed", "round_trip_s"), [("30mbit", 0.0), ("160mbit,12.5ms", 0.05)])
def test_link_cut_while_the_image_goes_ahead(trial: Trial, speed: str, round_trip_s: float) -> None:
    """A slow link breaks off in the middle: the session runs on, and moves when it is healed.

    Slow for its rate, or for its delay: there are two links between two nodes, each way.
    """
    trial.up("--own-stores", "--link", speed)
    took = trial.lzy.run("enter", "one", "--", sys.executable, "-c", ROUND_TRIP)
    assert float(took.stdout) > round_trip_s, took.stderr
    trial.ledger()
    client = trial.use()
    fabric = read_holder(fabric_path(trial.home))
    asked = trial.lzy.start("migrate", "ledger", "--node", "two")
    trial.wait_until(lambda: trial.look()["state"] == "migrating")
    set_link(fabric, 1, up=False)
    asked.communicate(timeout=60)
    assert asked.returncode != 0
    trial.wait_until(lambda: (trial.look()["node"], trial.look()["state"]) == ("one", "running"))
    set_link(fabric, 1, up=True)
    trial.wait_until(lambda: all(n["reachable"] for n in trial.lzy.succeed("nodes")))
    moved = trial.lzy.succeed("migrate", "ledger", "--node", "two")
    assert moved["session"]["node"] == "two"
    trial.stop(client)


STEPS = ("offered", "prepared", "stopping", "stopped", "asked", "accepting", "accepted", "answered")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("lasts", "speed"),
    [("shortly", "10gbit"), ("until it fails", "10gbit"), ("shortly", "160mbit,12.5ms")],
)
def test_link_cut_at_each_step(trial: Trial, lasts: str, speed: str) -> None:
    """Cut when source or target has come to a step, and healed: the session is in one place, with
    one process, and its client has lost nothing; a short cut delays the move, and no more."""
    trial.up("--own-stores", "--link", speed)
    trial.ledger()
    client = trial.use()
    fabric = read_holder(fabric_path(trial.home))
    for step in STEPS:
        stage, to = f"move.{step}", {"one": "two", "two": "one"}[trial.look()["node"]]
        trial.holds.hold(stage)
        asked = trial.lzy.start("migrate", "ledger", "--node", to)
        trial.wait_until(lambda: trial.holds.is_held(stage))  # noqa: B023 - at once
        set_link(fabric, ORDER.index(to), up=False)
        trial.holds.let_go()
        if lasts == "shortly":
            time.sleep(1)
        else:
            asked.wait(3 * PATIENCE_S)  # it asks again for a while
        set_link(fabric, ORDER.index(to), up=True)
        asked.communicate(timeout=PATIENCE_S)
        trial.wait_until(lambda: all(n["reachable"] for n in trial.lzy.succeed("nodes")))
        trial.wait_until(trial.is_settled)
        assert trial.count_ledgers() == 1, step
        if lasts == "shortly":
            assert trial.look()["node"] == to, step
        assert trial.ask(client)["messages"] > 0
    trial.stop(client)


@pytest.mark.slow
def test_link_cut_while_memory_follows(trial: Trial) -> None:
    """Cut when the session runs and lacks memory, and healed: it stalls at most, and goes on."""
    trial.up("--own-stores")
    trial.client.post("/v1/node/settings", {"settings": {"move_at_once_bytes": 0}})
    trial.ledger()
    client = trial.use()
    fabric = read_holder(fabric_path(trial.home))
    for to in ("two", "one", "two"):
        trial.holds.hold("move.fetching")
        moved = trial.lzy.succeed("migrate", "ledger", "--node", to)
        assert moved["report"]["follows_bytes"] > 0
        left = {"two": 0, "one": 1}[to]  # that node's link
        set_link(fabric, left, up=False)
        trial.holds.let_go()
        time.sleep(3)  # for what is fetched then to fail
        set_link(fabric, left, up=True)
        trial.wait_until(lambda: all(n["reachable"] for n in trial.lzy.succeed("nodes")))
        trial.wait_until(lambda: not trial.look()["operation"])
    trial.stop(client)


def test_machine_joins_by_invitation(lzy: CommandLine, tmp_path: Path) -> None:
    """It gets a certificate and the store's secret; without a true invitation it gets nothing."""
    other = CommandLine(tmp_path / "other")
    joined: list[subprocess.Popen[bytes]] = []
    try:
        lzy.succeed("up", "--listen", f"127.0.0.1:{free_port()}", "--hibernate-after", "never")
        url = lzy.succeed("nodes", "--invite")["invitation"]
        refused = other.run("agent", "--join", url[:-4], "--name", "b", "--listen", "127.0.0.1:1")
        assert b"invitation does not hold" in refused.stderr
        assert not (other.home / "store" / "secret").exists()
        address = f"127.0.0.1:{free_port()}"
        joined.append(other.start("agent", "--join", url, "--name", "b", "--listen", address))
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = {node["name"]: node for node in lzy.succeed("nodes")}
            if "b" in found and found["b"]["reachable"]:
                break
            assert time.monotonic() < deadline, found
            assert joined[0].poll() is None
            time.sleep(0.1)
        assert len(found) == 2
        secrets = [(home / "store" / "secret").read_bytes() for home in (lzy.home, other.home)]
        assert secrets[0] == secrets[1]
    finally:
        for child in joined:
            child.terminate()
            child.communicate(timeout=PATIENCE_S)
        assert lzy.run("down").returncode == 0
