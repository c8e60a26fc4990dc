"""What a file system's refusal means for a store: the error to raise, and what to do about it."""

from __future__ import annotations

import errno

from .errors import AccessDenied, LzyError, StoreUnavailable

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unavailable(doing: str, error: OSError) -> LzyError:
    """StoreUnavailable, or AccessDenied where that is what it was; `doing` says what we were at."""
    message = f"cannot {doing}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return AccessDenied(message, remedy="the store belongs to another user")
    remedy = "make room there or name another --store" if error.errno in _NO_SPACE else ""
    return StoreUnavailable(message, remedy=remedy, errno=error.errno)
