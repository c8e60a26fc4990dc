"""What a request's body may hold: one description, which both checks it and documents it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..checkpoint.errors import LzyError


class Field(NamedTuple):
    """One key: its JSON type, bounds (of a number, or of a text's length), and what it means."""

    kind: str
    words: str
    low: float = 0
    high: float = 1000
    required: bool = False
    keys: dict[str, Field] | None = None
    """Of an object: what it may hold; None: who uses it looks at it."""
    may_be_null: bool = False


class BadBody(LzyError):
    """The body is not what the verb takes."""


_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "object": dict,
}


def parse(body: bytes, fields: dict[str, Field]) -> dict[str, Any]:
    """The body's document, if it has only these fields, and they are right. Raises BadBody."""
    if not body:
        document: Any = {}
    else:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadBody(f"the body is no JSON: {error}", remedy="send one object") from None
    if not isinstance(document, dict):
        raise BadBody("the body is no object", remedy="send one, as {}")
    _check_all(document, fields)
    return document


def _check_all(document: dict[str, Any], fields: dict[str, Field]) -> None:
    for name in document:
        if name not in fields:
            raise BadBody(
                f"there is no field {name[:80]!r} here",
                remedy=f"there are: {', '.join(fields) or 'none'}",
            )
    for name, field in fields.items():
        if name in document:
            _check(name, document[name], field)
        elif field.required:
            raise BadBody(f"{name} is missing", remedy=field.words)


def _check(name: str, value: Any, field: Field) -> None:
    if value is None and field.may_be_null:
        return
    right = isinstance(value, _TYPES[field.kind])
    if isinstance(value, bool) and field.kind != "boolean":
        right = False
    if right and field.kind in ("integer", "number"):
        right = field.low <= value <= field.high
    elif right and field.kind == "string":
        right = field.low <= len(value) <= field.high and "\0" not in value
        try:
            value.encode()
        except UnicodeEncodeError:
            right = False
    if not right:
        raise BadBody(f"{name} cannot be {json.dumps(value)[:80]}", remedy=_describe(field))
    if field.kind == "object" and field.keys is not None:
        _check_all(value, field.keys)


def _describe(field: Field) -> str:
    never = ", or null for never" if field.may_be_null else ""
    bounds = ""
    if field.kind in ("integer", "number"):
        low, high = (
            f"{n:.0f}" if n == int(n) and n < 1e9 else f"{n:g}" for n in (field.low, field.high)
        )
        bounds = f" from {low} to {high}"
    return f"{field.words}: {field.kind}{bounds}{never}"


def schema(fields: dict[str, Field]) -> dict[str, Any]:
    """The same as JSON Schema, for the OpenAPI document."""
    properties: dict[str, Any] = {}
    for name, field in fields.items():
        kind: str | list[str] = [field.kind, "null"] if field.may_be_null else field.kind
        described: dict[str, Any] = {"type": kind, "description": field.words}
        if field.kind in ("integer", "number"):
            described |= {"minimum": field.low, "maximum": field.high}
        elif field.kind == "string":
            described |= {"minLength": int(field.low), "maxLength": int(field.high)}
        elif field.keys is not None:
            described |= schema(field.keys)
        properties[name] = described
    required = [name for name, field in fields.items() if field.required]
    document = {"type": "object", "properties": properties, "additionalProperties": False}
    return document | ({"required": required} if required else {})
