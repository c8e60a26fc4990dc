"""The program that is kept below a limit: much memory, of which it uses a part all the time.

    python hotset.py SIZE_BYTES HOT_BYTES arrays|one

In arrays of 16 MiB, as a session has them, or all in one. It answers each `work N` on its input
with the nanoseconds that N passes over the hot part took, every second of them writing, and
`check` with whether the cold part is as it was.
"""

from __future__ import annotations

import sys
import time

import numpy as np

_PART_BYTES = 16 << 20


def main() -> None:
    size, hot_bytes = int(sys.argv[1]), int(sys.argv[2])
    chance = np.random.default_rng(1)
    if sys.argv[3] == "one":
        memory = chance.integers(0, 256, size, dtype=np.uint8)
        parts = [memory[at : at + _PART_BYTES] for at in range(0, size, _PART_BYTES)]
    else:
        parts = [
            chance.integers(0, 256, _PART_BYTES, dtype=np.uint8)
            for _ in range(0, size, _PART_BYTES)
        ]
    hot, cold = parts[: hot_bytes // _PART_BYTES], parts[hot_bytes // _PART_BYTES :]
    sums = [int(part.sum()) for part in cold]
    print("ready", flush=True)
    for line in sys.stdin:
        word, _, count = line.strip().partition(" ")
        if word == "check":
            print(int([int(part.sum()) for part in cold] == sums), flush=True)
            continue
        began_ns = time.perf_counter_ns()
        for number in range(int(count)):
            for part in hot:
                if number % 2:
                    part += np.uint8(1)
                else:
                    part.max()
        print(time.perf_counter_ns() - began_ns, flush=True)


main()
