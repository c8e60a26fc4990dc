"""Everything at work at once: DataLoader workers in mid-epoch, a fork pool, threads, much memory.

Arguments: MiB of an array that threads go over again and again, workers of either kind. A thread
reads a file, so that the kernel has to take pages of it away wherever memory is short.
"""

import multiprocessing
import os
import sys
import threading
import time
from typing import Any

import numpy as np

PATIENCE_S = max(60.0, float(os.environ.get("LZY_TEST_PATIENCE_S", "0")))


def square_sum(number: int) -> int:
    """A task of the pool: a tenth of a second's work, or so, in memory of its own."""
    values = np.arange(number % 1000 * 1000, dtype=np.int64)
    return int((values * values % 7).sum())


class Stirrer(threading.Thread):
    """Adds one to every number of its part of the array, again and again."""

    def __init__(self, part: Any) -> None:
        super().__init__(daemon=True)
        self.part, self.rounds, self.at = part, 0, 0
        self.lock = threading.Lock()

    def run(self) -> None:
        step = 1 << 16
        while True:
            with self.lock:
                self.part[self.at : self.at + step] += 1
                self.at += step
                if self.at >= len(self.part):
                    self.at, self.rounds = 0, self.rounds + 1

    def is_right(self) -> bool:
        """Whether every number is what it must be, in the midst of a round."""
        with self.lock:
            done = self.part[: self.at] == self.rounds + 1
            left = self.part[self.at :] == self.rounds
            return bool(done.all() and left.all())

    def progress(self) -> int:
        return self.rounds * len(self.part) + self.at


class Feeder(threading.Thread):
    """Takes results, one after the other, and compares each with what it must be."""

    def __init__(self, results: Any, expected: Any) -> None:
        super().__init__(daemon=True)
        self.results, self.expected = results, expected
        self.taken, self.wrong = 0, 0

    def run(self) -> None:
        for index, result in enumerate(self.results):
            self.wrong += result != self.expected(index)
            self.taken += 1

    def progress(self) -> int:
        return self.taken


class Reader(threading.Thread):
    """Reads a file of 64 MiB, again and again, and compares what it reads."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.file = open("data", "w+b", buffering=0)
        for number in range(64):
            self.file.write(bytes([number]) * (1 << 20))
        os.fsync(self.file.fileno())
        self.pieces, self.wrong = 0, 0

    def run(self) -> None:
        while True:
            number = self.pieces % 64
            piece = os.pread(self.file.fileno(), 1 << 20, number << 20)
            self.wrong += piece.count(number) != 1 << 20
            self.pieces += 1

    def progress(self) -> int:
        return self.pieces


def main(mebibytes: int, workers: int) -> None:
    # What has a name in /dev/shm says whose it is: tests remove it.
    multiprocessing.current_process()._config["semprefix"] = f"/lzy-test-{os.getpid()}"
    context = multiprocessing.get_context("fork")
    pool = context.Pool(workers)  # before there are threads
    import torch
    from dialogue import converse
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(1)
    length = 1 << 40

    class Numbers(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> Any:
            return torch.full((64, 64), float(index % 1000)).sin().sum()

    def sequence() -> Any:
        number = 0
        while True:
            yield number
            number += 1

    loader = DataLoader(
        Numbers(), batch_size=8, num_workers=workers, sampler=sequence(), persistent_workers=True
    )
    loaded = iter(loader)  # its workers are forked here: they have nothing of the array
    first = [float(Numbers()[index]) for index in range(1000)]
    tasks = [square_sum(number) for number in range(100)]
    array = np.full(mebibytes << 17, 0, dtype=np.int64)
    stirrers = [Stirrer(part) for part in np.array_split(array, 2)]
    batches = Feeder(
        ([float(value) for value in batch] for batch in loaded),
        lambda index: [first[n % 1000] for n in range(index * 8, index * 8 + 8)],
    )
    results = Feeder(
        (pool.apply(square_sum, (number % 100,)) for number in sequence()),
        lambda index: tasks[index % 100],
    )
    reader = Reader()
    busy = [*stirrers, batches, results, reader]
    for thread in busy:
        thread.start()

    def await_progress() -> bool:
        """Whether each of them gets on."""
        before = [thread.progress() for thread in busy]
        deadline = time.monotonic() + PATIENCE_S
        while not all(t.progress() > p + 3 for t, p in zip(busy, before, strict=True)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    assert await_progress()

    def prove() -> Any:
        return {
            "all get on": await_progress(),
            "array": all(stirrer.is_right() for stirrer in stirrers),
            "batches": batches.wrong == 0,
            "results": results.wrong == 0,
            "file": reader.wrong == 0,
            "workers": len(multiprocessing.active_children()) == 2 * workers,
        }

    def spoil() -> None:
        array[0] -= 7

    converse(prove, spoil)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
