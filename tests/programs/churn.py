"""A process that never stands still: threads, mappings, descriptors and signals come and go."""

import itertools
import mmap
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

from dialogue import PATIENCE_S, Proof, converse

rounds = dict.fromkeys(("threads", "mappings", "descriptors", "signals"), 0)
wrong: list[str] = []
sent = caught = 0


def churn_threads(number: int) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if sorted(seen) != list(range(5)):
        wrong.append(f"threads {number}: {seen}")


def churn_mappings(number: int) -> None:
    chance = random.Random(number)
    pages = chance.randrange(1, 200)
    word = struct.pack("<Q", number + 1) * 512
    with mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE) as mapping:
        for page in range(0, pages, 3):
            mapping[page * 4096 : (page + 1) * 4096] = word
        for page in range(pages):
            if mapping[page * 4096 : (page + 1) * 4096] != (bytes(4096) if page % 3 else word):
                wrong.append(f"mapping {number}, page {page}")


def churn_descriptors(number: int) -> None:
    read, write = os.pipe()
    left, right = socket.socketpair()
    with left, right, open("/proc/self/comm") as comm:
        message = b"%d" % number
        os.write(write, message)
        left.send(message)
        if not os.read(read, 99) == message == right.recv(99) or not comm.read():
            wrong.append(f"descriptors {number}")
    os.close(read)
    os.close(write)


def churn_signals(number: int) -> None:
    """Real-time signals queue: each that is sent is caught, as long as the queue has room."""
    global sent
    while sent - caught > 100:
        time.sleep(0)
    sent += 1
    os.kill(os.getpid(), signal.SIGRTMIN)


def catch() -> None:
    """Takes the signals one by one; a handler in Python would run once for several."""
    global caught
    while True:
        signal.sigwaitinfo([signal.SIGRTMIN])
        caught += 1


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    threading.Thread(target=catch, daemon=True).start()
    stop = threading.Event()
    begun = threading.Barrier(len(rounds) + 1)

    def run(name: str, act: Callable[[int], None]) -> None:
        begun.wait()
        for number in itertools.count():
            if stop.is_set():
                return
            try:
                act(number)
            except Exception as error:
                wrong.append(f"{name} {number}: {error!r}")
            rounds[name] += 1

    acts = (churn_threads, churn_mappings, churn_descriptors, churn_signals)
    for name, act in zip(rounds, acts, strict=True):
        threading.Thread(target=run, args=(name, act), daemon=True).start()
    begun.wait()

    def prove() -> Proof:
        before, deadline = dict(rounds), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and any(
            rounds[name] < before[name] + 20 for name in rounds
        ):
            time.sleep(0.001)
        proof: Proof = {f"{name} go on": rounds[name] >= before[name] + 20 for name in rounds}
        # What is sent is caught in time; while more is being sent, a little may be on its way.
        goal = sent
        while caught < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        return proof | {"wrong": wrong or True, "no signal lost": caught >= goal}

    def spoil() -> None:
        global sent
        sent += 1000
        wrong.append("spoiled")

    converse(prove, spoil)
    stop.set()


main()
