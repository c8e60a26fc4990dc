"""Files without a name: deleted while open, opened without one, memory files with their seals.

Argument: an empty folder.
"""

import fcntl
import os
import random
import sys
import tempfile
from pathlib import Path

from dialogue import Proof, converse

folder = Path(sys.argv[1])
NOISE = random.Random(3).randbytes(3 * 2**20 + 123)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def main() -> None:
    deleted = os.open(folder / "deleted", os.O_RDWR | os.O_CREAT, 0o640)
    reader = os.open(folder / "deleted", os.O_RDONLY)  # Another description of the same file.
    os.write(deleted, NOISE)
    os.lseek(deleted, 1000, os.SEEK_SET)
    os.unlink(folder / "deleted")
    sparse = os.open(folder / "sparse", os.O_RDWR | os.O_CREAT)
    os.pwrite(sparse, b"end", 2**30)
    os.unlink(folder / "sparse")
    nameless = tempfile.TemporaryFile(dir=folder)
    nameless.write(b"never had a name")
    nameless.flush()
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(sealed, NOISE[:5000])
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, SEALS)
    written = os.memfd_create("written")
    os.write(written, NOISE[:9000])
    empty = os.memfd_create("empty")

    def prove() -> Proof:
        proof: Proof = {}
        proof["deleted"] = os.pread(reader, len(NOISE) + 9, 0) == NOISE
        proof["position"] = os.lseek(deleted, 0, os.SEEK_CUR) == 1000
        proof["no name"] = os.fstat(deleted).st_nlink == 0 == os.fstat(nameless.fileno()).st_nlink
        proof["mode"] = os.fstat(deleted).st_mode & 0o777 == 0o640
        os.pwrite(deleted, b"SAME", 50)
        proof["same file"] = os.pread(reader, 4, 50) == b"SAME"
        os.pwrite(deleted, NOISE[50:54], 50)
        proof["sparse"] = os.fstat(sparse).st_size == 2**30 + 3 and (
            os.pread(sparse, 9, 2**30 - 2) == b"\0\0end"
        )
        proof["still sparse"] = os.fstat(sparse).st_blocks < 1000
        proof["nameless"] = os.pread(nameless.fileno(), 99, 0) == b"never had a name"
        proof["sealed"] = os.pread(sealed, 9999, 0) == NOISE[:5000]
        proof["seals"] = fcntl.fcntl(sealed, fcntl.F_GET_SEALS) == SEALS
        proof["written"] = os.pread(written, 9999, 0) == NOISE[:9000]
        proof["written position"] = os.lseek(written, 0, os.SEEK_CUR) == 9000
        proof["memfd name"] = os.readlink(f"/proc/self/fd/{sealed}") == "/memfd:sealed (deleted)"
        proof["empty"] = os.fstat(empty).st_size == 0
        return proof

    converse(prove, lambda: os.pwrite(deleted, b"?", len(NOISE) - 1))


main()
