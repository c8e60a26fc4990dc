"""Memory maps of files and of none: shared, private with changed pages, of a file since deleted.

Argument: an empty folder to keep the files in.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

from clib import call, libc
from dialogue import Proof, converse

PAGE = mmap.PAGESIZE
folder = Path(sys.argv[1])


def make_file(name: str, length: int) -> int:
    path = folder / name
    path.write_bytes(b"".join(bytes([n % 251 + 1]) * 64 for n in range(length // 64 + 1))[:length])
    return os.open(path, os.O_RDWR)


def main() -> None:
    original = b"".join(bytes([n % 251 + 1]) * 64 for n in range(16 * PAGE // 64))
    tail_length = 3 * PAGE + 100
    shared_file = make_file("shared", 16 * PAGE)
    shared = mmap.mmap(shared_file, 16 * PAGE)
    shared[PAGE : PAGE + 5] = b"SHARE"
    private_file = make_file("private", 16 * PAGE)
    private = mmap.mmap(private_file, 16 * PAGE, flags=mmap.MAP_PRIVATE)
    private[5 * PAGE : 5 * PAGE + 7] = b"changed"
    private[7 * PAGE : 8 * PAGE] = bytes(PAGE)  # Zeroed, though the file says otherwise.
    tail_file = make_file("tail", tail_length)
    tail = mmap.mmap(tail_file, tail_length, flags=mmap.MAP_PRIVATE)
    tail[tail_length - 4 :] = b"TAIL"
    only_read_file = make_file("read", 4 * PAGE)
    only_read = mmap.mmap(only_read_file, 4 * PAGE, prot=mmap.PROT_READ)
    window = mmap.mmap(shared_file, 2 * PAGE, offset=8 * PAGE)  # Another view, same file.
    os.close(only_read_file)  # A mapping outlives its descriptor.
    gone_file = make_file("gone", 8 * PAGE)
    gone = mmap.mmap(gone_file, 8 * PAGE)
    gone_twice = mmap.mmap(gone_file, 8 * PAGE)
    gone[3 * PAGE : 3 * PAGE + 4] = b"GONE"
    os.unlink(folder / "gone")
    anonymous = mmap.mmap(-1, 32 * PAGE)  # Shared and anonymous.
    anonymous[9 * PAGE : 9 * PAGE + 4] = b"ANON"
    memfd = os.memfd_create("lump", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, 8 * PAGE)
    lump, lump_twice = mmap.mmap(memfd, 8 * PAGE), mmap.mmap(memfd, 8 * PAGE)
    lump[2 * PAGE : 2 * PAGE + 4] = b"LUMP"
    aliased = call(  # One memory at two addresses, one of them read-only.
        "mmap", None, ctypes.c_size_t(8 * PAGE), 1, mmap.MAP_SHARED, memfd, ctypes.c_long(0),
        restype=ctypes.c_void_p,
    )  # fmt: skip

    def prove() -> Proof:
        proof: Proof = {}
        whole = bytearray(original)
        whole[PAGE : PAGE + 5] = b"SHARE"
        proof["shared"] = shared[:] == whole
        proof["shared in the file"] = (folder / "shared").read_bytes() == whole
        window[:4] = b"VIEW"
        proof["one page cache"] = shared[8 * PAGE : 8 * PAGE + 4] == b"VIEW"
        window[:4] = original[8 * PAGE : 8 * PAGE + 4]
        os.pwrite(shared_file, b"W", 0)
        proof["written, seen"] = (
            shared[:1] == b"W" == window.__class__.__getitem__(shared, slice(1))
        )
        os.pwrite(shared_file, original[:1], 0)

        changed = bytearray(original)
        changed[5 * PAGE : 5 * PAGE + 7] = b"changed"
        changed[7 * PAGE : 8 * PAGE] = bytes(PAGE)
        proof["private"] = private[:] == changed
        proof["private file unchanged"] = (folder / "private").read_bytes() == original
        os.pwrite(private_file, b"NEW", 11 * PAGE)
        proof["untouched private page is the file's"] = private[11 * PAGE : 11 * PAGE + 3] == b"NEW"
        os.pwrite(private_file, original[11 * PAGE : 11 * PAGE + 3], 11 * PAGE)
        proof["tail"] = tail[:] == original[: tail_length - 4] + b"TAIL"
        proof["read-only"] = only_read[:] == original[: 4 * PAGE]

        deleted = bytearray(original[: 8 * PAGE])
        deleted[3 * PAGE : 3 * PAGE + 4] = b"GONE"
        proof["deleted"] = gone[:] == deleted == gone_twice[:] == os.pread(gone_file, 9 * PAGE, 0)
        proof["still deleted"] = os.fstat(gone_file).st_nlink == 0
        gone_twice[0:1] = b"!"
        proof["deleted, one memory"] = gone[:1] == b"!" == os.pread(gone_file, 1, 0)
        gone_twice[0:1] = original[:1]

        expected = bytearray(32 * PAGE)
        expected[9 * PAGE : 9 * PAGE + 4] = b"ANON"
        proof["anonymous"] = anonymous[:] == expected
        inherited = os.fork()
        if inherited == 0:
            anonymous[:5] = b"child"
            os._exit(0)
        os.waitpid(inherited, 0)
        proof["shared with a child"] = anonymous[:5] == b"child"
        anonymous[:5] = bytes(5)

        filled = bytearray(8 * PAGE)
        filled[2 * PAGE : 2 * PAGE + 4] = b"LUMP"
        proof["memfd"] = lump[:] == filled == os.pread(memfd, 9 * PAGE, 0)
        lump_twice[PAGE : PAGE + 3] = b"two"
        proof["memfd, one memory"] = (
            lump[PAGE : PAGE + 3] == b"two" == ctypes.string_at(aliased + PAGE, 3)
        )
        lump_twice[PAGE : PAGE + 3] = bytes(3)
        return proof

    def spoil() -> None:
        libc.memset(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(private))), 0, 1)

    converse(prove, spoil)


main()
