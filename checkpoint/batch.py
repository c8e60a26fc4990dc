"""System calls made inside another process in one go: a table, and the data that it points to."""

from __future__ import annotations

import copy

from . import machine
from .errors import KernelError


class Batch:
    """System calls to be made inside a tracee in one go, with the data they point to.

    Data is placed from `base` on, the table of calls behind it; `base` is memory of the tracee.
    """

    def __init__(self, base: int, capacity_bytes: int) -> None:
        self.base = base
        self.capacity_bytes = capacity_bytes
        self._data = bytearray()
        self._table = bytearray()
        self._calls: list[tuple[int, tuple[int, ...], bool, str]] = []
        self.results: list[int] = []
        self._packed: tuple[bytes, int] | None = None

    def put(self, content: bytes) -> int:
        """Place `content`; its address in the tracee (16-byte aligned)."""
        self._packed = None
        self._data += b"\0" * (-len(self._data) % 16)
        address = self.base + len(self._data)
        self._data += content
        return address

    def room(self, length_bytes: int) -> int:
        """Place zeros for a result; their address in the tracee."""
        return self.put(bytes(length_bytes))

    def call(self, number: int, *arguments: int, tolerate: bool = False, what: str = "") -> int:
        """Add a call; the index of its result. `what` names it in errors."""
        self._packed = None
        self._table += machine.pack_call(number, arguments, tolerate)
        self._calls.append((number, arguments, tolerate, what))
        return len(self._calls) - 1

    @property
    def full(self) -> bool:
        """Whether little room is left, so that it had better be run now."""
        return len(self._data) + len(self._table) > self.capacity_bytes - 8192

    def pack(self) -> tuple[bytes, int]:
        """The bytes for `base` and the address of the table in them."""
        if self._packed:
            return self._packed
        data = self._data + b"\0" * (-len(self._data) % 16)
        content = bytes(data + self._table) + machine.END_OF_TABLE
        if len(content) > self.capacity_bytes:
            raise ValueError(f"{len(self._calls)} calls do not fit {self.capacity_bytes} bytes")
        self._packed = content, self.base + len(data)
        return self._packed

    def again(self) -> Batch:
        """The same calls, to be made once more where `base` is the same: it is ready at once."""
        self.pack()
        return copy.copy(self)  # what it is run with it replaces, and changes nothing in place

    def take(self, content: bytes) -> None:
        """Read results and data back from the tracee's bytes."""
        offset = len(content) - len(self._table) - 8
        self._data = bytearray(content[:offset])
        self.results = memoryview(content)[offset:-8].cast("q")[7::8].tolist()

    def read(self, address: int, length_bytes: int) -> bytes:
        """Bytes of the data after the run."""
        offset = address - self.base
        return bytes(self._data[offset : offset + length_bytes])

    def check(self, pid: int) -> None:
        """Raise KernelError for the first call that failed and was not tolerated."""
        if min(self.results, default=0) >= 0:
            return
        for (number, arguments, tolerate, what), result in zip(
            self._calls, self.results, strict=True
        ):
            if -4095 <= result < 0 and not tolerate:
                raise KernelError(
                    f"system call {number}({', '.join(map(hex, arguments))}) inside pid {pid}"
                    + (f" ({what})" if what else ""),
                    -result,
                    pid=pid,
                )
