"""The doors of the agent that only other nodes use: sessions that come, images that they fetch."""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import Any, Final

from ..checkpoint.errors import AccessDenied, NotFound
from ..checkpoint.packs import pack_file
from ..checkpoint.store import Store
from .fields import BadBody, Field
from .http import Content, Request, Response
from .node import Agent
from .routes import NODES, Route, parse_query

_A: Final = "/v1/arrivals/{arrival}/{epoch}"
NODE_ROUTES: Final = (
    Route("POST", f"{_A}/offer", "offer", "Announce a session that is to live here.",
          {"requests": Field("object", "what it asks for", required=True),
           "store": Field("string", "the identity of the store with its image", required=True),
           "address": Field("string", "where to fetch from", required=True),
           "owner_uid": Field("integer", "whose it is", 0, 1 << 32, required=True),
           "memory_bytes": Field("integer", "what it uses", 0, 1 << 60, required=True),
           "bytes_per_s": Field("number", "how fast to fetch; 0: as it goes", 0, 1e12)}, who=NODES),
    Route("POST", f"{_A}/prepare", "prepare", "Fetch an image; see that it could be restored.",
          {"image": Field("string", "its name", 1, 250, required=True)}, who=NODES),
    Route("POST", f"{_A}/accept", "accept", "Take it, and wake it.",
          {"record": Field("object", "what is known of it", required=True),
           "wake": Field("boolean", "whether it is to run", required=True)}, who=NODES),
    Route("POST", f"{_A}/cancel", "cancel", "Has it been taken? If not, it never will be.",
          who=NODES),
    Route("POST", f"{_A}/forget", "forget", "It does not come; it may be offered again.",
          who=NODES),
    Route("POST", "/v1/departures/{arrival}/{epoch}/complete", "complete",
          "The node that a session went to has all that it read here.", who=NODES),
    Route("POST", "/v1/passages/{arrival}/{epoch}/{port}", "passage",
          "A connection to a session that came from the asking node: 101, then frames.", who=NODES),
    Route("GET", "/v1/images/{image}", "image", "The manifest of an image.", who=NODES),
    Route("GET", "/v1/packs/{pack}", "pack", "A pack of this node's store, or a part.",
          query={"offset": Field("integer", "where it begins", 0, 1 << 30),
                 "length": Field("integer", "so many bytes", 1, 1 << 30)}, who=NODES),
)  # fmt: skip


class NodeApi:
    """Answers other nodes."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._free_from_s = 0.0

    async def answer(
        self, route: Route, request: Request, asked: dict[str, Any], parts: dict[str, str]
    ) -> Response:
        """Go through a door. Raises AccessDenied for who is no node."""
        source = request.peer.removeprefix("node ")
        if not request.peer.startswith("node "):
            raise AccessDenied("only other nodes do that", remedy="see lzy migrate")
        if route.handle in ("image", "pack"):
            return self._open(route.handle, parts[route.handle], parse_query(request, route))
        if not parts["epoch"].isdecimal() or len(parts["epoch"]) > 15:
            raise BadBody("the epoch is no number")
        name, epoch, arrivals = parts["arrival"], int(parts["epoch"]), self._agent.arrivals
        if route.handle == "complete":
            return Response(document=self._agent.departures.complete(name, epoch, source))
        arrival = self._agent.state.arrival(name, epoch)
        if arrival and arrival.source != source:
            raise AccessDenied(f"session {name} comes from {arrival.source}, not from {source}")
        if route.handle == "passage":
            if arrival is None:
                raise NotFound("there is no such session here", remedy="see lzy ps")
            return Response(101, passage=await self._agent.passages.enter(arrival, parts["port"]))
        if route.handle == "offer":
            return Response(document=arrivals.offer(name, epoch, source, asked))
        if route.handle == "prepare":
            return Response(document=await arrivals.prepare(name, epoch, asked["image"]))
        if route.handle == "accept":
            return Response(document=await arrivals.accept(name, epoch, asked))
        if route.handle == "cancel":
            return Response(document=await arrivals.cancel(name, epoch, source))
        return Response(document=arrivals.forget(name, epoch))

    def _open(self, kind: str, name: str, part: dict[str, Any]) -> Response:
        """A file of the store, as it is, or a part of it."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with Store.open(self._agent.store) as store:
            try:
                if kind == "image":
                    if not re.fullmatch(r"[A-Za-z0-9_@][A-Za-z0-9._@-]*", name):
                        raise BadBody("that is no name of an image")
                    descriptor = os.open(f"{name}.image", flags, dir_fd=store.manifests)
                else:
                    if not re.fullmatch(r"[0-9a-f]{32}", name):
                        raise BadBody("that is no name of a pack")
                    file = pack_file(bytes.fromhex(name))
                    descriptor = os.open(file, flags, dir_fd=store.packs)
            except FileNotFoundError as error:
                raise NotFound(f"there is no {kind} {name} here") from error
        length_bytes = os.fstat(descriptor).st_size
        offset = min(part.get("offset", 0), length_bytes)
        length_bytes = min(part.get("length", length_bytes), length_bytes - offset)
        return Response(content=Content(descriptor, offset, length_bytes, self._pause))

    async def _pause(self, length_bytes: int) -> None:
        """Let so much go when it may: all moves from here together are no faster than is set."""
        rate = self._agent.settings.move_bytes_per_s
        if not rate:
            return
        now_s = time.monotonic()
        begins_s = max(self._free_from_s, now_s)
        self._free_from_s = begins_s + length_bytes / rate
        if begins_s > now_s:
            await asyncio.sleep(begins_s - now_s)
