"""Epoll instances: what each watches, for which events, with the program's own 64 bits of data.

An entry's key is the pair (description, descriptor number), so the calls are made in the new
process when everything has its number. A program may have registered a number, duplicated it and
closed the first: the kernel then watches a description under a number that means something else
or nothing. kcmp(2) finds such stale entries, and they are made again just so.

A one-shot entry that has fired is fired again rather than merely left out, since the program will
re-arm it with EPOLL_CTL_MOD. An edge-triggered one may report its present state once more.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ..linux import descriptors as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_MANY = 1024


class Epoll(Kind):
    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "eventpoll"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        targets: list[dict[str, Any]] = []
        seen: dict[int, int] = {}
        for line in opened.information:
            if not line.startswith("tfd:"):
                continue
            # tfd:        5 events:       19 data:                5  pos:0 ino:… sdev:…
            words = line.replace(":", ": ").split()
            facts = dict(zip(words[::2], words[1::2], strict=False))
            number = int(facts["tfd:"])
            occurrence = seen[number] = seen.get(number, -1) + 1
            index, stale, holder = _find_target(opened, survey, number, occurrence)
            target = {
                "number": number,
                "description": index,
                "events": int(facts["events:"], 16),
                "data": int(facts["data:"], 16),
                "stale": stale,
            }
            if holder:
                target["holder"] = holder
            targets.append(target)
        return {"targets": targets}

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        return kernel.make_epoll()

    def place(self, entry: Entry, fd: int, local: dict[int, int], holder: int) -> None:
        fresh = [t for t in entry["targets"] if not t["stale"] and t.get("holder", 0) == holder]
        # Fired ones first: what is ready is taken off again before others could be.
        for target in fresh:
            if _has_fired(target):
                _add_fired(fd, target)
        for target in fresh:
            if not _has_fired(target):
                _add(fd, target, target["events"])


def _find_target(
    opened: Opened, survey: Survey, number: int, occurrence: int
) -> tuple[int, bool, int]:
    """The description that an entry watches, whether its number means something else now, and who.

    The last is the process of a tree whose number it is, 0 for the first: the one that registered
    it, or one that inherited the number.
    """
    for at, own in opened.first_places():
        holder = survey.holders[at]
        index = survey.index_of.get((at, number))
        if index is not None and kernel.watches_description(
            holder.witness, number, own, number, occurrence
        ):
            return index, False, holder.number
    for (at, candidate), index in survey.index_of.items():
        own_number = dict(opened.first_places()).get(at)
        if own_number is not None and kernel.watches_description(
            survey.holders[at].pid, candidate, own_number, number, occurrence
        ):
            return index, True, survey.holders[at].number
    raise opened.refusal(
        f"it watches something registered as descriptor {number} that the process has closed "
        "and somebody else keeps open",
        "let the process unregister it before closing it",
    )


def _has_fired(target: dict[str, Any]) -> bool:
    return not target["events"] & ~kernel.EPOLL_PRIVATE_BITS


def _add_fired(epoll: int, target: dict[str, Any]) -> None:
    """Add a one-shot entry and let it fire now, if there is anything it can fire for."""
    before = kernel.epoll_ready(epoll, _MANY)
    if not _add(epoll, target, kernel.EPOLL_ONESHOT | kernel.EPOLL_ANY):
        return
    if kernel.epoll_ready(epoll, _MANY) == before:
        kernel.epoll_control(
            epoll, kernel.EPOLL_CTL_MOD, target["number"], target["events"], target["data"]
        )


def _add(epoll: int, target: dict[str, Any], events: int) -> bool:
    # EPERM: a terminal or pipe that is /dev/null now, which is always ready and never watched.
    with contextlib.suppress(PermissionError):
        kernel.epoll_control(epoll, kernel.EPOLL_CTL_ADD, target["number"], events, target["data"])
        return True
    return False


KIND = Epoll()
