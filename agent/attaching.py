"""How a running process becomes a session: is it fit, whose is it, and what is it called."""

from __future__ import annotations

import os
import re
import time
from typing import NamedTuple

from ..checkpoint import proc
from ..checkpoint.errors import AccessDenied, Busy, LzyError, NotFound, Unsupported
from ..checkpoint.fitness import refuse_unfit
from ..checkpoint.history import check_free, check_session_name, list_numbers
from ..checkpoint.kept import find_by_device, find_kept
from ..checkpoint.lineage import find_lineage
from ..checkpoint.store import Store
from .naming import claim
from .node import Agent
from .processes import command_of, owner_of
from .readings import has_terminal
from .session import Session
from .state import ENDED, FAILED, LIVING, RUNNING, Record


class Attached(NamedTuple):
    """The session, and what its user should know."""

    session: Session
    notes: list[str]


async def attach(
    agent: Agent,
    pid: int,
    name: str | None,
    settings: dict[str, float | None],
    uid: int,
    *,
    checkpoint: bool = True,
) -> Attached:
    """Look after process `pid` from now on, on behalf of user `uid`.

    `checkpoint`: take one at once. Not of what has just been started, or is just being moved, on a
    terminal that lzy keeps; from there nobody would miss it.

    Raises NotFound, AccessDenied (it is another's), Unsupported (it could never be dumped), Busy
    (the name is another session's).
    """
    claimed, others = "", set[str]()
    while True:  # what was looked at may have changed while the name was asked for
        found = _look(agent, pid, name, uid, others)
        if isinstance(found, Attached):
            return found
        if found.name == claimed:
            return _begin(agent, found, pid, settings, uid, checkpoint)
        if await claim(agent, found.name):
            claimed = found.name
        elif name:
            raise Busy(f"another node has a session {name} already", remedy="choose another --name")
        else:
            others.add(found.name)


class _Newcomer(NamedTuple):
    """A process that may become a session of that name, and what is known of it."""

    name: str
    owner_uid: int
    start_time: int
    command: str
    image: str
    number: int
    environment: dict[str, str]


def _look(
    agent: Agent, pid: int, name: str | None, uid: int, others: set[str]
) -> Attached | _Newcomer:
    """Whether it is fit, whose it is, and what it is called: none of the names of `others`."""
    if pid in (os.getpid(), os.getppid()):
        raise Unsupported(f"pid {pid} is lzy's own agent", remedy="choose another process")
    try:
        owner = owner_of(pid)
    except NotFound as error:
        raise NotFound(error.message, remedy="ps -ef shows what runs", pid=pid) from error
    if uid not in (0, owner):
        raise AccessDenied(
            f"process {pid} belongs to user {owner}, not to {uid}",
            remedy="its owner, or root, can attach it",
            pid=pid,
        )
    start = proc.start_time(pid)
    for session in agent.sessions.values():
        record = session.record
        if record.state in LIVING and (record.pid, record.start_time) == (pid, start):
            if name not in (None, record.name):
                raise Busy(
                    f"process {pid} is session {record.name} already",
                    remedy=f"use it by that name, or lzy detach {record.name} first",
                    pid=pid,
                )
            return Attached(session, [f"process {pid} was attached before"])
    try:
        refuse_unfit(pid)
    except Unsupported as error:
        if "children" not in error.facts:  # those may end; it is in use until then
            raise
    command = command_of(pid)
    environment = _environment(pid)
    with Store.open(agent.store, create=True) as store:
        own = find_lineage(pid, store)
        if name is None and own and own.session not in {*agent.sessions, *others}:
            name = own.session
        if name is None:
            name = _free_name(agent, store, guess_name(command, environment), others)
        if name in agent.sessions:
            raise Busy(f"there is a session {name} already", remedy="choose another --name")
        if own is None or own.session != name:
            check_free(store, check_session_name(name), pid)
        numbers = list_numbers(store, name)
    image, number = own.image if own else "", numbers[-1] if numbers else 0
    return _Newcomer(name, owner, start, command, image, number, environment)


def _begin(
    agent: Agent,
    found: _Newcomer,
    pid: int,
    settings: dict[str, float | None],
    uid: int,
    checkpoint: bool,
) -> Attached:
    notes = []
    why = _why_it_stays(pid, found.environment) if checkpoint else ""
    if why and "hibernate_after_s" not in settings:
        settings = {**settings, "hibernate_after_s": None}
        notes.append(f"it dozes when idle, but is not hibernated by itself: {why}")
        notes.append("with --hibernate-after TIME it is, all the same")
    record = Record(
        name=found.name,
        owner_uid=found.owner_uid,
        state=RUNNING,
        since_unix_s=agent.state.clock.now_s(),
        attached_unix_s=time.time(),
        pid=pid,
        start_time=found.start_time,
        boot_id=proc.boot_id(),
        command=found.command,
        image=found.image,
        number=found.number,
        settings=settings,
    )
    words = f"process {pid}: {found.command[:200]}"
    return Attached(agent.add(record, words, uid, checkpoint=checkpoint), notes)


async def choose_name(agent: Agent, command: str, name: str | None, uid: int) -> str:
    """`name`, or one for a program that is to be started, if it is free. Raises Busy.

    A session of that name that has ended and left no image makes room for it.
    """
    with Store.open(agent.store, create=True) as store:
        wished = check_session_name(name) if name else guess_name(command, {})
        number, chosen = 1, wished
        while True:
            session = agent.sessions.get(chosen)
            if session and _makes_room(session.record, uid):
                await agent.detach(session, uid)
                session = None
            free = not session and not list_numbers(store, chosen) and not find_kept(chosen)
            free = free and (name is not None or agent.promise(chosen))
            if free and await claim(agent, chosen):
                return chosen
            if name:
                what = "a session" if session or free else "a terminal or an image of a session"
                remedy = "choose another --name" + (f", or lzy detach {name}" if session else "")
                raise Busy(f"there is {what} {name} already", remedy=remedy)
            number += 1
            chosen = f"{wished}-{number}"


def _makes_room(record: Record, uid: int) -> bool:
    over = record.state in (ENDED, FAILED) and not record.image
    return over and uid in (0, record.owner_uid)


def guess_name(command: str, environment: dict[str, str]) -> str:
    """What a person would call it: its notebook, its script, or its program."""
    if notebook := environment.get("JPY_SESSION_NAME"):
        stem = os.path.basename(notebook).removesuffix(".ipynb")
    else:
        words = command.split()
        scripts = [word for word in words[1:] if word.endswith(".py")]
        if "ipykernel" in command:
            stem = "notebook"
        elif scripts and "-c" not in words:
            stem = os.path.basename(scripts[0]).removesuffix(".py")
        else:
            stem = os.path.basename(words[0])
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60]
    return plain or "session"


def _free_name(agent: Agent, store: Store, wished: str, others: set[str]) -> str:
    number, name = 1, wished
    while name in agent.sessions or name in others or list_numbers(store, name):
        number += 1
        name = f"{wished}-{number}"
    return name


def _environment(pid: int) -> dict[str, str]:
    """The environment that the process was started with; empty where it may not be read."""
    try:
        text = proc.read_bytes(proc.witness(pid), "environ").decode(errors="replace")
    except (LzyError, OSError):
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _why_it_stays(pid: int, environment: dict[str, str]) -> str:
    """Why it should not leave by itself: somebody would miss it at once. Empty if nobody would."""
    server = environment.get("JPY_PARENT_PID", "")
    if server.isdecimal() and int(server) > 1:
        try:
            watching = not proc.has_ended(int(server))
        except NotFound:
            watching = False
        if watching:
            return f"the notebook server that started it (process {server}) would start another"
    if has_terminal(pid) and not find_by_device(os.readlink(f"/proc/{proc.witness(pid)}/fd/0")):
        return "it is on somebody's terminal; when it wakes it is on one that lzy console reaches"
    return ""
