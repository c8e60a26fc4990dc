"""What a door of the agent is: a verb and a path, what may be sent, and who answers."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from .fields import BadBody, Field
from .http import Request

USERS, NODES = "users", "nodes"


class Route:
    """One door. `{name}` in its path is a session's; others are handed to who answers.

    `fields` are those of its body. `who`: users (and the migrator, for them), or other nodes.
    """

    def __init__(
        self,
        method: str,
        path: str,
        handle: str,
        words: str,
        fields: dict[str, Field] | None = None,
        query: dict[str, Field] | None = None,
        who: str = USERS,
    ) -> None:
        self.method, self.path, self.handle, self.words = method, path, handle, words
        self.fields, self.query, self.who = fields or {}, query or {}, who

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the paths of requests are compared with; its groups are named as in `path`."""
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(self.path)))


def parse_query(request: Request, route: Route) -> dict[str, Any]:
    """The query's values, as the route's description types them. Raises BadBody."""
    found: dict[str, Any] = {}
    for name, text in request.query.items():
        if name not in route.query:
            raise BadBody(f"there is no parameter {name[:80]!r} here")
        field = route.query[name]
        right = text.isascii() and text.isdecimal() and len(text) < 18
        if field.kind == "integer" and not (right and field.low <= int(text) <= field.high):
            raise BadBody(f"{name} cannot be {text[:80]!r}", remedy=field.words)
        if field.kind == "string" and not field.low <= len(text) <= field.high:
            raise BadBody(f"{name} cannot be {text[:80]!r}", remedy=field.words)
        found[name] = int(text) if field.kind == "integer" else text
    return found
