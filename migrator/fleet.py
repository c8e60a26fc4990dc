"""Which nodes there are, how to talk to each, and what they all say: the migrator's view outwards.

A home without `fleet/nodes.json` is one node, reached by its agent's socket. Else that file names
nodes and addresses, and they are asked over TLS, all at once, so that a silent one delays nobody.
"""

from __future__ import annotations

import json
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..agent.authority import client_context, fleet_folder, node_subject
from ..agent.client import Client, is_fleet
from ..agent.identity import read_identity
from ..agent.peers import Kept, Peer
from ..checkpoint.errors import LzyError, NotFound

_ANSWERS_WITHIN_S = 10.0
_SILENT_AFTER_S = 5.0


class Member(NamedTuple):
    """A node of the fleet; `address` is HOST:PORT, empty for the only one of a home."""

    name: str
    address: str


class Look(NamedTuple):
    """What one node said: its document and its sessions'; `failure` where it did not answer."""

    member: Member
    node: dict[str, Any]
    sessions: list[dict[str, Any]]
    failure: str = ""
    now_unix_s: float = 0.0
    """What its wall clock said when it told of its sessions."""


class Fleet:
    """The nodes of one home's migrator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context: ssl.SSLContext | None = None
        self._kept = Kept()
        self._pool = ThreadPoolExecutor(16, "lzy-node")
        self._last: dict[str, Look] = {}

    @property
    def members(self) -> list[Member]:
        """All nodes, by name."""
        if not is_fleet(self.folder):
            return [Member(read_identity(self.folder).name, "")]
        found = json.loads((fleet_folder(self.folder) / "nodes.json").read_bytes())
        return sorted(Member(node["name"], node["address"]) for node in found["nodes"])

    def client(self, member: Member, uid: int = 0) -> Client:
        """How to talk to a node's agent on behalf of user `uid`."""
        if not member.address:
            return Client(self.folder, fleet=False)
        if self._context is None:
            self._context = client_context(fleet_folder(self.folder))
        subject = node_subject(member.name)
        return Peer(member.address, subject, self._context, uid, kept=self._kept)

    def member(self, name: str) -> Member:
        """The node of that name. Raises NotFound."""
        for member in self.members:
            if member.name == name:
                return member
        names = ", ".join(member.name for member in self.members)
        raise NotFound(f"there is no node {name[:80]}", remedy=f"there are: {names}")

    def look(self, uid: int = 0) -> list[Look]:
        """What every node says now, as user `uid` may see it; those that are silent, too."""
        return list(self._pool.map(lambda member: self._look_at(member, uid), self.members))

    def _look_at(self, member: Member, uid: int) -> Look:
        client = self.client(member, uid)
        try:
            node = client.get("/v1/node", timeout_s=_SILENT_AFTER_S)
            found = client.get("/v1/sessions", timeout_s=_ANSWERS_WITHIN_S)
        except (LzyError, ValueError) as error:
            last = self._last.get(member.name)
            return Look(member, last.node if last else {}, [], str(error))
        look = Look(member, node, found["sessions"], now_unix_s=found["now_unix_s"])
        if uid == 0:
            self._last[member.name] = look
        return look

    def names_besides(self, node: str) -> set[str]:
        """What sessions of all other nodes are called; of a silent one those that it told last."""
        names = set()
        for look in self.look():
            last = self._last.get(look.member.name) if look.failure else None
            if look.member.name != node:
                names |= {session["name"] for session in (last or look).sessions}
        return names

    def find(self, name: str, uid: int = 0) -> Member:
        """The node that has a session of that name. Raises NotFound, also of silent nodes."""
        if len(members := self.members) == 1:
            return members[0]
        looks = self.look(0)
        found = [s for look in looks for s in look.sessions if s["name"] == name]
        found.sort(key=lambda session: (session["pid"] is None, -session["epoch"]))
        if found:
            return self.member(found[0]["node"])
        silent = [look.member.name for look in looks if look.failure]
        raise NotFound(
            f"there is no session {name[:200]}" + (" on a node that answers" if silent else ""),
            remedy=f"{', '.join(silent)} does not answer" if silent else "see lzy ps",
        )

    def add(self, member: Member) -> None:
        """Have one more node, or have it at another address."""
        others = [m for m in self.members if m.name != member.name] if is_fleet(self.folder) else []
        write_members(self.folder, [*others, member])


def write_members(folder: Path, members: list[Member]) -> None:
    """Say which nodes there are."""
    place = fleet_folder(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place / f"nodes.json.{os.getpid()}"
    document = {"nodes": [member._asdict() for member in sorted(members)]}
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.rename(place / "nodes.json")
