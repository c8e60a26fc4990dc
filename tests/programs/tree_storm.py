"""Children that fork and end all the time, and grandchildren that do; each counts what it made."""

import mmap
import os
import struct
import time

from dialogue import PATIENCE_S, Proof, converse
from kin import state_of

STORMS = 3
counts = mmap.mmap(-1, 4096)


def count(place: int) -> int:
    number: int = struct.unpack_from("<q", counts, 8 * place)[0]
    return number


def storm(place: int) -> None:
    """Fork, and fork there; wait; count those that ended as they should, and the others."""
    while True:
        child = os.fork()
        if not child:
            grandchild = os.fork()
            if not grandchild:
                os._exit(3)
            _, status = os.waitpid(grandchild, 0)
            os._exit(os.waitstatus_to_exitcode(status) + 4)
        _, status = os.waitpid(child, 0)
        at = place if status == 7 << 8 else STORMS + place
        struct.pack_into("<q", counts, 8 * at, count(at) + 1)


def main() -> None:
    children = []
    for place in range(STORMS):
        pid = os.fork()
        if not pid:
            try:
                storm(place)
            finally:
                os._exit(1)
        children.append(pid)

    def goes_on(place: int) -> bool:
        first, deadline = count(place), time.monotonic() + PATIENCE_S
        while count(place) < first + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return count(place) >= first + 3

    assert all(map(goes_on, range(STORMS)))

    def prove() -> Proof:
        proof = {f"storm {n} goes on": goes_on(n) for n in range(STORMS)}
        proof["each lives"] = all(state_of(pid) != "Z" for pid in children)
        proof["nobody failed"] = not any(map(count, range(STORMS, 2 * STORMS)))
        return proof

    converse(prove, lambda: struct.pack_into("<q", counts, 8 * STORMS, 1))


main()
