"""The program whose first cell after a wake is measured: much memory, of which a cell reads some.

    python cell.py LOG MOST_RUN_KIB SIZE_BYTES

It makes `SIZE_BYTES` of memory, amounts of money in cents, and sleeps, as a kernel does. On SIGUSR1
it runs the cell, and appends `cell TOOK CHECKSUM` (nanoseconds); on SIGUSR2 it reads all of its
memory and appends `read NOW TOOK CHECKSUM`; on SIGHUP it reads a word of each page, in random
order, and appends `leap TOOK`.

The cell reads a tenth of the memory in runs of 64 KiB up to MOST_RUN_KIB, each power of two as
likely as the next, at places and in an order drawn once: rows of a group are short runs, columns of
a frame long ones.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import Any

_SHARE = 10
_GRAIN_BYTES = 64 << 10


def draw_runs(size_bytes: int, most_run_bytes: int) -> list[tuple[int, int]]:
    """Runs (start, end), in bytes, that make up a tenth of `size_bytes` and do not overlap."""
    chance = random.Random(5)
    grains = size_bytes // _GRAIN_BYTES
    taken = bytearray(grains)
    wanted = grains // _SHARE
    powers = (most_run_bytes // _GRAIN_BYTES).bit_length()
    runs = []
    while wanted:
        length = min(1 << chance.randrange(powers), wanted)
        start = chance.randrange(grains - length)
        if any(taken[start : start + length]):
            continue
        taken[start : start + length] = b"\1" * length
        runs.append((start * _GRAIN_BYTES, (start + length) * _GRAIN_BYTES))
        wanted -= length
    return runs


def make_money(size_bytes: int) -> Any:
    """An array of amounts in cents, which compresses to a third and repeats nowhere."""
    import numpy as np

    words = size_bytes // 8
    base = (np.random.default_rng(6).lognormal(3, 1, 1 << 21) * 100).astype(np.int64)
    memory = np.empty(words, dtype=np.int64)
    for number, start in enumerate(range(0, words, len(base))):
        part = memory[start : start + len(base)]
        part[:] = base[: len(part)]
        part += number * 1_000_003
    return memory


def main() -> None:
    wanted = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)  # numpy's threads are to inherit that
    import numpy as np

    log_path, most_run, size = sys.argv[1], int(sys.argv[2]) << 10, int(sys.argv[3])
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    memory = make_money(size)
    runs = [(start // 8, end // 8) for start, end in draw_runs(size, most_run)]
    # What the cell needs besides is small, and made here: no fault of the interpreter's own.
    leaps = np.random.default_rng(7).permutation(size // 4096)[: 1 << 16] * 512
    clock = time.monotonic_ns

    def run_cell() -> int:
        return sum(int(memory[start:end].sum()) for start, end in runs)

    def say(line: str) -> None:
        os.write(log, f"{line}\n".encode())

    run_cell()
    memory.sum()
    memory[leaps].sum()
    say(f"ready {os.getpid()}")
    while True:
        number = signal.sigwait(wanted)
        began = clock()
        if number == signal.SIGUSR1:
            checksum = run_cell()
            say(f"cell {clock() - began} {checksum}")
        elif number == signal.SIGUSR2:
            checksum = int(memory.sum())
            now = clock()
            say(f"read {now} {now - began} {checksum}")
        else:
            memory[leaps].sum()
            say(f"leap {clock() - began}")


if __name__ == "__main__":
    main()
