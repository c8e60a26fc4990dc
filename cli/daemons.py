"""`lzy up` and `lzy down`: the agent and the migrator of this machine, started and stopped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..agent.client import is_trial
from .arguments import json_option
from .durations import Duration
from .layout import count, facts, paint, say, say_json
from .trial import (
    LinkSpeed,
    NodeList,
    all_answer,
    daemons_of,
    has_nodes,
    hibernate_all,
    prepare_fleet,
    prepare_trial,
)

if TYPE_CHECKING:
    from ..agent.client import Client
    from ..agent.identity import Identity

_STARTS_WITHIN_S = 40.0
_LONGEST_SOCKET_BYTES = 107
"""unix(7): sun_path has 108 bytes, the last of which is null."""
_ENDS_WITHIN_S = 40.0


@click.command(
    epilog="""\b
    Examples:
      lzy up                                start; does nothing if it runs already
      lzy up --hibernate-after 2h           the same, and set when idle sessions are hibernated
      lzy up --doze-after never             idle sessions are hibernated, but do not doze
      lzy up --foreground                   stay in this terminal (for systemd and containers)
      lzy up --nodes small:1cpu:2G,large:2cpu:8G,gpu:2cpu:8G:1gpu
                                            several nodes on this machine, to try things out
      lzy up --listen 10.0.0.5:7433         have other machines join (see lzy nodes --invite)
      LZY_HOME=/data/lzy lzy up             another installation, beside the first
    """
)
@click.option("--foreground", is_flag=True, help="Do not become a daemon; log to stderr.")
@click.option(
    "--doze-after",
    type=Duration(never=True),
    help="Idle this long at most, sessions doze.  [default: 5m]",
)
@click.option(
    "--hibernate-after",
    type=Duration(never=True),
    help="Idle this long, sessions are hibernated.  [default: 30m]",
)
@click.option(
    "--notice",
    type=Duration(most_s=3600),
    help="Notice is given this long before that.  [default: 10s]",
)
@click.option(
    "--after-wake",
    type=Duration(most_s=86400),
    help="Woken sessions stay at least this long.  [default: 5m]",
)
@click.option(
    "--sample-every",
    type=Duration(least_s=0.05, most_s=3600),
    help="How often to look.  [default: 15s]",
)
@click.option("--all-users", is_flag=True, help="Let every user of this machine talk to the agent.")
@click.option(
    "--nodes",
    type=NodeList(),
    help="Have these nodes, each in namespaces of this machine: NAME:CPUs:MEMORY[:GPUs],…",
)
@click.option("--link", "speed", type=LinkSpeed(), help="Their link: 1gbit, or 100mbit,20ms.")
@click.option("--own-stores", is_flag=True, help="Each of them has a store of its own.")
@click.option("--listen", metavar="HOST:PORT", help="Let other machines join as nodes there.")
@json_option
def up(
    foreground: bool,
    doze_after: float | None,
    hibernate_after: float | None,
    notice: float | None,
    after_wake: float | None,
    sample_every: float | None,
    all_users: bool,
    nodes: list[Identity] | None,
    speed: dict[str, Any] | None,
    own_stores: bool,
    listen: str | None,
    as_json: bool,
) -> None:
    """Look after sessions on this machine: start its agent and its migrator, as one daemon.

    It survives its terminal and restarts what crashes. Everything is kept under LZY_HOME; sessions
    that an earlier `lzy down` left are found again, running or hibernated. What is set stays set.

    With --nodes several agents run, as on several machines: each in network, PID and mount
    namespaces with cgroup limits, joined by a virtual link. GPUs declared there need not exist.
    """
    from ..agent.client import Client, NoAgent
    from ..agent.trial import node_home
    from ..checkpoint.home import home

    given = {
        "doze_after_s": doze_after,
        "hibernate_after_s": hibernate_after,
        "notice_s": notice,
        "after_wake_s": after_wake,
        "sample_s": sample_every,
    }
    chosen = {n: None if v == float("inf") else v for n, v in given.items() if v is not None}
    client = Client()
    try:
        node = client.get("/v1/node")
        if foreground:
            raise click.UsageError(f"lzy is up for {home()} already (agent {node['agent_pid']}).")
        if chosen:
            node = client.post("/v1/node/settings", {"settings": chosen})
        if listen or (nodes and not has_nodes(home(), nodes)):
            raise click.UsageError(f"lzy is up for {home()} otherwise already; lzy down stops it.")
        started = False
    except NoAgent:
        for each in nodes or ():
            _check_length(node_home(home(), each.name))
        _prepare(home(), chosen, all_users)
        if nodes:
            prepare_trial(home(), nodes, speed or {}, own_stores, chosen)
        elif listen:
            prepare_fleet(home(), listen)
        commands = daemons_of(home())
        if foreground:
            os.execve(
                sys.executable, _module("lzy.agent.supervisor", commands), _environment(all_users)
            )
        node = _start(Client(), home(), commands, all_users)
        started = True
        client = Client()
    sessions = client.get("/v1/sessions")["sessions"]
    if as_json:
        say_json({"started": started, **node})
        return
    settings = node["settings"]
    say(
        [
            f"lzy {'is up' if started else 'was up already'}",
            *facts(
                [
                    ("home", str(node["home"])),
                    *([("nodes", names)] if (names := _name_nodes(home())) else []),
                    ("sessions", _count_states(sessions)),
                    ("idle", _describe_windows(settings)),
                ]
            ),
            *([] if sessions else ["lzy attach PID looks after a running Python from now on"]),
        ]
    )


@click.command(
    epilog="""\b
    Examples:
      lzy down                              stop; sessions run on, or stay hibernated
      lzy down && lzy up                    all of them are found again
    """
)
@click.option("--abandon", is_flag=True, help="End what cannot be hibernated (with --nodes).")
@json_option
def down(abandon: bool, as_json: bool) -> None:
    """Stop the agent and the migrator. Sessions stay as they are: running, dozing or hibernated.

    Nodes that are namespaces of this machine go, with their links and limits; what runs there is
    hibernated before, and the next `lzy up` has them all again.
    """
    from ..agent.client import Client, NoAgent
    from ..agent.supervisor import find_supervisor
    from ..checkpoint.errors import Busy, LzyError
    from ..checkpoint.home import home

    sessions: list[dict[str, Any]] = []
    try:
        sessions = Client().get("/v1/sessions", timeout_s=5)["sessions"]
        if is_trial(home()):
            sessions = hibernate_all(sessions, abandon)
    except NoAgent:
        pass
    except LzyError as error:
        click.echo(f"lzy: {error.message}", err=True)
    running = find_supervisor(home())
    if running is None:
        say_json({"stopped": False}) if as_json else say(["lzy was not up"])
        return
    poll = select.poll()
    poll.register(running.pidfd, select.POLLIN)
    try:
        signal.pidfd_send_signal(running.pidfd, signal.SIGTERM)
        ended = poll.poll(_ENDS_WITHIN_S * 1000)
    except ProcessLookupError:
        ended = [(0, 0)]
    finally:
        os.close(running.pidfd)
    if not ended:
        raise Busy(
            f"process {running.pid} does not end",
            remedy=f"see {home() / 'agent' / 'agent.log'}",
        )
    if as_json:
        say_json({"stopped": True, "sessions": len(sessions)})
    else:
        say(["lzy is down", *([f"left as they are: {_count_states(sessions)}"] * bool(sessions))])


def _module(name: str, *documents: Any) -> list[str]:
    """The command that runs a module; -P: nothing is imported from the working directory."""
    return [sys.executable, "-P", "-m", name, *map(json.dumps, documents)]


def _environment(all_users: bool) -> dict[str, str]:
    from ..checkpoint.home import home

    environment = {name: v for name, v in os.environ.items() if name != "LZY_SESSION"}
    environment["LZY_HOME"] = str(home())
    return {**environment, **({"LZY_ALL_USERS": "1"} if all_users else {})}


def _prepare(folder: Path, settings: dict[str, float | None], all_users: bool) -> None:
    """Make the folders, and write settings where the agent finds them when it starts."""
    from ..agent.settings import Settings, check_settings
    from ..agent.state import State
    from ..agent.supervisor import shorten_log

    _check_length(folder)
    for path in (folder, folder / "run", folder / "agent"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder, folder / "run"):  # to be passed through, not to be listed
        mode = path.stat().st_mode & 0o7777
        wanted = mode | 0o011 if all_users else mode
        if wanted != mode:
            path.chmod(wanted)
    shorten_log(folder / "agent" / "agent.log")
    if settings:
        state = State(folder / "agent" / "state.db")
        state.set(check_settings(settings, frozenset(Settings._fields)))
        state.close()


def _check_length(folder: Path) -> None:
    """Refuse a home whose daemons could have no socket there."""
    from ..agent.client import socket_path

    longest = len(os.fsencode(socket_path(folder).with_name("migrator.sock")))
    if longest > _LONGEST_SOCKET_BYTES:
        raise click.UsageError(
            f"{folder} is too long for a socket's path, by {longest - _LONGEST_SOCKET_BYTES}"
            " characters; choose another LZY_HOME."
        )


def _start(
    client: Client, folder: Path, commands: list[list[str]], all_users: bool
) -> dict[str, Any]:
    """Start the supervisor, away from this terminal, and wait for the agent; its node."""
    from ..agent.client import NoAgent, Unanswered
    from ..agent.supervisor import find_supervisor
    from ..checkpoint.errors import Busy, LzyError

    log = folder / "agent" / "agent.log"
    with open(log, "ab") as file:
        # A session of its own, and not our child: the shell's end does not reach it.
        middle = os.fork()
        if middle == 0:
            try:
                subprocess.Popen(
                    _module("lzy.agent.supervisor", commands),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd="/",
                    env=_environment(all_users),
                    start_new_session=True,
                )
            finally:
                os._exit(0)
        os.waitpid(middle, 0)
        began_bytes = file.tell()
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline:
        try:
            node = client.get("/v1/node", timeout_s=5)
            if all_answer(client, folder):
                return node
        except (NoAgent, Busy, Unanswered):  # on a busy machine that takes a while
            pass
        time.sleep(0.02)
    said = log.read_bytes()[began_bytes:].decode(errors="replace").strip().splitlines()
    found = find_supervisor(folder)
    raise LzyError(
        f"the agent did not start: {said[-1] if said else 'it says nothing'}",
        remedy=f"see {log}" + ("; lzy down stops the attempts" if found else ""),
    )


def _name_nodes(folder: Path) -> str:
    """The nodes of a fleet in words; empty where there is one only."""
    from ..agent.client import is_fleet
    from ..migrator.fleet import Fleet

    return ", ".join(m.name for m in Fleet(folder).members) if is_fleet(folder) else ""


def _count_states(sessions: list[dict[str, Any]]) -> str:
    states: dict[str, int] = {}
    for session in sessions:
        states[session["state"]] = states.get(session["state"], 0) + 1
    parts = [f"{number} {state}" for state, number in states.items()]
    return f"{count(len(sessions), 'session')} ({', '.join(parts)})" if parts else "none yet"


def _describe_windows(settings: dict[str, Any]) -> str:
    from .durations import spell

    doze, hibernate = settings["doze_after_s"], settings["hibernate_after_s"]
    words = [
        f"doze after {spell(doze)} at most" if doze is not None else "never doze",
        f"hibernate after {spell(hibernate)}" if hibernate is not None else "never hibernate",
    ]
    return paint(", ".join(words), "dim")
