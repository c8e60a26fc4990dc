"""A session moves from one node to another; never are there two of it: what both sides know.

The source leads (`departing`). While the session runs it is checkpointed, and the target
(`arriving`) fetches that and looks whether it fits; then it is dumped to its end (only what has
changed since), the target is asked to take it, and wakes it. What is true is decided in one place,
the target's database:

    source    moving: stopping ───► asked ────────────────► departed
                        (dump)        │ asks                   ▲ "accepted"
    target    offered ───────────► accepting ──► accepted ─────┘
                                       └───────► refused ──► source wakes it again

*Guarantees*: `asked` is on the source's disk before the target is asked, and from then on only the
target's answer lets the source wake it. `accepted` and `refused` are final and on the target's disk
before they are told; a life that was refused is never made there, however late it is asked for. So
whoever is killed, and whichever message is lost, at most one node makes the session's next life; a
source that cannot ask leaves it hibernated, says why, and asks again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .authority import node_subject
from .state import Arrival

if TYPE_CHECKING:
    from .node import Agent

STOPPING, ASKED, BACK = "stopping", "asked", "back"
"""Steps of `Record.moving`: its process is being ended; the target was asked; it wakes here."""
CARRIED = (
    "name", "owner_uid", "attached_unix_s", "command", "image", "image_bytes", "number",
    "memory_bytes", "peak_memory_bytes", "idle_gaps", "settings",
)  # fmt: skip
"""What of a session's record goes with it."""
PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0
"""Before a node that did not answer is asked again: at first, and at most."""


class OtherNode:
    """The agent of another node, asked about one life of one session."""

    def __init__(self, agent: Agent, name: str, node: str, address: str, epoch: int) -> None:
        self._agent, self.name, self.node, self.address, self.epoch = (
            agent, name, node, address, epoch,
        )  # fmt: skip
        self.verified = ""
        """The image of which all was read ahead of the move."""

    async def ask(self, verb: str, body: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
        path = f"/v1/arrivals/{self.name}/{self.epoch}/{verb}"
        subject = node_subject(self.node)
        return await self._agent.contacts.ask(self.address, subject, "POST", path, body, timeout_s)

    @classmethod
    def of(cls, agent: Agent, arrival: Arrival) -> OtherNode:
        """The node that a session came from, by the same number of its life."""
        address = arrival.document["address"]
        return cls(agent, arrival.name, arrival.source, address, arrival.epoch)

    async def tell_complete(self) -> None:
        """Nothing is read there any more."""
        path = f"/v1/departures/{self.name}/{self.epoch}/complete"
        subject = node_subject(self.node)
        await self._agent.contacts.ask(self.address, subject, "POST", path, {}, 60)

    async def prepare(self, image: str, report: dict[str, Any]) -> None:
        done = await self.ask("prepare", {"image": image}, 3600)
        report["sent_bytes"] += done["fetched_bytes"]
