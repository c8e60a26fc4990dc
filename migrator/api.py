"""The migrator's interface: that of an agent, for all nodes at once, and what only a fleet has.

A request about a session goes on to the agent that has it, on behalf of the user who asks; that
agent checks and records it. Only who is asked for the whole fleet is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlencode

from ..agent import errors
from ..agent.api import ROUTES
from ..agent.cgroups import check_bound
from ..agent.client import Client
from ..agent.fields import Field, parse
from ..agent.http import Request, Response
from ..agent.routes import parse_query
from ..checkpoint.errors import AccessDenied, Busy, LzyError, NotFound
from ..checkpoint.stages import reach
from .fleet import Fleet, Look
from .join import admit
from .moves import (
    Choice,
    Wish,
    choose,
    choose_for_wake,
    find_session,
    migrate_body,
    refuse,
)
from .names import Names

_MIGRATE: Final = {
    "cpu": Field("number", "cores that it needs", 0, 4096),
    "memory_bytes": Field("integer", "memory that it needs", 0, 1 << 50),
    "gpu": Field("integer", "GPUs that it needs; 0: none any more", 0, 64),
    "node": Field("string", "the node to go to", 1, 32),
    "bytes_per_s": Field("number", "how fast to fetch its memory; 0: as it goes", 0, 1e12),
    "dry_run": Field("boolean", "only tell where it would go"),
    "wait": Field("boolean", "if nothing is free, go when something is"),
    "cancel": Field("boolean", "wait no longer, and ask for nothing in particular"),
}
_ATTACH: Final = {
    "pid": Field("integer", "the process, as its node numbers it", 1, 1 << 22, required=True),
    "name": Field("string", "the session's name", 1, 200),
    "settings": Field("object", "settings of the session"),
    "node": Field("string", "where it runs", 1, 32),
}
_CLAIM: Final = {"name": Field("string", "what a session is to be called", 1, 200, required=True)}
_DRAIN: Final = {"draining": Field("boolean", "false: take sessions again", required=True)}
_SESSION: Final = re.compile(r"/v1/sessions/([^/]+)(?:/([a-z]+))?")
_DRAINED: Final = re.compile(r"/v1/nodes/([^/]+)/drain")
_EVENTS, _READINGS = (
    next(route for route in ROUTES if route.handle == handle) for handle in ("events", "readings")
)
_POLL_S = 0.3

Tell = Callable[[dict[str, Any]], None]


class Api:
    """Answers for a fleet; `hurry` has the loop go its round now."""

    def __init__(self, fleet: Fleet, hurry: Callable[[], None]) -> None:
        self._fleet = fleet
        self._hurry = hurry
        self._names = Names(fleet)
        self._naming = ThreadPoolExecutor(1, "lzy-names")
        """By itself: who waits in all the other threads may wait for a name."""

    async def answer(self, request: Request) -> Response:
        """Every error of lzy's becomes an answer, as an agent gives it."""
        try:
            return await self._dispatch(request)
        except LzyError as error:
            return Response(errors.status_of(error), errors.describe(error))

    async def _dispatch(self, request: Request) -> Response:
        door = (request.method, request.path)
        if door == ("POST", "/v1/join"):
            return Response(document=await asyncio.to_thread(admit, self._fleet, request.body))
        if door == ("POST", "/v1/names/claim"):
            return Response(document=await self._claim(request))
        if request.peer and request.uid < 0:
            raise AccessDenied(f"{request.peer} may only join, and ask for names")
        if door == ("GET", "/v1/nodes"):
            return Response(document={"nodes": await asyncio.to_thread(self._nodes)})
        if door == ("GET", "/v1/sessions"):
            looks = await asyncio.to_thread(self._fleet.look, request.uid)
            return Response(document={"sessions": [s for look in looks for s in look.sessions]})
        if door == ("POST", "/v1/sessions"):
            return await asyncio.to_thread(self._attach, request)
        if door == ("GET", "/v1/events"):
            return await self._events(request)
        if door == ("GET", "/v1/readings"):
            return Response(document=await asyncio.to_thread(self._readings, request))
        if door == ("GET", "/v1/node"):
            return Response(document=await asyncio.to_thread(self._first_node))
        if door == ("POST", "/v1/node/settings"):
            return Response(document=await asyncio.to_thread(self._set_all, request))
        if found := _DRAINED.fullmatch(request.path):
            return Response(document=await asyncio.to_thread(self._drain, request, found[1]))
        if (found := _SESSION.fullmatch(request.path)) is None:
            raise NotFound(f"there is no {request.path[:200]} of a fleet", remedy="ask an agent")
        if found[2] == "migrate" and request.method == "POST":
            return await self._migrate(request, found[1])
        return await self._pass_on(request, found[1], found[2] or "")

    # -- nodes -----------------------------------------------------------------------------------

    def _nodes(self) -> list[dict[str, Any]]:
        found = []
        for look in self._fleet.look():
            living = [s for s in look.sessions if s["pid"]]
            found.append({
                **look.node,
                "name": look.member.name,
                "address": look.member.address or None,
                "reachable": not look.failure,
                "failure": look.failure or None,
                "sessions": len(look.sessions),
                "running": sum(s["state"] == "running" for s in living),
                "session_memory_bytes": sum(s["memory_bytes"] for s in living),
                "cpu_share": round(sum(s["cpu_share"] for s in living), 4),
            })  # fmt: skip
        return found

    def _first_node(self) -> dict[str, Any]:
        looks = self._fleet.look()
        for look in looks:
            if look.node:
                return {**look.node, "home": str(self._fleet.folder), "nodes": len(looks)}
        raise Busy("no node of the fleet answers", remedy="see lzy nodes")

    def _set_all(self, request: Request) -> dict[str, Any]:
        body = parse(request.body, {"settings": Field("object", "values", required=True)})
        for member in self._fleet.members:
            self._fleet.client(member, request.uid).post("/v1/node/settings", body, timeout_s=30)
        self._hurry()
        return self._first_node()

    def _drain(self, request: Request, name: str) -> dict[str, Any]:
        body = parse(request.body, _DRAIN)
        member = self._fleet.member(name)
        client = self._fleet.client(member, request.uid)
        document = client.post("/v1/node/drain", body, timeout_s=30)
        self._hurry()
        return document

    async def _claim(self, request: Request) -> dict[str, Any]:
        """An agent asks whether it may call a session so."""
        node = request.peer.removeprefix("node ")
        if node == request.peer:
            raise AccessDenied("only agents of the fleet do that", remedy="see lzy attach, lzy run")
        name = parse(request.body, _CLAIM)["name"]
        loop = asyncio.get_running_loop()
        free = await loop.run_in_executor(self._naming, self._names.claim, name, node)
        return {"free": free}

    # -- sessions --------------------------------------------------------------------------------

    def _attach(self, request: Request) -> Response:
        body = parse(request.body, _ATTACH)
        node = body.pop("node", None)
        looks = self._fleet.look()
        if node is None and len(looks) > 1:
            raise LzyError("on which node is that process?", remedy="name it with --node")
        name = body.get("name")
        if name and any(s["name"] == name for look in looks for s in look.sessions):
            raise Busy(f"there is a session {name} already", remedy="choose another --name")
        member = self._fleet.member(node) if node else looks[0].member
        client = self._fleet.client(member, request.uid)
        return Response(document=client.post("/v1/sessions", body, timeout_s=60))

    async def _pass_on(self, request: Request, name: str, verb: str) -> Response:
        """Have the agent that has the session answer."""
        if verb in ("wake", "signal"):
            moved = await self._wake_elsewhere(request, name)
            if moved and verb == "wake":
                return moved
        member = await asyncio.to_thread(self._fleet.find, name, request.uid)
        client = self._fleet.client(member, request.uid)
        path = client.session(name, verb)
        if request.query:
            path += f"?{urlencode(request.query)}"
        if request.method == "GET":
            return Response(document=await asyncio.to_thread(client.get, path))
        body = parse(request.body, _ANY)
        if "application/x-ndjson" in request.headers.get("accept", ""):
            return Response(lines=_stream(client, path, body, {}))
        return Response(document=await asyncio.to_thread(client.post, path, body))

    async def _wake_elsewhere(self, request: Request, name: str) -> Response | None:
        """A hibernated session whose node is drained, or full by now, wakes on another."""
        looks = await asyncio.to_thread(self._fleet.look)
        with contextlib.suppress(NotFound):
            look, session = find_session(looks, name)
            if session["pid"] is not None or not session["image"]:
                return None
            if not look.node.get("draining") and parse(request.body, _ANY).get("image"):
                return None  # an earlier one wakes where it is
            if (chosen := choose_for_wake(looks, look, session)) is None:
                return None
            await asyncio.to_thread(self._check_owner, request, session, "wake", {})
            return await asyncio.to_thread(self._move, request, looks, session, Wish(), {}, chosen)
        return None

    async def _migrate(self, request: Request, name: str) -> Response:
        body = parse(request.body, _MIGRATE)
        wish = Wish(
            body.get("cpu", 0.0), body.get("memory_bytes", 0), body.get("gpu"), body.get("node", "")
        )
        if wish.node:
            self._fleet.member(wish.node)
        looks = await asyncio.to_thread(self._fleet.look)
        _, session = find_session(looks, name)
        order = {"node": wish.node or "-", "address": "-"}
        await asyncio.to_thread(self._check_owner, request, session, "migrate", order)
        if body.get("cancel"):
            client = self._fleet.client(self._fleet.member(session["node"]))
            path = client.session(name, "requests")
            return Response(document=await asyncio.to_thread(client.post, path, {"requests": {}}))
        return await asyncio.to_thread(self._move, request, looks, session, wish, body)

    def _check_owner(
        self, request: Request, session: dict[str, Any], verb: str, body: dict[str, Any]
    ) -> None:
        """Raise AccessDenied for another's session: as its agent does, which writes it down."""
        if request.uid not in (0, session["owner_uid"]):
            client = self._fleet.client(self._fleet.member(session["node"]), request.uid)
            client.post(client.session(session["name"], verb), body, timeout_s=30)
            raise AccessDenied(f"session {session['name']} belongs to user {session['owner_uid']}")

    def _move(
        self,
        request: Request,
        looks: list[Look],
        session: dict[str, Any],
        wish: Wish,
        body: dict[str, Any],
        chosen: Choice | None = None,
    ) -> Response:
        name = session["name"]
        held_bytes = max(session["memory_bytes"] if session["pid"] else 0, session["image_bytes"])
        check_bound(name, held_bytes, wish.memory_bytes)
        if wish.gpu and wish.gpu <= session["gpu_count"] and wish == Wish(gpu=wish.gpu):
            what = "a GPU" if wish.gpu == 1 else f"{wish.gpu} GPUs"
            raise Busy(
                f"session {name} has {what} already, on {session['node']}",
                remedy=f"lzy migrate {name} --node NODE moves it all the same",
            )
        choice = chosen or choose(looks, session, wish)
        told = {"choice": _describe(choice)}
        if body.get("dry_run"):
            return Response(document={"session": session, **told})
        member = self._fleet.member(session["node"])
        client = self._fleet.client(member)
        if not choice.node:
            alone = len(looks) == 1  # there is nothing to wait for
            if not body.get("wait") or session["pid"] is None or alone:
                raise refuse(choice, name, wish)
            wanted = wish.on_top_of(session["requests"])
            if wish.node:
                wanted["node"] = wish.node
            path = client.session(name, "requests")
            answer = client.post(path, {"requests": wanted}, timeout_s=30)
            self._hurry()
            return Response(document={**answer, **told, "queued": True})
        reach("migrator.chosen")
        path = client.session(name, "migrate")
        order = migrate_body(choice, session, wish)
        order["bytes_per_s"] = body.get("bytes_per_s", 0.0)
        if "application/x-ndjson" in request.headers.get("accept", ""):
            return Response(lines=_stream(client, path, order, told, self._after(choice, name)))
        answer = client.post(path, order)
        reach("migrator.answered")
        return Response(document={**answer, **told, **self._after(choice, name)()})

    def _after(self, choice: Choice, name: str) -> Callable[[], dict[str, Any]]:
        """What the session is where it is now."""

        def look() -> dict[str, Any]:
            client = self._fleet.client(self._fleet.member(choice.node))
            return {"session": client.get(client.session(name))}

        return look

    # -- events ----------------------------------------------------------------------------------

    async def _events(self, request: Request) -> Response:
        last = parse_query(request, _EVENTS).get("last", 0)
        if request.query.get("follow") == "1":
            return Response(lines=self._follow(request))
        query = {k: v for k, v in request.query.items() if k in ("after", "last", "session")}
        found = await asyncio.to_thread(self._gather, request.uid, dict.fromkeys(
            (member.name for member in self._fleet.members), query))  # fmt: skip
        return Response(document={"events": found[-last:] if last else found})

    def _gather(self, uid: int, queries: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
        """Events of all nodes that answer, in order of time; each with its node."""
        found = []
        for member in self._fleet.members:
            with contextlib.suppress(LzyError):
                path = f"/v1/events?{urlencode(queries[member.name])}"
                answer = self._fleet.client(member, uid).get(path, timeout_s=5)
                found += [{**event, "node": member.name} for event in answer["events"]]
        return sorted(found, key=lambda event: (event["unix_s"], event["number"]))

    def _readings(self, request: Request) -> dict[str, Any]:
        """What sessions held on each of the nodes that answer, in order of time."""
        query = parse_query(request, _READINGS)
        found = []
        for member in self._fleet.members:
            with contextlib.suppress(LzyError):
                client = self._fleet.client(member, request.uid)
                answer = client.get(f"/v1/readings?{urlencode(query)}", timeout_s=5)
                found += [{**reading, "node": member.name} for reading in answer["readings"]]
        return {"readings": sorted(found, key=lambda reading: reading["unix_s"])}

    async def _follow(self, request: Request) -> AsyncIterator[Any]:
        base = {k: v for k, v in request.query.items() if k in ("after", "last", "session")}
        queries = {member.name: dict(base) for member in self._fleet.members}
        while True:
            for event in await asyncio.to_thread(self._gather, request.uid, queries):
                query = queries[event["node"]]
                query.pop("last", None)
                query["after"] = str(event["number"])
                yield event
            await asyncio.sleep(_POLL_S)


class _Anything(dict[str, Field]):
    """Fields of a body that somebody else checks."""

    def __contains__(self, _: object) -> bool:
        return True


_ANY: Final = _Anything()


def _describe(choice: Choice) -> dict[str, Any]:
    return {"node": choice.node or None, "why": choice.why, "refusals": choice.refusals}


async def _stream(
    client: Client,
    path: str,
    body: dict[str, Any],
    more: dict[str, Any],
    after: Callable[[], dict[str, Any]] | None = None,
) -> AsyncIterator[Any]:
    """An agent's lines as they come; the last one with `more`, and what `after` finds."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def hear() -> None:
        try:
            for line in client.lines("POST", path, body):
                if "error" not in line and "progress" not in line:
                    line = {**line, **more, **(after() if after else {})}
                loop.call_soon_threadsafe(told.put_nowait, line)
        except LzyError as error:
            loop.call_soon_threadsafe(told.put_nowait, errors.describe(error))
        finally:
            loop.call_soon_threadsafe(told.put_nowait, None)

    hearing = loop.run_in_executor(None, hear)
    while (line := await told.get()) is not None:
        yield line
    await hearing
