"""The agent's interface as an OpenAPI 3.1 document, written from the routes that check requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .fields import schema

if TYPE_CHECKING:
    from .routes import Route

_ERROR = {
    "type": "object",
    "required": ["kind", "error", "remedy", "exit_status"],
    "properties": {
        "kind": {"type": "string"},
        "error": {"type": "string"},
        "remedy": {"type": "string", "description": "what to do; may be empty"},
        "exit_status": {"type": "integer"},
    },
}
_ERRORS = {
    "400": "the request is wrong",
    "403": "it is another user's",
    "404": "there is no such thing",
    "405": "not by this method",
    "409": "something else is done to it now",
    "413": "it is too long",
    "422": "the process has something that lzy cannot make again",
    "500": "it failed",
    "503": "the store, or another node, cannot be used now",
}

_NUMBER, _INTEGER, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}
_FLAG, _OBJECT = {"type": "boolean"}, {"type": "object"}


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": [kind["type"], "null"]}


def _object(**keys: dict[str, Any]) -> dict[str, Any]:
    """An object that has these keys, and maybe more."""
    return {"type": "object", "required": list(keys), "properties": keys}


_SESSION = _object(
    name=_TEXT, node=_TEXT, owner_uid=_INTEGER, state=_TEXT, since_unix_s=_NUMBER,
    pid=_or_null(_INTEGER), command=_TEXT, attached_unix_s=_NUMBER,
    woken_unix_s=_or_null(_NUMBER), epoch=_INTEGER, image=_or_null(_TEXT), image_bytes=_INTEGER,
    memory_bytes=_INTEGER, peak_memory_bytes=_INTEGER, memory_limit_bytes=_INTEGER,
    cpu_share=_NUMBER, gpu_count=_INTEGER, declared_gpu=_FLAG, gpu_share=_NUMBER,
    idle_for_s=_NUMBER,
    verdicts={"type": "array", "items": _object(probe=_TEXT, active=_FLAG, reason=_TEXT)},
    hold_until_unix_s=_or_null(_NUMBER), protected_until_unix_s=_or_null(_NUMBER),
    protected_why=_TEXT, idle_gaps_s={"type": "array", "items": _NUMBER},
    requests=_object(cpu=_NUMBER, memory_bytes=_INTEGER, gpu=_INTEGER, node=_TEXT),
    waiting_since_unix_s=_or_null(_NUMBER), kept_ports={"type": "array", "items": _INTEGER},
    moving_to=_or_null(_TEXT), operation=_or_null(_OBJECT), failure=_or_null(_TEXT),
    exit_status=_or_null(_INTEGER), settings=_OBJECT, limit=_or_null(_OBJECT),
)  # fmt: skip
_NODE = _object(
    name=_TEXT, home=_TEXT, agent_pid=_INTEGER, began_unix_s=_NUMBER, address=_or_null(_TEXT),
    labels=_OBJECT, cpus=_NUMBER, memory_bytes=_INTEGER, available_memory_bytes=_INTEGER,
    gpus=_INTEGER, free_gpus=_INTEGER, declared_gpus=_FLAG, price_per_hour=_NUMBER,
    draining=_FLAG, sessions=_INTEGER, operations=_INTEGER, settings=_OBJECT, now_unix_s=_NUMBER,
)  # fmt: skip
_EVENT = _object(
    number=_INTEGER, unix_s=_NUMBER, session=_TEXT, kind=_TEXT, words=_TEXT,
    actor_uid=_or_null(_INTEGER),
)  # fmt: skip
_READING = _object(unix_s=_NUMBER, session=_TEXT, memory_bytes=_INTEGER, is_active=_FLAG)
_PARTS = {"Error": _ERROR, "Session": _SESSION, "Node": _NODE, "Event": _EVENT, "Reading": _READING}


def _part(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _all(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _part(name)}


_DONE = _object(session=_part("Session"))
_WORKED = _object(session=_part("Session"), report=_OBJECT)
_ANSWERS = {
    "node": _part("Node"), "set_node": _part("Node"), "drain": _part("Node"),
    "sessions": _object(sessions=_all("Session"), now_unix_s=_NUMBER), "session": _part("Session"),
    "attach": _object(session=_part("Session"), notes={"type": "array", "items": _TEXT}),
    "names": _object(name=_TEXT), "events": _object(events=_all("Event")),
    "readings": _object(readings=_all("Reading")), "openapi": _OBJECT,
    **dict.fromkeys(("detach", "requests", "hold", "release", "signal", "set_session"), _DONE),
    **dict.fromkeys(("checkpoint", "hibernate", "doze", "rouse", "wake", "migrate"), _WORKED),
}  # fmt: skip
"""What is answered where it went well, by what the doors are called."""


def write_openapi(routes: Iterable[Route]) -> dict[str, Any]:
    """The document that describes `routes`."""
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route)
    try:
        number = version("lzy")
    except PackageNotFoundError:
        number = "0"
    return {
        "openapi": "3.1.0",
        "info": {"title": "lzy agent", "version": number, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": _PARTS},
    }


def _describe(route: Route) -> dict[str, Any]:
    kind = "text/plain" if route.path.endswith("/metrics") else "application/json"
    answer = {"schema": _ANSWERS[route.handle]} if route.handle in _ANSWERS else {}
    content: dict[str, Any] = {kind: answer}
    if {"follow", "wait"} & {*route.query, *route.fields}:
        content["application/x-ndjson"] = {}
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    if "wait" in route.fields:
        begun = {"application/json": {"schema": _DONE}}
        responses["202"] = {"description": "begun", "content": begun}
    for status, words in _ERRORS.items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[status] = {"description": words, "content": content}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    for name, described in schema(route.query)["properties"].items():
        parameters.append({"name": name, "in": "query", "schema": described})
    document: dict[str, Any] = {
        "operationId": route.handle,
        "summary": route.words,
        "parameters": parameters,
        "responses": responses,
    }
    if route.method == "POST":
        content = {"application/json": {"schema": schema(route.fields)}}
        required = any(field.required for field in route.fields.values())
        document["requestBody"] = {"required": required, "content": content}
    return document
