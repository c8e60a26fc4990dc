"""The program whose checkpoints are measured: random memory, written to as it is told.

    python scribe.py SIZE_BYTES

It answers each line on standard input with one on standard output: `write N` adds to one word of
each of the first N pages, `scatter N` of N pages here and there, `rewrite` of all pages, each with
the nanoseconds it took; `rest` does nothing.
"""

from __future__ import annotations

import sys
import time

import numpy as np

_WORDS_PER_PAGE = 512


def main() -> None:
    memory = np.random.default_rng(1).integers(0, 1 << 63, int(sys.argv[1]) // 8, dtype=np.uint64)
    pages = memory.reshape(-1, _WORDS_PER_PAGE)
    chance = np.random.default_rng(2)
    print("ready", flush=True)
    for line in sys.stdin:
        word, _, count = line.strip().partition(" ")
        began_ns = time.perf_counter_ns()
        if word == "write":
            pages[: int(count), 7] += np.uint64(1)
        elif word == "scatter":
            pages[chance.choice(len(pages), int(count), replace=False), 7] += np.uint64(1)
        elif word == "rewrite":
            memory += np.uint64(1)
        print(time.perf_counter_ns() - began_ns, flush=True)


main()
