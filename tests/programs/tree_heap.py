"""Four children that have most of their memory copy-on-write from their parent: 64 MiB of it."""

import os
import sys
import zlib

from dialogue import Proof, converse
from kin import Answer, Child

MIB = 1 << 20
size_mib = int(sys.argv[1]) if len(sys.argv) > 1 else 64
data = bytearray(os.urandom(size_mib * MIB))


def change(number: int) -> Answer:
    """Has a MiB of its own, and here and there a page."""
    data[number * MIB : (number + 1) * MIB] = os.urandom(MIB)
    for at in range(number, len(data), 5 * MIB):
        data[at] ^= 1 << number
    first = zlib.crc32(data)
    return lambda _: zlib.crc32(data) == first


def main() -> None:
    before = zlib.crc32(data)
    children = [Child(lambda number=number: change(number)) for number in range(4)]
    data[-1] ^= 255  # after they were forked: theirs now, and another one ours
    after = zlib.crc32(data)
    assert after != before

    def prove() -> Proof:
        proof = {f"child {n}": child.ask("") == "True" for n, child in enumerate(children)}
        return {**proof, "parent": zlib.crc32(data) == after}

    def spoil() -> None:
        data[MIB] ^= 1

    converse(prove, spoil)


main()
