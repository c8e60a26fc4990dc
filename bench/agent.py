"""What the agent costs: `python bench/agent.py [SESSIONS]`, as root; about two minutes.

Its memory and CPU with many idle sessions, how fast it attaches and checkpoints them, and how soon
a hibernated notebook kernel answers through it. Everything is in a home of its own, and is ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lzy.agent.client import Client

IDLE = """
import threading, time
words = list(range(10_000))
for _ in range(8):
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
time.sleep(1e6)
"""
SETTLES_S, WATCHED_S = 20.0, 60.0
WAKES = 9


def main() -> None:
    """Measure both, and print one line for each figure."""
    sessions = int(sys.argv[1]) if sys.argv[1:] else 200
    home = tempfile.mkdtemp(prefix="lzy-bench-")
    os.environ["LZY_HOME"] = home
    lzy = str(Path(sys.executable).with_name("lzy"))
    never = ("--doze-after", "never", "--hibernate-after", "never")
    subprocess.run([lzy, "up", *never], check=True, stdout=subprocess.DEVNULL)
    try:
        measure_idle_sessions(sessions)
        measure_wake(Path(home))
    finally:
        subprocess.run([lzy, "down"], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(home)


def measure_idle_sessions(number: int) -> None:
    """The agent and the migrator beside `number` idle Python processes of nine threads each."""
    from lzy.agent.client import Client

    client = Client()
    agent = int(client.get("/v1/node")["agent_pid"])
    migrator = find_sibling(agent)
    time.sleep(3)
    print(f"agent without sessions     {resident_mib(agent):.1f} MiB resident")
    command = [sys.executable, "-S", "-c", IDLE]
    quiet = subprocess.DEVNULL
    programs = [subprocess.Popen(command, stdin=quiet) for _ in range(number)]
    try:
        began = time.monotonic()
        for program in programs:
            client.post("/v1/sessions", {"pid": program.pid})
        print(f"{number} attached in           {time.monotonic() - began:.2f} s")
        while any(s["operation"] or not s["image"] for s in sessions(client)):
            time.sleep(0.5)
        print(f"… and all checkpointed in  {time.monotonic() - began:.1f} s")
        time.sleep(SETTLES_S)
        before = cpu_s(agent), cpu_s(migrator)
        time.sleep(WATCHED_S)
        shares = [
            (cpu_s(p) - b) / WATCHED_S for p, b in zip((agent, migrator), before, strict=True)
        ]
        print(f"CPU of the agent           {shares[0]:.2%} of a core, migrator {shares[1]:.2%}")
        print(f"agent with {number} sessions    {resident_mib(agent):.1f} MiB resident")
    finally:
        for session in sessions(client):
            client.post(client.session(session["name"], "detach"))
        for program in programs:
            program.kill()
            program.wait()


def measure_wake(home: Path) -> None:
    """From asking the agent until a client that comes then has the kernel's first reply."""
    from jupyter_client.blocking.client import BlockingKernelClient
    from jupyter_client.connect import write_connection_file

    from lzy.agent.client import Client

    client = Client()
    connection = str(home / "kernel.json")
    write_connection_file(connection, ip="127.0.0.1")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", connection]
    quiet = subprocess.DEVNULL
    kernel = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    pid = kernel.pid

    def reply_s(began: float, *, ready: bool) -> float:
        asking = BlockingKernelClient(connection_file=connection)
        asking.load_connection_file()
        asking.start_channels(hb=False)
        try:
            if not ready:
                asking.wait_for_ready(timeout=60)
                began = time.monotonic()
            asking.execute("1 + 1")
            asking.get_shell_msg(timeout=60)
            return time.monotonic() - began
        finally:
            asking.stop_channels()

    try:
        own = statistics.median(reply_s(0.0, ready=False) for _ in range(5))
        client.post("/v1/sessions", {"pid": pid, "name": "kernel"})
        wakes, replies = [], []
        for _ in range(WAKES):
            client.post(client.session("kernel", "hibernate"))
            kernel.poll()
            time.sleep(0.3)
            began = time.monotonic()
            pid = client.post(client.session("kernel", "wake"))["session"]["pid"]
            wakes.append(time.monotonic() - began)
            replies.append(reply_s(began, ready=True))
        print(f"wake of a kernel           {1e3 * statistics.median(wakes):.0f} ms")
        print(f"… until its first reply    {1e3 * statistics.median(replies):.0f} ms")
        print(f"its own reply              {1e3 * own:.1f} ms")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        kernel.wait()


def sessions(client: Client) -> list[dict[str, Any]]:
    """All sessions of the agent."""
    found: list[dict[str, Any]] = client.get("/v1/sessions")["sessions"]
    return found


def find_sibling(pid: int) -> int:
    """The other child of the parent of `pid`."""
    parent = stat(pid)[1]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(child) for child in children if int(child) != pid)


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """CPU time of a process, in seconds."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)


if __name__ == "__main__":
    main()
