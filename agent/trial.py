"""Nodes that are namespaces of this machine: `python -m lzy.agent.trial fabric|node NAME`.

`fabric` holds the network (`network`). `node NAME` makes a network, a PID and a mount namespace,
whose first process is a supervisor that keeps that node's agent running, with a home of its own at
`nodes/NAME`. Sessions live as long as that first process; `lzy down` hibernates them before.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.errors import LzyError
from ..checkpoint.home import home
from ..checkpoint.linux.detached import forget_signals, set_name
from ..checkpoint.linux.namespaces import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    mount_own_proc,
    unshare,
)
from .authority import fleet_folder
from .cgroups import Cgroup
from .network import (
    await_fabric,
    fabric_path,
    link,
    make_bridge,
    read_holder,
    write_holder,
)
from .voice import speak_safely

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOKS_EVERY_S = 1.0


def node_home(folder: Path, name: str) -> Path:
    """The home of a node of this machine."""
    return folder / "nodes" / name


def holder_path(folder: Path, name: str) -> Path:
    """The file that names the first process of a node."""
    return node_home(folder, name) / "holder.json"


def read_trial(folder: Path) -> dict[str, Any]:
    """What `lzy up --nodes` was told: `nodes` in order, `link`."""
    found: dict[str, Any] = json.loads((fleet_folder(folder) / "trial.json").read_bytes())
    return found


def hold_fabric(folder: Path) -> None:
    """Have the bridge until SIGTERM."""
    set_name("lzy-fabric")
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    unshare(CLONE_NEWNET)
    make_bridge()
    write_holder(fabric_path(folder), os.getpid())
    signal.sigwait(_SIGNALS)
    fabric_path(folder).unlink(missing_ok=True)


def hold_node(folder: Path, name: str) -> None:
    """Have a node until SIGTERM; one that outlived us before is gone on with."""
    set_name("lzy-node")
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    trial = read_trial(folder)
    number = trial["nodes"].index(name)
    first = read_holder(holder_path(folder, name)) or _begin(folder, name, number)
    pidfd = os.pidfd_open(first)
    limits = json.loads((node_home(folder, name) / "node.json").read_bytes())
    group = Cgroup.make(folder, name)
    group.limit(cpus=limits["cpus"], memory_bytes=limits["memory_bytes"])
    group.add(first)
    linked = keeper = 0
    try:
        while not select.select([pidfd], [], [], 0)[0]:
            fabric = await_fabric(folder)
            if fabric != linked:
                if keeper:
                    os.kill(keeper, signal.SIGKILL)
                    os.waitpid(keeper, 0)
                    keeper = 0
                try:
                    keeper = link(fabric, first, number, trial["link"])
                except LzyError as error:
                    if "File exists" not in error.message:
                        raise
                linked = fabric
            if keeper and os.waitpid(keeper, os.WNOHANG)[0]:
                keeper = linked = 0  # again, at once
                continue
            if signal.sigtimedwait(_SIGNALS, _LOOKS_EVERY_S):
                break
    finally:
        _end(first, pidfd)
        holder_path(folder, name).unlink(missing_ok=True)
        group.remove()


def _end(first: int, pidfd: int) -> None:
    for number, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return
        if select.select([pidfd], [], [], patience_s)[0]:
            return


def _begin(folder: Path, name: str, number: int) -> int:
    """Make the namespaces, and their first process; its pid here."""
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID)
            first = os.fork()
            if first == 0:
                _be_first(node_home(folder, name), number)
            os.write(writing, b"%d" % first)
        finally:
            os._exit(0)
    os.close(writing)
    told = os.read(reading, 32)
    os.close(reading)
    os.waitpid(middle, 0)
    if not told:
        raise LzyError(f"the namespaces of node {name} cannot be made; see agent/agent.log")
    first = int(told)
    write_holder(holder_path(folder, name), first)
    return first


def _be_first(own: Path, number: int) -> None:
    """Process 1 of a node: its /proc, pids that differ from other nodes', its supervisor."""
    try:
        forget_signals()
        os.setsid()
        mount_own_proc()
        highest = int(Path("/proc/sys/kernel/pid_max").read_text())
        step = max(300, min(20000, highest // 64))
        Path("/proc/sys/kernel/ns_last_pid").write_text(str((number + 1) * step))
        os.environ["LZY_HOME"] = str(own)
        log = os.open(own / "agent" / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        commands = json.dumps([[sys.executable, "-P", "-m", "lzy.agent"]])
        command = [sys.executable, "-P", "-m", "lzy.agent.supervisor", commands]
        os.execv(sys.executable, command)
    except BaseException as error:
        print(f"lzy: node {own.name} cannot begin: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def main(words: list[str]) -> None:
    """What `lzy up` runs."""
    speak_safely()
    if words == ["fabric"]:
        hold_fabric(home())
    else:
        hold_node(home(), words[1])


if __name__ == "__main__":
    main(sys.argv[1:])
