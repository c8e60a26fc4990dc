"""io_uring(7): rings of requests and answers that a process shares with the kernel.

Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final, NamedTuple

from . import address_of, syscall
from .memory import read_process

SYS_IO_URING_SETUP: Final = 425
SYS_IO_URING_ENTER: Final = 426
SYS_IO_URING_REGISTER: Final = 427

OFFSET_RINGS: Final = 0
OFFSET_COMPLETIONS: Final = 0x8000000  # older programs map the second ring by itself
OFFSET_REQUESTS: Final = 0x10000000
MAPPED_OFFSETS: Final = (OFFSET_RINGS, OFFSET_COMPLETIONS, OFFSET_REQUESTS)

SETUP_POLLED_BY_THREAD: Final = 1 << 1  # IORING_SETUP_SQPOLL
SETUP_COMPLETION_SIZE: Final = 1 << 3  # …_CQSIZE
SETUP_WIDE_REQUESTS: Final = 1 << 10  # …_SQE128
SETUP_WIDE_COMPLETIONS: Final = 1 << 11  # …_CQE32

REQUEST_BYTES: Final = 64
COMPLETION_BYTES: Final = 16

_ENTER_GET_EVENTS: Final = 1
_ENTER_WAKE_THREAD: Final = 2
_REGISTER_EVENT_DESCRIPTOR: Final = 4
_REGISTER_PROBE: Final = 8
_REGISTER_RESTRICTIONS: Final = 11
_REGISTER_BUFFER_RING_STATUS: Final = 26
_REGISTER_NAPI: Final = 27
_OP_NOP: Final = 0
_NO_COMPLETION: Final = 1 << 6  # IOSQE_CQE_SKIP_SUCCESS, Linux 5.17
_PROBED_BUFFER_GROUPS: Final = 64
_BAD_POINTER: Final = 1

_PARAMETERS = struct.Struct("<5I I I 12x 8I 8x 8I 8x")
PARAMETER_BYTES: Final = _PARAMETERS.size


class Layout(NamedTuple):
    """Where a ring's numbers stand in its shared memory, in bytes from its begin."""

    sq_head: int
    sq_tail: int
    sq_dropped: int
    array: int
    cq_head: int
    cq_tail: int
    cq_overflow: int
    cq_flags: int
    cqes: int


def pack_parameters(flags: int, cq_entries: int, idle_ms: int = 0) -> bytes:
    """struct io_uring_params for a ring with so many completions."""
    return _PARAMETERS.pack(
        0, cq_entries, flags | SETUP_COMPLETION_SIZE, 0, idle_ms, 0, 0, *[0] * 16
    )


def unpack_layout(content: bytes) -> Layout:
    """What the kernel wrote into struct io_uring_params."""
    words = _PARAMETERS.unpack(content)
    sq, cq = words[7:15], words[15:23]
    return Layout(sq[0], sq[1], sq[5], sq[6], cq[0], cq[1], cq[4], cq[6], cq[5])


def sample_layout(sq_entries: int, cq_entries: int, flags: int) -> Layout:
    """How this kernel lays out such a ring, from one made and closed again."""
    buffer = ctypes.create_string_buffer(pack_parameters(flags, cq_entries), PARAMETER_BYTES)
    os.close(syscall(SYS_IO_URING_SETUP, sq_entries, ctypes.addressof(buffer)))
    return unpack_layout(buffer.raw)


def map_ring(ring: int, length_bytes: int, offset: int) -> mmap.mmap:
    """A ring's memory, mapped here; EINVAL, or SIGBUS at the touch, where it has less."""
    rounded = -(-length_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return mmap.mmap(ring, rounded, mmap.MAP_SHARED, offset=offset)


def reaches(ring: int, length_bytes: int, offset: int) -> bool:
    """Whether a ring's memory is at least so long, to a page."""
    try:
        mapped = map_ring(ring, length_bytes, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    try:  # since Linux 6.14 more can be mapped than there is
        last = memoryview(bytearray(1))
        with memoryview(mapped) as view:
            read_process(os.getpid(), [(address_of(view) + len(mapped) - 1, 1)], last)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        mapped.close()
    return True


def _probe(ring: int, operation: int, argument: int, count: int) -> int:
    """The errno that a registration which cannot succeed is refused with."""
    try:
        syscall(SYS_IO_URING_REGISTER, ring, operation, argument, count)
    except OSError as error:
        return error.errno or 0
    return 0


def peculiarities(ring: int) -> list[str]:
    """What of a ring nothing tells and that is asked for by calls that must fail; in words.

    Each is given a pointer to nowhere, so that it changes nothing, and the errno tells how far it
    came: io_uring/register.c, eventfd.c, napi.c, kbuf.c.
    """
    found = []
    probe = ctypes.create_string_buffer(16)  # struct io_uring_probe without operations
    if _probe(ring, _REGISTER_PROBE, ctypes.addressof(probe), 0) == errno.EEXIST:
        found.append("it takes requests of one thread only (IORING_SETUP_SINGLE_ISSUER)")
    if _probe(ring, _REGISTER_RESTRICTIONS, 0, 0) == errno.EINVAL:
        found.append("it is not enabled yet (IORING_SETUP_R_DISABLED)")
    if _probe(ring, _REGISTER_EVENT_DESCRIPTOR, _BAD_POINTER, 1) == errno.EBUSY:
        found.append("an eventfd is registered with it")
    if _probe(ring, _REGISTER_NAPI, _BAD_POINTER, 1) == errno.EINVAL and not _probe_unknown(ring):
        found.append("it polls its devices (IORING_SETUP_IOPOLL)")
    for group in range(_PROBED_BUFFER_GROUPS):
        status = ctypes.create_string_buffer(struct.pack("<I", group), 40)
        address = ctypes.addressof(status)
        if _probe(ring, _REGISTER_BUFFER_RING_STATUS, address, 1) == 0:
            found.append("a ring of buffers is registered with it")
            break
    return found


def _probe_unknown(ring: int) -> bool:
    """Whether this kernel knows no registration of busy polling (before Linux 6.9)."""
    fresh = ctypes.create_string_buffer(pack_parameters(0, 2), PARAMETER_BYTES)
    other = syscall(SYS_IO_URING_SETUP, 1, ctypes.addressof(fresh))
    try:
        return _probe(other, _REGISTER_NAPI, _BAD_POINTER, 1) == errno.EINVAL
    finally:
        os.close(other)


def run_counters(
    ring: int, layout: Layout, sq_entries: int, cq_entries: int, flags: int, sq: int, cq: int
) -> None:
    """Bring a fresh ring's counters to `sq` requests taken and `cq` answers given, mod 2**32.

    By requests that do nothing, some of which are not answered. `sq` is not less than `cq`.
    """
    step = REQUEST_BYTES * (2 if flags & SETUP_WIDE_REQUESTS else 1)
    completion = COMPLETION_BYTES * (2 if flags & SETUP_WIDE_COMPLETIONS else 1)
    array_end = layout.array + 4 * sq_entries
    rings = map_ring(ring, max(array_end, layout.cqes + cq_entries * completion), 0)
    requests = map_ring(ring, sq_entries * step, OFFSET_REQUESTS)
    try:
        rings[layout.array : array_end] = struct.pack(f"<{sq_entries}I", *range(sq_entries))
        done = 0
        for silent, until in ((True, sq - cq), (False, sq)):
            request = bytes([_OP_NOP, _NO_COMPLETION if silent else 0]).ljust(step, b"\0")
            requests[: sq_entries * step] = request * sq_entries
            while done < until:
                count = min(sq_entries, until - done)
                done += count
                struct.pack_into("<I", rings, layout.sq_tail, done)
                _submit(ring, rings, layout, flags, count, done)
                (answered,) = struct.unpack_from("<I", rings, layout.cq_tail)
                struct.pack_into("<I", rings, layout.cq_head, answered)
        requests[: sq_entries * step] = bytes(sq_entries * step)
        rings[layout.array : array_end] = bytes(array_end - layout.array)
    finally:
        requests.close()
        rings.close()


def _submit(
    ring: int, rings: mmap.mmap, layout: Layout, flags: int, count: int, until: int
) -> None:
    if not flags & SETUP_POLLED_BY_THREAD:
        syscall(SYS_IO_URING_ENTER, ring, count, 0, _ENTER_GET_EVENTS, 0, 0)
        return
    while struct.unpack_from("<I", rings, layout.sq_head)[0] != until:
        syscall(SYS_IO_URING_ENTER, ring, 0, 0, _ENTER_WAKE_THREAD, 0, 0)
        os.sched_yield()
