"""Byte planes: numbers taken apart into their first bytes, their second bytes, and so on.

An array of 64-bit counters is a poor thing to compress as it lies: a byte that changes between
seven that do not, a match to describe per number. Taken apart into eight planes, six are constant
and one is a ramp: zstd runs several times as fast, both ways, and mostly packs tighter. (The idea
is the shuffle filter of HDF5 and Blosc.)

How. Let a block be 16 numbers of `width` bytes, 16·width bytes in `width` registers. Interleaving
its first half with its second, byte by byte, rotates the bits of each byte's index left by one.
The index is (number: 4 bits, byte: log2 width bits); four rotations swap the two, which *is* the
transposition, and log2 width more bring it back. One round is one pair of PUNPCKLBW/PUNPCKHBW
(SSE2, on every x86-64) per pair of registers, so the whole is written down below as a loop that
emits instructions. Elsewhere, or where memory may not become executable, slices do the same.
"""

from __future__ import annotations

import os
import threading

from .linux.code import Routine, buffer_address, make_routine

WIDTHS = (8, 4, 2)
BLOCK_NUMBERS = 16

_SOURCE, _TARGET = 7, 6  # rdi, rsi
_ONE_BYTE_ESCAPE = 0x0F


def _vector(prefix: int, opcode: int, register: int, operand: int) -> bytes:
    """`opcode xmm(register), xmm(operand)`; REX carries the fourth bit of each number."""
    rex = 0x40 | (register >> 3) << 2 | operand >> 3
    return bytes((prefix, rex, _ONE_BYTE_ESCAPE, opcode, 0xC0 | (register & 7) << 3 | operand & 7))


def _transfer(opcode: int, register: int, base: int, displacement: int) -> bytes:
    """MOVDQU between xmm(register) and [base + displacement]."""
    rex = 0x40 | (register >> 3) << 2
    modrm = 0x80 | (register & 7) << 3 | base
    head = bytes((0xF3, rex, _ONE_BYTE_ESCAPE, opcode, modrm))
    return head + displacement.to_bytes(4, "little")


_LOAD, _STORE = 0x6F, 0x7F
_ADD_RAX_RDX = b"\x48\x01\xd0"
_MOV_RAX_RDI = b"\x48\x89\xf8"
_MOV_RAX_RSI = b"\x48\x89\xf0"


def _routine(width: int, *, apart: bool) -> bytes:
    """Code of `f(source, target, plane bytes, blocks)`; blocks ≥ 1, in rdi, rsi, rdx, rcx.

    `apart`: numbers to planes, else planes to numbers. The planes are `plane bytes` apart.
    """
    rax = 0
    there, back = range(width), range(8, 8 + width)
    body = b""
    if apart:
        body += b"".join(_transfer(_LOAD, n, _SOURCE, 16 * n) for n in there)
    else:
        body += _MOV_RAX_RDI
        for n in there:
            body += _transfer(_LOAD, n, rax, 0) + _ADD_RAX_RDX
    source, target = there, back
    for _ in range(4 if apart else width.bit_length() - 1):
        for n in range(width // 2):
            one, other = source[n], source[n + width // 2]
            low, high = target[2 * n], target[2 * n + 1]
            body += _vector(0x66, 0x6F, low, one) + _vector(0x66, 0x6F, high, one)  # MOVDQA
            body += _vector(0x66, 0x60, low, other)  # PUNPCKLBW
            body += _vector(0x66, 0x68, high, other)  # PUNPCKHBW
        source, target = target, source
    if apart:
        body += _MOV_RAX_RSI
        for n in source:
            body += _transfer(_STORE, n, rax, 0) + _ADD_RAX_RDX
    else:
        body += b"".join(_transfer(_STORE, n, _TARGET, 16 * i) for i, n in enumerate(source))
    block = (BLOCK_NUMBERS * width).to_bytes(4, "little")
    one_plane = BLOCK_NUMBERS.to_bytes(4, "little")
    body += b"\x48\x81\xc7" + (block if apart else one_plane)  # add rdi, …
    body += b"\x48\x81\xc6" + (one_plane if apart else block)  # add rsi, …
    body += b"\x48\xff\xc9"  # dec rcx
    jump = -(len(body) + 6)
    return body + b"\x0f\x85" + jump.to_bytes(4, "little", signed=True) + b"\xc3"  # jnz, ret


def _make_routines() -> dict[tuple[int, bool], Routine]:
    if os.uname().machine != "x86_64":
        return {}
    try:
        return {
            (width, apart): make_routine(_routine(width, apart=apart))
            for width in WIDTHS
            for apart in (True, False)
        }
    except OSError:
        return {}


_routines: dict[tuple[int, bool], Routine] | None = None
_making = threading.Lock()


def fast() -> bool:
    """Whether taking numbers apart costs next to nothing here."""
    global _routines
    if _routines is None:
        with _making:
            if _routines is None:
                _routines = _make_routines()
    return bool(_routines)


def splittable(length_bytes: int, width: int) -> bool:
    """Whether so many bytes are whole blocks of numbers of that width."""
    return length_bytes > 0 and length_bytes % (BLOCK_NUMBERS * width) == 0


def take_apart(content: bytes | memoryview, width: int, into: memoryview) -> None:
    """Write the planes of `content` (numbers of `width` bytes, whole blocks) into `into`."""
    length_bytes = len(content)
    if not splittable(length_bytes, width) or len(into) != length_bytes or width not in WIDTHS:
        raise ValueError(f"{length_bytes} bytes are no blocks of {width} byte numbers")
    plane = length_bytes // width
    if not fast():
        numbers = bytes(content)  # its slices are eight times as fast as a memoryview's
        for number, start in enumerate(range(0, length_bytes, plane)):
            into[start : start + plane] = numbers[number::width]
        return
    _run((width, True), content, into, plane)


def put_together(planes: bytes | memoryview, width: int, into: memoryview) -> None:
    """Write the numbers that `planes` were taken from into `into`."""
    length_bytes = len(planes)
    if not splittable(length_bytes, width) or len(into) != length_bytes or width not in WIDTHS:
        raise ValueError(f"{length_bytes} bytes are no planes of {width} byte numbers")
    plane = length_bytes // width
    if not fast():
        for number, start in enumerate(range(0, length_bytes, plane)):
            into[number::width] = planes[start : start + plane]
        return
    _run((width, False), planes, into, plane)


def _run(which: tuple[int, bool], source: bytes | memoryview, into: memoryview, plane: int) -> None:
    assert _routines is not None
    if isinstance(source, memoryview) and source.readonly:
        source = bytes(source)
    at = source if isinstance(source, bytes) else buffer_address(source)
    _routines[which](at, buffer_address(into), plane, plane // BLOCK_NUMBERS)
