"""The virtual network that nodes of one machine are joined by: a bridge in a namespace of its own.

    fabric namespace:  bridge 10.77.0.1/24 ─┬─ veth NAME ─── eth0 10.77.0.2/24  (node's namespace)
                                            └─ veth NAME ─── eth0 10.77.0.3/24

Nothing of it is reachable from outside, and there is no way out. A process holds the namespace and
the kernel removes all of it with that process. Links are made with `ip`, their speed set by `tc`;
where that cannot delay, a process of ours does (`delay`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from ..checkpoint import proc
from ..checkpoint.errors import LzyError, NotFound, Unsupported
from ..checkpoint.linux.namespaces import CLONE_NEWNET, enter
from .authority import fleet_folder
from .delay import start_relay

NETWORK = "10.77.0"
PORT = 7434
FABRIC_ADDRESS = f"{NETWORK}.1:7433"
"""Where the agents reach the migrator, which lives beside the bridge."""
_COMES_WITHIN_S = 10.0


def fabric_path(folder: Path) -> Path:
    """The file that says which process holds the network of a home."""
    return fleet_folder(folder) / "fabric.json"


def has_fabric(folder: Path) -> bool:
    """Whether the nodes of that home are namespaces of this machine."""
    return (fleet_folder(folder) / "trial.json").exists()


def address_of(number: int) -> str:
    """HOST:PORT of node `number`, from 0."""
    return f"{NETWORK}.{number + 2}:{PORT}"


def write_holder(path: Path, pid: int, **more: Any) -> None:
    """Say that `pid` holds something; it is known by its start, too."""
    document = {"pid": pid, "start_time": proc.start_time(pid), "boot_id": proc.boot_id(), **more}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(document))
    draft.rename(path)


def read_holder(path: Path) -> int:
    """The living process that `path` names, else 0."""
    try:
        found = json.loads(path.read_bytes())
        same = proc.start_time(found["pid"]) == found["start_time"]
        alive = same and not proc.has_ended(found["pid"])
        return int(found["pid"]) if alive and found["boot_id"] == proc.boot_id() else 0
    except (OSError, ValueError, KeyError, TypeError, NotFound):
        return 0


def await_fabric(folder: Path) -> int:
    """The process that holds the network, once it does. Raises LzyError."""
    deadline = time.monotonic() + _COMES_WITHIN_S
    while time.monotonic() < deadline:
        if pid := read_holder(fabric_path(folder)):
            return pid
        time.sleep(0.02)
    raise LzyError(f"the network of {folder} is not there", remedy="lzy down && lzy up")


def enter_fabric(folder: Path) -> None:
    """Be in the network's own namespace from now on."""
    enter(f"/proc/{await_fabric(folder)}/ns/net", CLONE_NEWNET)


def make_bridge() -> None:
    """In the namespace that we are in: the bridge, and our own address on it."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "lzy0", "type", "bridge")
    run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "lzy0")
    run("ip", "link", "set", "lzy0", "up")


def link(fabric: int, node: int, number: int, speed: dict[str, Any]) -> int:
    """Join the namespace of process `node` to the bridge; `speed`: bits_per_s, delay_s, or none.

    A child of ours that keeps the link (`delay`), or 0 where the kernel does all of it.
    """
    outer, delay_s, keeper = f"v{number}", float(speed.get("delay_s") or 0), 0
    inside, outside = ["nsenter", "-t", str(node), "-n"], ["nsenter", "-t", str(fabric), "-n"]
    if delay_s and not can_delay():
        keeper = start_relay(fabric, outer, node, "eth0", delay_s)
        speed = {**speed, "delay_s": 0}
    else:
        run(*outside, "ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0",
            "netns", str(node))  # fmt: skip
    run(*outside, "ip", "link", "set", outer, "master", "lzy0", "up")
    run(*inside, "ip", "link", "set", "lo", "up")
    run(*inside, "ip", "link", "set", "eth0", "address", f"02:00:00:4d:00:{number + 2:02x}")
    run(*inside, "ip", "addr", "add", f"{NETWORK}.{number + 2}/24", "dev", "eth0")
    run(*inside, "ip", "link", "set", "eth0", "up")
    shape(inside, "eth0", speed)
    shape(outside, outer, speed)
    return keeper


def can_delay() -> bool:
    """Whether this kernel has a queue that delays (sch_netem)."""
    try:
        shape(["unshare", "-n"], "lo", {"delay_s": 0.001})
    except Unsupported:
        return False
    return True


def shape(where: list[str], device: str, speed: dict[str, Any]) -> None:
    """Bound what goes out of a link. Raises Unsupported where the kernel has no such queue."""
    words = [*where, "tc", "qdisc", "add", "dev", device, "root"]
    rate, delay_s = int(speed.get("bits_per_s") or 0), float(speed.get("delay_s") or 0)
    try:
        if delay_s:
            more = ("rate", f"{rate}bit") if rate else ()
            run(*words, "netem", "delay", f"{delay_s * 1000:g}ms", "limit", "100000", *more)
        elif rate:
            run(*words, "tbf", "rate", f"{rate}bit", "burst", "256kb", "latency", "200ms")
    except LzyError as error:
        what = "a delay (sch_netem)" if delay_s else "a rate (sch_tbf)"
        raise Unsupported(
            f"this kernel gives links no {what[2:]}: {error.message}",
            remedy="leave it out, or load the kernel's module",
        ) from error


def check_speed(speed: dict[str, Any]) -> None:
    """Raise Unsupported if this kernel cannot give links that speed; tried where nobody is."""
    if speed.get("bits_per_s"):
        shape(["unshare", "-n"], "lo", {"bits_per_s": speed["bits_per_s"]})
    if speed.get("delay_s") and not can_delay() and not os.path.exists("/dev/net/tun"):
        shape(["unshare", "-n"], "lo", {"delay_s": speed["delay_s"]})


def set_link(fabric: int, number: int, *, up: bool) -> None:
    """Cut the way to a node, or heal it."""
    words = ["ip", "link", "set", f"v{number}", "up" if up else "down"]
    run("nsenter", "-t", str(fabric), "-n", *words)


def run(*words: str) -> str:
    """What a command says. Raises LzyError, with its own words."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise Unsupported(
            f"there is no command {words[0]} here", remedy="install iproute2 and util-linux"
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise LzyError(f"{' '.join(words)}: {said[-1]}")
    return done.stdout
