"""Errors as they travel between processes: by the name of their kind, and back again."""

from __future__ import annotations

from typing import Any

from ..checkpoint import errors as engine
from ..checkpoint.errors import KernelError, LzyError

_KINDS = {
    kind.__name__: kind
    for kind in vars(engine).values()
    if isinstance(kind, type) and issubclass(kind, LzyError)
}


def describe(error: LzyError) -> dict[str, Any]:
    """An error in a document: kind, error (the message), remedy, exit_status."""
    return {
        "kind": type(error).__name__,
        "error": error.message,
        "remedy": error.remedy,
        "exit_status": error.exit_status,
    }


def revive(document: dict[str, Any]) -> LzyError:
    """The error that a document describes."""
    kind = _KINDS.get(str(document.get("kind")), LzyError)
    message, remedy = str(document.get("error")), str(document.get("remedy") or "")
    if issubclass(kind, KernelError):  # its message has the system's words already
        error: LzyError = LzyError(message, remedy=remedy)
        error.exit_status = KernelError.exit_status  # type: ignore[misc]  # of this one only
        return error
    return kind(message, remedy=remedy)


_STATUSES: tuple[tuple[type[LzyError], int], ...] = (
    (engine.AccessDenied, 403),
    (engine.NotFound, 404),
    (engine.Busy, 409),
    (engine.Unsupported, 422),
    (engine.Incompatible, 422),
    (engine.StoreUnavailable, 503),
)


def status_of(error: LzyError) -> int:
    """The HTTP status that goes with an error."""
    if type(error).__name__ == "BadBody":
        return 400
    if type(error).__name__ in ("Unreachable", "Unanswered"):  # another node
        return 503
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
