"""Thinning out a session: which checkpoints to keep, and which must stay."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .waiting import who_waits

if TYPE_CHECKING:
    from datetime import tzinfo

    from .store import Store

_SUFFIX = ".image"


def choose_kept(
    taken: Iterable[tuple[int, float]],
    *,
    last: int = 0,
    hourly: int = 0,
    daily: int = 0,
    zone: tzinfo | None = None,
) -> dict[int, list[str]]:
    """Which of the checkpoints (number, Unix seconds) to keep, each with the reasons.

    As restic and borg have it: the `last` newest ones, and the newest one in each of the last
    `hourly` hours and `daily` days *that have one*, by the clock of `zone` (None: this
    machine's). The newest is kept whatever is asked. A larger number is newer; the clock, which
    may have been set back, only says which hour it was.
    """
    from datetime import UTC, datetime

    newest_first = sorted(taken, reverse=True)
    kept: dict[int, list[str]] = {}
    if newest_first:
        kept[newest_first[0][0]] = ["newest"]
    for number, _ in newest_first[:last]:
        kept.setdefault(number, []).append("last")
    for word, wanted, form in (("hourly", hourly, "%Y-%m-%d %H %z"), ("daily", daily, "%Y-%m-%d")):
        seen: set[str] = set()
        for number, unix_s in newest_first:
            period = datetime.fromtimestamp(unix_s, UTC).astimezone(zone).strftime(form)
            if len(seen) < wanted and period not in seen:
                seen.add(period)
                kept.setdefault(number, []).append(word)
    return kept


def is_in_use(store: Store, image: str) -> bool:
    """Whether `Store.remove` would refuse that image now; False if it is not there any more."""
    try:
        descriptor = os.open(
            image + _SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=store.manifests
        )
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return bool(who_waits(store.path, image))
