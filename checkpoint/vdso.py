"""Another kernel's vDSO: the old one's code stays where it was, and its functions lead to the new.

libc keeps the addresses of the vDSO's functions, and an image's process may even stand in one.
So where the kernel's vDSO is another one, the code that the process knows is put back as ordinary
memory, with a jump at the entry of each function: to the function of that name in this kernel's
vDSO, which lies elsewhere then, or to a plain system call. In place of the old kernel's data lie
zeros. For whoever was in the midst of a function they mean: this clock cannot be read here, ask the
kernel (VDSO_CLOCKMODE_NONE, include/vdso/clocksource.h; a sequence count that differs is read
again).
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

import zstandard

from . import proc
from .errors import Damaged, Incompatible
from .linux import PAGE_BYTES, memory
from .proc import Vma

# What each function does by itself, were there no vDSO: the number of its system call, x86-64.
_SYSTEM_CALLS: Final = {
    "gettimeofday": 96,
    "time": 201,
    "clock_gettime": 228,
    "clock_getres": 229,
    "getcpu": 309,
    "getrandom": 318,
}
# Its state in the process's memory is laid out as the old kernel's code wants it.
_NEVER_LED: Final = frozenset({"getrandom"})
_JUMP: Final = struct.Struct("<Bi")  # jmp rel32
_FAR_JUMP: Final = struct.Struct("<6sQ")  # jmp [rip+0], and where to
_CALL: Final = struct.Struct("<BI3s")  # mov eax, NUMBER; syscall; ret
_STUB_BYTES: Final = 16
_TOP: Final = 0x7FFFFFFFF000  # of what a process may map, x86-64 with 4-level page tables
_LOWEST: Final = 0x1000000000
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_GNU_HASH = 4, 5, 6, 10, 0x6FFFFEF5
_PT_LOAD, _PT_DYNAMIC = 1, 2
_STT_FUNC: Final = 2


def read_vdso(pid: int, vmas: list[Vma]) -> bytes:
    """The vDSO of a process, without what may stand behind its end; empty if it has none."""
    for vma in vmas:
        if vma.kind == "vdso":
            content = bytearray(vma.length)
            memory.read_process(pid, [(vma.start, vma.length)], memoryview(content))
            return bytes(content[: file_bytes(content)])
    return b""


def file_bytes(content: bytes | bytearray) -> int:
    """Where the ELF file ends in the pages that hold it: its section headers come last."""
    (sections,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    return min(int(sections) + int(size) * int(count), len(content))


def pack(content: bytes) -> str:
    """A vDSO as text for an image's document."""
    import base64  # here, as a restore seldom needs it

    return base64.b64encode(zstandard.ZstdCompressor(level=9).compress(content)).decode()


def unpack(text: str) -> bytes:
    """The reverse of `pack`. Raises Damaged."""
    import base64

    try:
        packed = base64.b64decode(text, validate=True)
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=1 << 20)
    except (ValueError, zstandard.ZstdError) as error:
        raise Damaged(f"the vDSO in the image cannot be read: {error}") from error


def find_functions(content: bytes) -> dict[str, int]:
    """Functions that a vDSO exports, by their plain name (`clock_gettime`): where they begin.

    Raises ValueError for what is no such file; elf(5).
    """
    try:
        return _find_functions(content)
    except (struct.error, IndexError) as error:
        raise ValueError(f"no vDSO: {error}") from error


def _find_functions(content: bytes) -> dict[str, int]:
    if not content.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    base, dynamic = 0, None
    for at in range(table, table + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", content, at)
        if kind == _PT_LOAD:
            base = address - offset
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, length)
    if dynamic is None:
        raise ValueError("it has no dynamic section")
    tags: dict[int, int] = {}
    for at in range(dynamic[0], dynamic[0] + dynamic[1], 16):
        tag, value = struct.unpack_from("<QQ", content, at)
        tags.setdefault(tag, value)
    symbols, strings = tags[_DT_SYMTAB] - base, tags[_DT_STRTAB] - base
    # The symbols end where the strings begin; only old kernels have a table that counts them.
    end = strings if strings > symbols else len(content)
    if _DT_HASH in tags:
        (number,) = struct.unpack_from("<I", content, tags[_DT_HASH] - base + 4)
        end = min(end, symbols + 24 * number)
    found: dict[str, int] = {}
    for at in range(symbols, end - 23, 24):
        name_at, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", content, at)
        if info & 15 == _STT_FUNC and section:
            start = strings + name_at
            name = content[start : content.index(b"\0", start)].decode("ascii", "replace")
            found[name.removeprefix("__vdso_")] = value - base
    return found


# -- bridging ------------------------------------------------------------------------------------


def bridge(document: dict[str, Any]) -> bool:
    """Change an image's document so that its processes work with this kernel's vDSO, if it differs.

    Whether it does. The old code becomes a mapping of its own, with its content under `code` (see
    `put_code`). Raises Incompatible where it cannot be bridged.
    """
    from .host import vdso_digest

    host = document["host"]
    own = proc.kernel_mappings(os.getpid())
    if host["vdso"] == vdso_digest(os.getpid(), own):
        return False
    old = unpack(host["vdso_code"])
    new = read_vdso(os.getpid(), own)
    members = [document, *document.get("members", ())]
    place = _find_place([vma for member in members for vma in member["vmas"]], own)
    for member in members:
        _bridge_member(member, old, new, own, place)
    return True


def _bridge_member(
    member: dict[str, Any], old: bytes, new: bytes, own: list[Vma], place: int
) -> None:
    special = [vma for vma in member["vmas"] if vma["kind"] in ("vdso", "vvar")]
    vdso = next((vma for vma in special if vma["kind"] == "vdso"), None)
    if vdso is None:
        return
    kernel = [vma for vma in own if vma.kind in ("vdso", "vvar")]
    lowest = min(vma.start for vma in kernel)
    moved: list[dict[str, Any]] = [
        {
            "start": place + vma.start - lowest,
            "end": place + vma.end - lowest,
            "permissions": vma.permissions,
            "kind": vma.kind,
            "flags": [],
            "path": vma.path,
        }
        for vma in kernel
    ]
    target = next(vma["start"] for vma in moved if vma["kind"] == "vdso")
    stands = [
        thread["registers"]["rip"] - vdso["start"] for thread in member["threads"]
    ]  # also those that are elsewhere
    code = lead(old, vdso["end"] - vdso["start"], vdso["start"], new, target, stands)
    for vma in special:
        vma["kind"] = "anonymous"
        vma.pop("path", None)
    vdso["code"] = code
    member["vmas"].extend(moved)
    member["vmas"].sort(key=lambda vma: vma["start"])


def lead(
    old: bytes, length_bytes: int, start: int, new: bytes, target: int, stands: list[int]
) -> bytes:
    """The pages of an old vDSO at `start`, its functions leading to those of the new at `target`.

    `stands`: where threads are, counted from `start`; none may be in what is overwritten.
    """
    try:
        theirs, ours = find_functions(old), find_functions(new)
    except (ValueError, KeyError) as error:
        raise Incompatible(
            f"the vDSO of the image's kernel cannot be bridged: {error}",
            remedy="restore it under the kernel that it was taken under",
        ) from error
    pages = bytearray(old.ljust(length_bytes, b"\0"))
    room = -(-len(old) // _STUB_BYTES) * _STUB_BYTES
    entries = {place: name for name, place in sorted(theirs.items(), reverse=True)}
    for place, name in entries.items():
        if any(place < stand < place + _JUMP.size for stand in stands):
            raise Incompatible(
                f"a thread has just entered {name} of the old kernel's vDSO, which this kernel "
                "does not have",
                remedy="restore it under the kernel that it was taken under, or an image taken at "
                "another moment",
            )
        if name in ours and name not in _NEVER_LED:
            stub = _FAR_JUMP.pack(b"\xff\x25\0\0\0\0", target + ours[name])
        elif name in _SYSTEM_CALLS:
            stub = _CALL.pack(0xB8, _SYSTEM_CALLS[name], b"\x0f\x05\xc3")
        else:
            continue  # libc calls none of those; the old code has no data of its own
        if room + _STUB_BYTES > length_bytes:
            raise Incompatible(
                "the vDSO of the image's kernel has no room for jumps to this one's",
                remedy="restore it under the kernel that it was taken under",
            )
        pages[room : room + len(stub)] = stub
        _JUMP.pack_into(pages, place, 0xE9, room - place - _JUMP.size)
        room += _STUB_BYTES
    return bytes(pages)


def _find_place(vmas: list[dict[str, Any]], own: list[Vma]) -> int:
    """Addresses that no process of the image uses, for this kernel's vDSO and its data."""
    kernel = [vma for vma in own if vma.kind in ("vdso", "vvar")]
    wanted = max(v.end for v in kernel) - min(v.start for v in kernel) + 2 * PAGE_BYTES
    taken = sorted((vma["start"], vma["end"]) for vma in vmas)
    top = max((end for _, end in taken if end <= _TOP), default=_LOWEST)
    if top + wanted <= _TOP:  # above the stack, where a vDSO lies anyway
        return int(top) + PAGE_BYTES
    address = _LOWEST
    for start, end in taken:
        if start >= address + wanted:
            break
        address = max(address, end)
    return address + PAGE_BYTES


def put_code(descriptor: int, vmas: list[dict[str, Any]]) -> None:
    """Write old vDSOs into a process, by its /proc/PID/mem: they are mapped, not to be written."""
    for vma in vmas:
        if code := vma.get("code"):
            os.pwrite(descriptor, code, vma["start"])
