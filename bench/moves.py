"""Where the time of a move goes: `python bench/moves.py [--stores apart] [--moves N] MEBIBYTES…`.

As root, alone on the machine. Two nodes in namespaces of this machine; the session is a TCP server
of so much random memory, of which each message looks at 8 KiB and writes 4 anew; a client sends one
each 5 ms all the time, from a third namespace, and connects again when its connection ends. Of each
move it prints the longest that a message took, what of it lzy says it stood still, and when each
stage between the last dump's begin and the first instruction was reached. Everything is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lzy.agent.client import Client

PROGRAMS = Path(__file__).resolve().parent.parent / "tests" / "programs"
PORT = 9000
WHERE = ("10.77.0.2", "10.77.0.3")
SETTLES_S = 1.5
PATIENCE_S = 120.0


class Move(NamedTuple):
    """One move: seconds; `stages` from the stop on, by name."""

    longest_s: float
    stopped_s: float
    took_s: float
    last_bytes: int
    stages: list[tuple[float, str]]


def main() -> None:
    """Measure, and print one block for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+", metavar="MEBIBYTES")
    parser.add_argument("--stores", choices=("one", "apart"), default="one")
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument("--link", default="")
    asked = parser.parse_args()
    for size in asked.sizes:
        report(size, asked.stores, measure(size, asked.stores, asked.moves, asked.link))


def measure(mebibytes: int, stores: str, moves: int, link: str) -> list[Move]:
    """So many moves to and fro of a session of that size."""
    home = Path(tempfile.mkdtemp(prefix="lzy-bench-"))
    stages = home / "stages"
    os.environ |= {"LZY_HOME": str(home), "LZY_TEST_STAGES_TO": str(stages)}
    memory = f"{max(2, 3 * mebibytes // 1024 + 1)}G"
    nodes = ",".join(f"{name}:2cpu:{memory}" for name in ("one", "two"))
    never = ("--doze-after", "never", "--hibernate-after", "never", "--after-wake", "0s")
    apart = ("--own-stores",) if stores == "apart" else ()
    speed = ("--link", link) if link else ()
    lzy("up", "--nodes", nodes, *never, *apart, *speed)
    children: list[subprocess.Popen[str]] = []
    try:
        from lzy.agent.client import Client

        pid = start_server(home, mebibytes, children)
        lzy("attach", str(pid), "--name", "server")
        client = Client(home)
        wait_until_settled(client)
        using = start_client(home, children)
        found = [move(client, stages, using, ("two", "one")[number % 2]) for number in range(moves)]
        using.terminate()
        return found
    finally:
        lzy("down", "--abandon")
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(home)


def move(client: Client, stages: Path, using: subprocess.Popen[str], to: str) -> Move:
    """Move it, under use; what that took."""
    time.sleep(SETTLES_S)
    wait_until_settled(client)
    ask_longest(using)
    stages.write_text("")
    path = client.session("server", "migrate")
    report = client.work(path, {"node": to}, lambda *_: None)["report"]
    time.sleep(SETTLES_S)
    return Move(
        ask_longest(using),
        report["stopped_s"],
        report["took_s"],
        report["last_bytes"],
        read_stages(stages),
    )


def read_stages(path: Path) -> list[tuple[float, str]]:
    """The stages from the last dump's stop to the first instruction: seconds since it, name."""
    told = sorted((int(at), name) for at, _, name in map(str.split, path.read_text().splitlines()))
    begin = max((n for n, (_, name) in enumerate(told) if name == "move.stopping"), default=0)
    told = told[begin:]
    end = next((n for n, (_, name) in enumerate(told) if name == "restore.committed"), len(told))
    return [((at - told[0][0]) / 1e9, name) for at, name in told[: end + 1]]


def report(mebibytes: int, stores: str, moves: list[Move]) -> None:
    """Print it: each figure's median and range, and of the median move the stages."""
    print(f"\n{mebibytes} MiB, {'one store' if stores == 'one' else 'stores apart'}")
    for what, figures in (
        ("longest that a message took", [m.longest_s for m in moves]),
        ("stood still, as lzy says", [m.stopped_s for m in moves]),
        ("the whole move", [m.took_s for m in moves]),
    ):
        shown = ", ".join(f"{1e3 * figure:.0f}" for figure in figures)
        print(f"  {what:30} {1e3 * statistics.median(figures):6.0f} ms  ({shown})")
    print(f"  written at last {[f'{m.last_bytes / 1048576:.1f} MiB' for m in moves]}")
    median = sorted(moves, key=lambda m: m.longest_s)[len(moves) // 2]
    before = 0.0
    for at, name in median.stages:
        print(f"    {1e3 * at:7.1f} ms  +{1e3 * (at - before):6.1f}  {name}")
        before = at


# -- the session and its client ----------------------------------------------------------------


def start_server(home: Path, mebibytes: int, children: list[subprocess.Popen[str]]) -> int:
    """The session's process on node one; its pid here."""
    words = [sys.executable, str(PROGRAMS / "ledger.py"), str(PORT), str(mebibytes)]
    children.append(
        subprocess.Popen(
            [command(), "enter", "one", "--", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True,
        )
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    wanted = "\0".join(words).encode() + b"\0"
    while time.monotonic() < deadline:
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes() == wanted and listens(pid):
                    return int(pid)
            except OSError:
                continue
        time.sleep(0.05)
    raise SystemExit("the server does not start")


def listens(pid: str) -> bool:
    """Whether the port is listened at in the network of process `pid`."""
    rows = Path(f"/proc/{pid}/net/tcp").read_text().split("\n")[1:-1]
    return any(row.split()[1].endswith(f":{PORT:04X}") and row.split()[3] == "0A" for row in rows)


def start_client(home: Path, children: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Its client, between the nodes."""
    from lzy.agent.network import fabric_path, read_holder

    words = [sys.executable, str(PROGRAMS / "ledger_client.py"), str(PORT), *WHERE]
    client = subprocess.Popen(
        ["nsenter", "-t", str(read_holder(fabric_path(home))), "-n", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    children.append(client)
    assert client.stdout
    assert client.stdout.readline() == "ready\n"
    return client


def ask_longest(client: subprocess.Popen[str]) -> float:
    """The longest that a message took since it was asked last, in seconds."""
    assert client.stdin
    assert client.stdout
    client.stdin.write("\n")
    client.stdin.flush()
    told = json.loads(client.stdout.readline())
    if told["wrong"]:
        raise SystemExit(f"the client was told something wrong: {told}")
    return float(told["longest_s"])


def wait_until_settled(client: Client) -> None:
    """Until the session runs, has an image, and nothing is done to it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        session: dict[str, Any] = client.get("/v1/sessions/server")
        if session["image"] and session["state"] == "running" and not session["operation"]:
            return
        time.sleep(0.1)
    raise SystemExit(f"the session does not settle: {session}")


def command() -> str:
    """The command line that is measured."""
    return str(Path(sys.executable).with_name("lzy"))


def lzy(*words: str) -> None:
    """Run a command of lzy's."""
    subprocess.run([command(), *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
