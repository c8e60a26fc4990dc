"""The program that the benchmarks dump and restore: some memory, and a clock that it never loses.

    python subject.py LOG KIND SIZE_BYTES

It makes `SIZE_BYTES` of memory of a KIND and then reads the monotonic clock again and again. When
two readings are more than a millisecond apart it was not running in between, and it appends both
to LOG: `gap LAST NOW` (nanoseconds). So what is measured is what the program itself saw, and the
reading that ends a gap is the very next thing that it does after a freeze or a restore.

On SIGUSR1 it reads all of its memory and appends `read NOW TOOK CHECKSUM`; on SIGUSR2 it touches
pages it does not have yet, in random order, and appends `faults` and the nanoseconds that each
took; on SIGHUP it forks five times and appends `forks` and what each call took.
With KIND `empty` it has no memory to speak of.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from array import array
from collections.abc import Iterator
from typing import Any

_PAGE_BYTES = 4096
_GAP_NS = 1_000_000
_FAULTS_WANTED = 1500


def make_memory(kind: str, size_bytes: int) -> Any:
    """The memory of a kind; whatever keeps it alive."""
    if kind == "empty":
        return b""
    import numpy as np

    words = size_bytes // 8
    if kind == "random":
        return np.random.default_rng(1).integers(0, 1 << 63, words, dtype=np.uint64)
    if kind == "half":
        # Half written zeros (present pages, no holes), half one mebibyte again and again.
        memory = np.zeros(words, dtype=np.uint64)
        memory[: words // 2] += np.uint64(0)
        pattern = np.random.default_rng(2).integers(0, 1 << 63, 1 << 17, dtype=np.uint64)
        memory[words // 2 :] = np.resize(pattern, words - words // 2)
        return memory
    if kind == "frame":
        return make_frame(size_bytes)
    raise SystemExit(f"no such kind of memory: {kind}")


def make_frame(size_bytes: int) -> Any:
    """A data frame of mixed columns, of about that size: a table of orders, as people have them."""
    import numpy as np
    import pandas as pd

    rows = size_bytes // 69  # bytes of a row in the columns below, strings counted once
    chance = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "order": np.arange(rows, dtype=np.int64) + 10_000_000,
            "customer": chance.zipf(1.3, rows).clip(max=500_000),
            "when": pd.Timestamp("2025-01-01")
            + pd.to_timedelta(np.sort(chance.integers(0, 365 * 86_400, rows)), unit="s"),
            "price": chance.lognormal(3, 1, rows).round(2),
            "quantity": chance.poisson(2, rows).astype(np.int32) + 1,
            "score": chance.standard_normal(rows),
            "country": pd.Categorical.from_codes(
                chance.integers(0, 40, rows).astype(np.int8), [f"C{n:02}" for n in range(40)]
            ),
            "note": np.array([f"note {n % 997}" for n in range(1000)], dtype=object)[
                chance.integers(0, 1000, rows)
            ],
            "discount": np.where(chance.random(rows) < 0.7, 0.0, chance.random(rows).round(2)),
            "returned": chance.random(rows) < 0.05,
        }
    )


def blocks(memory: Any) -> Iterator[Any]:
    """The memory as arrays of bytes: of a column of objects, the pointers to them."""
    import numpy as np

    if isinstance(memory, np.ndarray):
        yield memory.view(np.uint8)
        return
    for _, column in memory.items():
        values = column.cat.codes.to_numpy() if hasattr(column, "cat") else column.to_numpy()
        if values.dtype == object:
            values = np.fromiter(map(id, values), dtype=np.int64, count=len(values))
        yield np.ascontiguousarray(values).view(np.uint8)


def read_all(memory: Any) -> int:
    """A checksum that takes every byte of the memory, a word at a time."""
    import numpy as np

    total = 0
    for block in blocks(memory):
        total += int(block[: len(block) & -8].view(np.uint64).sum(dtype=np.uint64))
    return total & 0xFFFFFFFFFFFFFFFF


def time_faults(memory: Any) -> list[int]:
    """Nanoseconds of each first touch of a page that is not there, in random order."""
    start: int = memory.ctypes.data
    view = memoryview(memory).cast("B")
    offsets = list(range(-start % _PAGE_BYTES, len(view), _PAGE_BYTES))
    random.Random(4).shuffle(offsets)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    clock = time.monotonic_ns
    taken = []
    for offset in offsets:
        entry = os.pread(pagemap, 8, (start + offset) // _PAGE_BYTES * 8)
        if entry[7] & 0xC0:  # present or swapped
            continue
        before = clock()
        view[offset]
        taken.append(clock() - before)
        if len(taken) == _FAULTS_WANTED:
            break
    os.close(pagemap)
    return taken


def main() -> None:
    log_path, kind, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    memory = make_memory(kind, size)
    clock = time.monotonic_ns

    def say(line: str) -> None:
        os.write(log, f"{line}\n".encode())

    def on_read(*_: object) -> None:
        began = clock()
        checksum = read_all(memory) if kind != "empty" else 0
        now = clock()
        say(f"read {now} {now - began} {checksum}")

    def on_faults(*_: object) -> None:
        say("faults " + " ".join(map(str, time_faults(memory))))

    def on_forks(*_: object) -> None:
        taken: list[int] = []
        while len(taken) < 5:
            before = clock()
            child = os.fork()
            if child == 0:
                os._exit(0)
            taken.append(clock() - before)
            os.waitpid(child, 0)
        say("forks " + " ".join(map(str, taken)))

    signal.signal(signal.SIGUSR1, on_read)
    signal.signal(signal.SIGUSR2, on_faults)
    signal.signal(signal.SIGHUP, on_forks)
    if kind != "empty":
        read_all(memory)  # imports and pages of the checksum's own code are there from now on
    say(f"ready {os.getpid()}")
    readings = array("q", [0, 0])
    last = clock()
    while True:
        now = clock()
        if now - last > _GAP_NS:
            readings[0], readings[1] = last, now
            say(f"gap {readings[0]} {readings[1]}")
            now = clock()
        last = now


if __name__ == "__main__":
    main()
