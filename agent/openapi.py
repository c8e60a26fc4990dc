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
    "409": "something else is done to it now",
    "422": "the process has something that lzy cannot make again",
    "500": "it failed",
    "503": "the store cannot be used now",
}


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
        "components": {"schemas": {"Error": _ERROR}},
    }


def _describe(route: Route) -> dict[str, Any]:
    kind = "text/plain" if route.path.endswith("/metrics") else "application/json"
    done: dict[str, Any] = {"description": "done", "content": {kind: {}}}
    responses: dict[str, Any] = {"200": done}
    if "wait" in route.fields:
        responses["202"] = {"description": "begun", "content": {"application/json": {}}}
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
