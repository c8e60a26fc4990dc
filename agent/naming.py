"""A name is one session's in the whole fleet: who begins a session asks the migrator for its name.

The migrator gives each name to one node at a time (`migrator/names.py`), whichever way the session
begins: attached or started, through the migrator or at its node's own agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.errors import LzyError
from .authority import MIGRATOR
from .client import Unanswered
from .peers import Unreachable

if TYPE_CHECKING:
    from .node import Agent

_ANSWERS_WITHIN_S = 20.0


async def claim(agent: Agent, name: str) -> bool:
    """Whether a session of this node may be called that; it is ours for a minute then.

    Raises LzyError where the migrator does not answer: another node may have that name.
    """
    if not (address := agent.identity.migrator):
        return True
    try:
        answer = await agent.contacts.ask(
            address, MIGRATOR, "POST", "/v1/names/claim", {"name": name}, _ANSWERS_WITHIN_S
        )
    except (Unreachable, Unanswered) as error:
        raise LzyError(
            f"whether another node has a session {name} is not known: {error.message}",
            remedy="a session begins when the fleet's migrator can be asked: is it up?",
        ) from error
    return bool(answer["free"])
