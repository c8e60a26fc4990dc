"""Idle io_urings: their counters, unread answers and unsubmitted requests, and how they were made.

Its memory is shared with the kernel, and its counters go on; so `lzy.checkpoint.rings` makes it
inside the process, when that exists. Here an eventfd holds its numbers until then. What a ring was
made with nothing tells outright: it follows from its size, from what was written in it, and from
calls that are bound to fail (`linux.io_uring.peculiarities`).
"""

from __future__ import annotations

import base64
import os
import struct
from typing import TYPE_CHECKING

from ..linux import io_uring as kernel
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_CLOSE_IT = "let the process close it (asyncio's own loop, for uvloop's), then dump again"
_AWAIT_IT = "dump again when they are answered"
_MOST_REQUESTS = 50_000_000  # a ring's counters are counted up again: ten million a second
_REGISTERED = {"UserFiles": "files are", "UserBufs": "buffers are", "Personalities": "rights are"}


class Ring(Kind):
    rank = 30

    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "io_uring"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        fields = opened.fields
        sq_entries = int(fields["SqMask"], 16) + 1
        cq_entries = int(fields["CqMask"], 16) + 1
        if len(opened.first_places()) > 1:
            raise opened.refusal("several processes have the io_uring", _CLOSE_IT)
        for name, what in _REGISTERED.items():
            if fields.get(name, "0") != "0":
                raise opened.refusal(f"{what} registered with the io_uring", _CLOSE_IT)
        if peculiar := kernel.peculiarities(opened.fd):
            raise opened.refusal(peculiar[0], _CLOSE_IT)
        layout = kernel.sample_layout(sq_entries, cq_entries, 0)
        if not kernel.reaches(opened.fd, sq_entries * kernel.REQUEST_BYTES, kernel.OFFSET_REQUESTS):
            raise opened.refusal("its memory is the program's own", _CLOSE_IT)
        flags = _flags_of(opened, layout, sq_entries, cq_entries)
        layout = kernel.sample_layout(sq_entries, cq_entries, flags)
        wide = bool(flags & kernel.SETUP_WIDE_REQUESTS)
        entries_bytes = sq_entries * kernel.REQUEST_BYTES * (2 if wide else 1)
        rings_bytes = layout.array + 4 * sq_entries
        if not kernel.reaches(opened.fd, rings_bytes, 0):
            rings_bytes = layout.array  # made without the array (IORING_SETUP_NO_SQARRAY)
        if fields.get("SqThread", "-1") != "-1":
            flags |= kernel.SETUP_POLLED_BY_THREAD
        with kernel.map_ring(opened.fd, rings_bytes, 0) as mapped:
            rings = bytearray(mapped[:rings_bytes]).ljust(layout.array + 4 * sq_entries, b"\0")
        with kernel.map_ring(opened.fd, entries_bytes, kernel.OFFSET_REQUESTS) as mapped:
            requests = mapped[:entries_bytes]
        self._refuse_in_flight(opened, rings, layout, flags)
        return {
            "sq_entries": sq_entries,
            "cq_entries": cq_entries,
            "setup_flags": flags,
            "layout": list(layout),
            "inode": opened.status.st_ino,
            "rings": base64.b64encode(_with_array(rings, requests, layout, sq_entries)).decode(),
            "requests": base64.b64encode(requests).decode(),
        }

    @staticmethod
    def _refuse_in_flight(
        opened: Opened, rings: bytearray, layout: kernel.Layout, flags: int
    ) -> None:
        head, tail, dropped, answered, lost = (
            struct.unpack_from("<I", rings, place)[0]
            for place in (
                layout.sq_head, layout.sq_tail, layout.sq_dropped, layout.cq_tail,
                layout.cq_overflow,
            )
        )  # fmt: skip
        if flags & kernel.SETUP_POLLED_BY_THREAD and head != tail:
            raise opened.refusal("the io_uring is just taking requests", _AWAIT_IT, passes=True)
        in_flight = (head - dropped - answered - lost) % (1 << 32)
        if in_flight >= 1 << 31:
            raise opened.refusal(
                "the io_uring gave several answers to one request (multishot)", _CLOSE_IT
            )
        lists = [line.strip() for line in opened.information]
        polls = lists[lists.index("PollList:") + 1 :] if "PollList:" in lists else []
        waiting = any(line.startswith(("op=", "user_data=")) for line in polls)
        if in_flight or waiting:
            raise opened.refusal(
                f"the io_uring has {in_flight or 'some'} requests in flight (or made some that are "
                "not answered)",
                _AWAIT_IT,
                passes=True,
            )
        if head > _MOST_REQUESTS:
            raise opened.refusal(f"the io_uring has had {head} requests, too many", _CLOSE_IT)

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        return os.eventfd(0, os.EFD_CLOEXEC)


def _flags_of(opened: Opened, plain: kernel.Layout, sq_entries: int, cq_entries: int) -> int:
    """Whether its requests or answers are of double size, by how much memory it has.

    That of a small ring is a page in any case: such a one counts as plain, as nearly all are, but
    where something stands behind the place for plain requests.
    """
    flags = 0
    wide_bytes = 2 * sq_entries * kernel.REQUEST_BYTES
    if kernel.reaches(opened.fd, wide_bytes, kernel.OFFSET_REQUESTS):
        with kernel.map_ring(opened.fd, wide_bytes, kernel.OFFSET_REQUESTS) as mapped:
            behind = any(mapped[wide_bytes // 2 :])
        if wide_bytes > 4096 or behind:
            flags |= kernel.SETUP_WIDE_REQUESTS
    narrow_bytes = plain.array + 4 * sq_entries
    wide_bytes = plain.cqes + 2 * cq_entries * kernel.COMPLETION_BYTES
    if -(-wide_bytes // 4096) > -(-narrow_bytes // 4096) and kernel.reaches(
        opened.fd, wide_bytes, 0
    ):
        flags |= kernel.SETUP_WIDE_COMPLETIONS
    return flags


def _with_array(rings: bytearray, requests: bytes, layout: kernel.Layout, sq_entries: int) -> bytes:
    """The ring's numbers, with an array that names each request by its own place if it has none.

    A ring without the array (IORING_SETUP_NO_SQARRAY) looks like one whose array holds zeros, and
    one whose array stays as written here works like one without. A program that has an array and
    uses it has filled it, or has never used another request than the first.
    """
    place = slice(layout.array, layout.array + 4 * sq_entries)
    step = len(requests) // sq_entries
    (taken,) = struct.unpack_from("<I", rings, layout.sq_tail)
    only_first = taken > 1 and not any(requests[step : 2 * step])
    if not any(rings[place]) and not only_first:
        rings[place] = struct.pack(f"<{sq_entries}I", *range(sq_entries))
    return bytes(rings)


KIND = Ring()
