"""The doors of the agent: each path and verb, who may use it, and what it answers.

Every request is somebody's, known by the kernel. Root may do everything; others see and touch their
own sessions only. Whoever tries another's is refused, and that stands in the events (the audit).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from ..checkpoint.errors import (
    AccessDenied,
    LzyError,
    NotFound,
)
from ..checkpoint.history import check_session_name
from ..checkpoint.unavailable import unavailable
from . import errors
from .attaching import attach, choose_name
from .authority import MIGRATOR
from .cgroups import check_bound
from .chronicle import describe_reading
from .documents import describe_event, describe_node, describe_session, write_metrics
from .fields import BadBody, Field, parse
from .http import Request, Response
from .node import Agent
from .node_api import NODE_ROUTES, NodeApi
from .operations import CHECKPOINT, DOZE, HIBERNATE, ROUSE, WAKE
from .peers import split_address
from .routes import NODES, Route, parse_query
from .session import Session
from .settings import (
    BOUNDS,
    LONGEST_HOLD_S,
    MAY_BE_NEVER,
    OF_A_SESSION,
    Settings,
    check_settings,
)
from .state import ASLEEP, HIBERNATED
from .watching import Watcher

_FOLLOW_S = 15.0
_REQUESTS: Final = ("cpu", "memory_bytes", "gpu", "node")
_WAIT = Field("boolean", "false: answer at once, with 202")
_IF_IDLE = Field("boolean", "only if every probe says idle, now and after the notice")
_ASKED: Final = {
    "cpu": Field("number", "cores", 0, 4096),
    "memory_bytes": Field("integer", "memory", 0, 1 << 50),
    "gpu": Field("integer", "GPUs", 0, 64),
}
_REASON = Field("string", "why, for the events")


def _settings_fields(names: frozenset[str]) -> dict[str, Field]:
    return {
        name: Field("number", "a setting", *BOUNDS[name], may_be_null=name in MAY_BE_NEVER)
        for name in sorted(names)
    }


_OF_A_SESSION: Final = _settings_fields(OF_A_SESSION)
_S = "/v1/sessions/{name}"
ROUTES: Final = (
    Route("GET", "/v1/node", "node", "The node and its settings."),
    Route("POST", "/v1/node/settings", "set_node", "Change settings of the node (root only).",
          {"settings": Field("object", "names and values", required=True,
                             keys=_settings_fields(frozenset(Settings._fields)))}),
    Route("POST", "/v1/node/drain", "drain", "Take no sessions any more, or again (root only).",
          {"draining": Field("boolean", "false: again", required=True)}),
    Route("GET", "/v1/sessions", "sessions", "All sessions that the caller may see."),
    Route("POST", "/v1/sessions", "attach", "Look after a running process.",
          {"pid": Field("integer", "the process", 1, 1 << 22, required=True),
           "name": Field("string", "the session's name", 1, 200),
           "settings": Field("object", "settings of the session", keys=_OF_A_SESSION),
           "checkpoint": Field("boolean", "false: do not take one at once")}),
    Route("POST", "/v1/names", "names", "A free name for a program that is to be started.",
          {"command": Field("string", "its command line", 1, 1000, required=True),
           "name": Field("string", "the name that is wished for", 1, 200)}),
    Route("GET", _S, "session", "One session.", None,
          {"look": Field("string", "1: look at it now if nobody has yet", 1, 1)}),
    Route("POST", f"{_S}/detach", "detach", "Look after it no longer."),
    Route("POST", f"{_S}/checkpoint", "checkpoint", "Take a checkpoint.", {"wait": _WAIT}),
    Route("POST", f"{_S}/hibernate", "hibernate", "Dump it and end its process.",
          {"wait": _WAIT, "if_idle": _IF_IDLE, "reason": _REASON}),
    Route("POST", f"{_S}/doze", "doze", "Have it give its memory back.",
          {"wait": _WAIT, "if_idle": _IF_IDLE, "reason": _REASON}),
    Route("POST", f"{_S}/rouse", "rouse", "Bring all its memory back.", {"wait": _WAIT}),
    Route("POST", f"{_S}/wake", "wake", "Have it run again.",
          {"wait": _WAIT, "image": Field("string", "an earlier checkpoint", 1, 250),
           "terminal": Field("string", "the caller's terminal", 1, 200),
           "reason": _REASON,
           "anywhere": Field("boolean", "where there is room, if a migrator says where")}),
    Route("POST", f"{_S}/migrate", "migrate", "Move it to another node (the migrator only).",
          {"wait": _WAIT, "reason": _REASON,
           "node": Field("string", "its name", 1, 32, required=True),
           "address": Field("string", "where its agent listens", 1, 200, required=True),
           "requests": Field("object", "what it asks for", keys=_ASKED),
           "bytes_per_s": Field("number", "how fast; 0: as it goes", 0, 1e12),
           "wake": Field("boolean", "false: if it hibernates, it goes on doing so")}),
    Route("POST", f"{_S}/requests", "requests", "What it asks for of a node (the migrator only).",
          {"requests": Field("object", "what it asks for; nothing: it waits no more", required=True,
                             keys={**_ASKED, "node": Field("string", "a node", 1, 32)})}),
    Route("POST", f"{_S}/hold", "hold", "Do not evict it for a while.",
          {"for_s": Field("number", "for how long", 1, LONGEST_HOLD_S, required=True)}),
    Route("POST", f"{_S}/release", "release", "Hold it no longer."),
    Route("POST", f"{_S}/signal", "signal", "Send its process a signal; wakes it if need be.",
          {"signal": Field("integer", "the signal's number", 1, 64, required=True)}),
    Route("POST", f"{_S}/settings", "set_session", "Change settings of a session.",
          {"settings": Field("object", "names and values", required=True, keys=_OF_A_SESSION)}),
    Route("GET", "/v1/events", "events", "What happened, oldest first.", None,
          {"after": Field("integer", "only events numbered above this", 0, 1 << 53),
           "last": Field("integer", "only so many of the newest", 0, 20000),
           "session": Field("string", "only of this session", 1, 250),
           "follow": Field("string", "1: go on as they come, a line each", 1, 1)}),
    Route("GET", "/v1/readings", "readings", "What sessions held, and when they were in use.", None,
          {"after_unix_s": Field("integer", "only since then", 0, 1 << 53),
           "session": Field("string", "only of this session", 1, 250)}),
    Route("GET", "/v1/metrics", "metrics", "Metrics for Prometheus (root only)."),
    Route("GET", "/v1/openapi.json", "openapi", "This document."),
    *NODE_ROUTES,
)  # fmt: skip


class Api:
    """Answers requests to an agent."""

    def __init__(self, agent: Agent, watcher: Watcher) -> None:
        self._agent = agent
        self._watcher = watcher
        self._nodes = NodeApi(agent)

    async def answer(self, request: Request) -> Response:
        """Find the door and go through it; every error of lzy's becomes an answer."""
        try:
            return await self._dispatch(request)
        except LzyError as error:
            return Response(errors.status_of(error), errors.describe(error))
        except PermissionError as error:
            words = f"may not use {error.filename or request.path[:200]}: {error.strerror}"
            told: LzyError = AccessDenied(words, remedy="lzy doctor tells what it lacks")
            return Response(errors.status_of(told), errors.describe(told))
        except OSError as error:  # of a log or a lock, say: whatever the engine does is explained
            told = unavailable(f"do {request.path[:200]}", error)
            return Response(errors.status_of(told), errors.describe(told))

    async def _dispatch(self, request: Request) -> Response:
        others = []
        for route in ROUTES:
            if not (found := route.pattern.fullmatch(request.path)):
                continue
            if route.method != request.method:
                others.append(route.method)
                continue
            try:
                body = parse(request.body, route.fields)
                query = parse_query(request, route)
            except LzyError as error:
                return Response(400, errors.describe(error))
            if route.who == NODES:
                return await self._nodes.answer(route, request, body | query, found.groupdict())
            if request.peer and request.uid < 0:
                raise AccessDenied(f"{request.peer} may not {route.handle}")
            handle: Callable[..., Awaitable[Response]] = getattr(self, f"_{route.handle}")
            if not found.groups():
                return await handle(request, body | query)
            session = self._find(request, found["name"], route)
            return await handle(request, body | query, session)
        if others:
            unfit = LzyError(f"{request.method} is not for {request.path[:200]}")
            return Response(405, errors.describe(unfit), headers={"Allow": ", ".join(others)})
        raise NotFound(f"there is no {request.path[:200]}", remedy="see /v1/openapi.json")

    def _find(self, request: Request, name: str, route: Route) -> Session:
        """The session, if the caller may touch it; whoever may not is written down."""
        session = self._agent.find(name)
        record = session.record
        if request.uid not in (0, record.owner_uid):
            words = f"user {request.uid} may not {route.handle} it (process {request.pid})"
            self._agent.update(session, "refused", words, request.uid)
            raise AccessDenied(
                f"session {name} belongs to user {record.owner_uid}, not to {request.uid}",
                remedy="ask its owner, or root",
            )
        return session

    def _refuse_others(self, request: Request) -> None:
        if request.uid not in (0, os.geteuid()):
            words = f"user {request.uid} may not {request.method} {request.path}"
            self._agent.state.tell("", 0, "refused", words, request.uid)
            self._agent.ring()
            raise AccessDenied(
                "only root and the agent's own user may do that", remedy="ask one of them"
            )

    # -- the node

    async def _node(self, request: Request, asked: dict[str, Any]) -> Response:
        return Response(document=describe_node(self._agent))

    async def _set_node(self, request: Request, asked: dict[str, Any]) -> Response:
        self._refuse_others(request)
        values = _settings(asked["settings"], frozenset(Settings._fields))
        self._agent.state.set(values)
        self._watcher.hurry()
        self._agent.limits.hurry()
        words = ", ".join(f"{name} {value}" for name, value in values.items())
        self._agent.state.tell("", 0, "set", words, request.uid)
        self._agent.ring()
        return Response(document=describe_node(self._agent))

    async def _drain(self, request: Request, asked: dict[str, Any]) -> Response:
        self._refuse_others(request)
        draining = asked["draining"]
        self._agent.state.set({"draining": float(draining)})
        words = "takes no sessions any more" if draining else "takes sessions again"
        self._agent.state.tell("", 0, "drained", words, request.uid)
        self._agent.ring()
        return Response(document=describe_node(self._agent))

    async def _metrics(self, request: Request, asked: dict[str, Any]) -> Response:
        self._refuse_others(request)
        return Response(text=write_metrics(self._agent))

    async def _openapi(self, request: Request, asked: dict[str, Any]) -> Response:
        from .openapi import write_openapi

        return Response(document=write_openapi(ROUTES))

    async def _events(self, request: Request, asked: dict[str, Any]) -> Response:
        state = self._agent.state
        after = asked["after"] if "after" in asked else state.last_event(asked.get("last", 100))
        session = asked.get("session", "")
        if asked.get("follow") == "1":
            return Response(lines=self._follow(request, after, session))
        found = state.events(after, session=session, most=20000)
        return Response(
            document={"events": [describe_event(e) for e in found if _may_see(request, e)]}
        )

    async def _follow(self, request: Request, after: int, session: str) -> AsyncIterator[Any]:
        listens = int(request.peer == MIGRATOR)
        self._agent.calls.listening_migrators += listens
        try:
            while not self._agent.is_stopping:
                found = self._agent.state.events(after, session=session)
                if not found:
                    await self._agent.await_event(_FOLLOW_S)
                for event in found:
                    after = event.number
                    if _may_see(request, event):
                        yield describe_event(event)
        finally:
            self._agent.calls.listening_migrators -= listens

    async def _readings(self, request: Request, asked: dict[str, Any]) -> Response:
        found = self._agent.chronicle.readings(
            asked.get("after_unix_s", 0), asked.get("session", "")
        )
        return Response(
            document={"readings": [describe_reading(r) for r in found if _may_see(request, r)]}
        )

    # -- sessions

    async def _sessions(self, request: Request, asked: dict[str, Any]) -> Response:
        found = [
            describe_session(self._agent, session)
            for session in self._agent.sessions.values()
            if request.uid in (0, session.record.owner_uid)
        ]
        return Response(document={"sessions": found, "now_unix_s": time.time()})

    async def _session(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        if asked.get("look") == "1":
            await self._watcher.look_first(session)
        return Response(document=describe_session(self._agent, session))

    async def _attach(self, request: Request, asked: dict[str, Any]) -> Response:
        settings = _settings(asked.get("settings", {}), OF_A_SESSION)
        try:
            attached = await attach(
                self._agent,
                asked["pid"],
                _name(asked),
                settings,
                request.uid,
                checkpoint=asked.get("checkpoint", True),
            )
        except AccessDenied as error:
            self._agent.state.tell("", 0, "refused", str(error), request.uid)
            self._agent.ring()
            raise
        self._watcher.hurry()
        self._agent.limits.hurry()
        document = describe_session(self._agent, attached.session)
        return Response(document={"session": document, "notes": attached.notes})

    async def _names(self, request: Request, asked: dict[str, Any]) -> Response:
        name = _name(asked)
        free = await choose_name(self._agent, asked["command"], name, request.uid)
        return Response(document={"name": free})

    async def _detach(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        await self._agent.detach(session, request.uid)
        return Response(document={"session": describe_session(self._agent, session)})

    async def _checkpoint(self, *call: Any) -> Response:
        return await self._operate(CHECKPOINT, *call)

    async def _hibernate(self, *call: Any) -> Response:
        return await self._operate(HIBERNATE, *call)

    async def _doze(self, *call: Any) -> Response:
        return await self._operate(DOZE, *call)

    async def _rouse(self, *call: Any) -> Response:
        return await self._operate(ROUSE, *call)

    async def _wake(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        if terminal := asked.get("terminal"):
            _check_terminal(terminal, request.uid)
        image = asked.get("image", "")
        if image and image.rpartition("@")[0] != session.record.name != image:
            raise BadBody(
                f"{image} is no checkpoint of {session.record.name}",
                remedy=f"see lzy log {session.record.name}",
            )
        if asked.get("anywhere") and session.record.state == HIBERNATED:
            self._agent.calls.call(session, asked.get("reason") or "somebody wants it")
            return Response(202, {"session": describe_session(self._agent, session)})
        return await self._operate(WAKE, request, asked, session)

    async def _migrate(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        self._refuse_others(request)
        try:
            split_address(asked["address"])
        except LzyError as error:
            raise BadBody(error.message, remedy="give it as HOST:PORT") from None
        _check_bound(session, asked.get("requests", {}))
        session.call_off()

        def work(progress: Callable[[dict[str, Any]], None] | None) -> Awaitable[dict[str, Any]]:
            return self._agent.departures.migrate(
                session,
                asked["node"],
                asked["address"],
                asked.get("requests", session.record.requests),
                why=asked.get("reason", "asked"),
                wake=asked.get("wake", True),
                bytes_per_s=asked.get("bytes_per_s", 0.0),
                actor_uid=request.uid,
                progress=progress,
            )

        return await self._work(request, asked, session, work)

    async def _requests(
        self, request: Request, asked: dict[str, Any], session: Session
    ) -> Response:
        self._refuse_others(request)
        wanted = {name: asked["requests"][name] for name in _REQUESTS if name in asked["requests"]}
        _check_bound(session, wanted)
        since = session.record.waiting_since_unix_s or self._agent.state.clock.now_s()
        self._agent.update(session, requests=wanted, waiting_since_unix_s=since if wanted else None)
        return Response(document={"session": describe_session(self._agent, session)})

    async def _operate(
        self, verb: str, request: Request, asked: dict[str, Any], session: Session
    ) -> Response:
        """Start an operation on a session."""

        def work(progress: Callable[[dict[str, Any]], None] | None) -> Awaitable[dict[str, Any]]:
            if asked.get("if_idle"):
                reason = asked.get("reason") or "it is idle"
                return self._watcher.evict(session, verb, reason, request.uid, progress)
            session.call_off()
            return self._agent.turns.operate(
                session,
                verb,
                why=asked.get("reason") or ("hibernate" if verb == HIBERNATE else "asked"),
                actor_uid=request.uid,
                image=asked.get("image", ""),
                terminal=asked.get("terminal", ""),
                progress=progress,
            )

        return await self._work(request, asked, session, work)

    async def _work(
        self,
        request: Request,
        asked: dict[str, Any],
        session: Session,
        work: Callable[[Callable[[dict[str, Any]], None] | None], Awaitable[dict[str, Any]]],
    ) -> Response:
        """Answer at its end, at once, or line by line, as the caller likes."""
        if asked.get("wait") is False:
            self._agent.spawn(work(None))
            return Response(202, {"session": describe_session(self._agent, session)})
        if "application/x-ndjson" in request.headers.get("accept", ""):
            return Response(lines=self._tell_progress(session, work))
        report = await asyncio.shield(asyncio.ensure_future(work(None)))
        return Response(document=self._outcome(session, report))

    def _outcome(self, session: Session, report: dict[str, Any]) -> dict[str, Any]:
        return {"session": describe_session(self._agent, session), "report": report}

    async def _tell_progress(
        self,
        session: Session,
        work: Callable[[Callable[[dict[str, Any]], None]], Awaitable[dict[str, Any]]],
    ) -> AsyncIterator[Any]:
        told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(1000)

        def progress(document: dict[str, Any]) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                told.put_nowait(document)

        task = asyncio.ensure_future(work(progress))  # it goes on if the caller leaves
        task.add_done_callback(lambda _: told.put_nowait(None))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        while (document := await told.get()) is not None:
            yield {"progress": document}
        try:
            yield self._outcome(session, await task)
        except LzyError as error:
            yield errors.describe(error)

    async def _hold(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        for_s = asked["for_s"]
        self._agent.update(
            session,
            "held",
            f"for {for_s:g} s",
            request.uid,
            hold_until_unix_s=self._agent.state.clock.now_s() + for_s,
        )
        session.call_off()
        return Response(document={"session": describe_session(self._agent, session)})

    async def _release(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        self._agent.update(
            session, "released", "may be evicted again", request.uid, hold_until_unix_s=None
        )
        return Response(document={"session": describe_session(self._agent, session)})

    async def _signal(self, request: Request, asked: dict[str, Any], session: Session) -> Response:
        session.call_off()
        if session.record.state in ASLEEP:
            await self._agent.turns.operate(session, WAKE, actor_uid=request.uid)
        async with session.lock:
            if session.pidfd < 0:
                raise NotFound(
                    f"session {session.record.name} has no process",
                    remedy=f"lzy wake {session.record.name} goes back to its last image",
                )
            words = f"signal {asked['signal']}"  # before it is sent: the audit misses none
            self._agent.update(session, "signalled", words, request.uid)
            signal.pidfd_send_signal(session.pidfd, asked["signal"])
        return Response(document={"session": describe_session(self._agent, session)})

    async def _set_session(
        self, request: Request, asked: dict[str, Any], session: Session
    ) -> Response:
        values = _settings(asked["settings"], OF_A_SESSION)
        words = ", ".join(
            f"{name} {int(value) if name == 'limit_bytes' and value else value}"
            for name, value in values.items()
        )
        merged = {**session.record.settings, **values}
        self._agent.update(session, "set", words, request.uid, settings=merged)
        self._agent.limits.hurry()
        return Response(document={"session": describe_session(self._agent, session)})


def _settings(values: dict[str, Any], allowed: frozenset[str]) -> dict[str, float | None]:
    try:
        return check_settings(values, allowed)
    except LzyError as error:
        raise BadBody(error.message, remedy=error.remedy) from None


def _name(asked: dict[str, Any]) -> str | None:
    """The name that is wished for, if a session may be called so. Raises BadBody."""
    try:
        return check_session_name(asked["name"]) if "name" in asked else None
    except LzyError as error:
        words = error.message.replace("an image", "a session", 1)
        raise BadBody(words, remedy=error.remedy) from None


def _check_bound(session: Session, requests: dict[str, Any]) -> None:
    """Raise Incompatible where what it asks for is new, and less memory than it holds."""
    asked_bytes = requests.get("memory_bytes") or 0
    if asked_bytes != session.record.requests.get("memory_bytes"):
        check_bound(session.record.name, session.held_bytes, asked_bytes)


def _check_terminal(path: str, uid: int) -> None:
    """Raise AccessDenied unless it is a terminal, and the caller's."""
    try:
        own = re.fullmatch(r"/dev/(pts/[0-9]+|tty[0-9]*)", path) and os.stat(path).st_uid == uid
    except OSError:
        own = False
    if not (own or (uid == 0 and re.fullmatch(r"/dev/(pts/[0-9]+|tty[0-9]*)", path))):
        raise AccessDenied(
            f"{path[:100]} is no terminal of yours", remedy="name your own: tty(1) prints it"
        )


def _may_see(request: Request, event: Any) -> bool:
    return request.uid in (0, event.owner_uid)
